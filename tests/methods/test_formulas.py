"""Agreement of methods that are formulas for scores with an independent computation in float64, on every family."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from forwards import difference, ends_of_turns, in_double, logits, logits_in_turns
from oracle import ByPair, Change, Tokens, oracle
from tiny_vlms import TinyVLM

from peft_pvm import CAIConfig, HGAIConfig, LogBiasConfig, PAIConfig, VAFConfig, VARConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.scores import Scores
from peft_pvm.attention.stages import Bias, GroupWeights, KeyScale, Stage, Values
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.attention_method import AttentionMethod, SteeredLayer


pytestmark = pytest.mark.every_family
BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Formula:
    """What a method computes, written from the maths alone.

    Attributes:
        configs: The settings under test. The first is that of the wrong variants, and of gradients.
        oracle: What `oracle` is to do, from a configuration and the layers it acts on; with rows that depend on it,
            also from where forwards end.
        wrong: Stages that look like the method's, and are not.
        settled: Gives settings for a model and conversations by which no token stands at a threshold.
    """

    configs: tuple[AttentionMethod, ...]
    oracle: Callable[..., dict[str, ByPair | Change]]
    wrong: dict[str, Callable[..., Stage]]
    settled: Callable[[TinyVLM, Sequence[str], Any], Any] = lambda family, conversations, config: config


def acting_rows(tokens: Tokens) -> torch.Tensor:
    """Rows of text after an image, `(batch, seq_len)`, bool."""
    found = torch.zeros_like(tokens.visual)
    for row in range(len(found)):
        images = tokens.visual[row].nonzero().flatten().tolist()
        for query in range(found.shape[1]):
            behind = bool(images) and query > images[0]
            found[row, query] = behind and not tokens.visual[row, query] and tokens.real[row, query]
    return found


# ---- VAF


def scaled(config: VAFConfig, layers: list[int]) -> dict[str, ByPair]:
    def scale(tokens: Tokens, layer_idx: int) -> torch.Tensor:
        visual, acting = tokens.visual, acting_rows(tokens)
        pairs = torch.ones(*visual.shape, visual.shape[1], dtype=torch.float64)
        for row, query in acting.nonzero().tolist() if layer_idx in layers else ():
            images = visual[row].nonzero().flatten().tolist()
            pairs[row, query, images] = config.visual
            pairs[row, query, : images[0]] = config.before
        return pairs

    return {"scale": scale}


VAF = Formula(
    (VAFConfig(visual=1.5, before=0.6), VAFConfig(visual=0.7, before=1.2)),
    scaled,
    {
        "rows of the image too": lambda self, layer: KeyScale(self.of_keys, rows="all"),
        "all text": lambda self, layer: KeyScale(
            lambda call: torch.where(call.visual_keys, self.visual, self.before), rows="text"
        ),
        "weights": lambda self, layer: Bias(lambda call: self.of_keys(call).log(), rows="text"),
        "values": lambda self, layer: Values(self.of_keys, rows="text"),
    },
)


# ---- log-bias


def added(config: LogBiasConfig, layers: list[int]) -> dict[str, ByPair]:
    """Tokens are counted one by one."""

    def bias(tokens: Tokens, layer_idx: int) -> torch.Tensor:
        visual, real = tokens.visual, tokens.real
        pairs = torch.zeros(*visual.shape, visual.shape[1], dtype=torch.float64)
        for row in range(len(visual)) if layer_idx in layers else ():
            has_image, text = False, 0
            for query in range(visual.shape[1]):
                if visual[row, query]:
                    has_image, text = True, 0
                elif real[row, query]:
                    text += 1
                    if has_image:
                        pairs[row, query, visual[row]] = math.log(1 + text / config.t0)
        return pairs

    return {"bias": bias}


def in_rows(of_queries: Callable[[LogBiasConfig, AttentionCall], torch.Tensor]) -> Callable[..., Stage]:
    """The method with another number of each row."""
    return lambda self, layer: Bias(
        lambda call: call.visual_keys.float(), rows="text", of_queries=lambda call: of_queries(self, call)
    )


def behind(call: AttentionCall, image: int) -> torch.Tensor:
    """How many tokens stand behind one of the images before each: 0 is the first, -2 the last but one if there is."""
    visual = call.context.visual_mask
    counts = torch.zeros(visual.shape)
    for row, marks in enumerate(visual.tolist()):
        ends: list[int] = []
        for query, is_visual in enumerate(marks):
            if is_visual:
                ends[len(ends) - (query > 0 and marks[query - 1]) :] = [query]
            elif ends:
                counts[row, query] = query - ends[max(image, -len(ends))]
    return counts


LOG_BIAS = Formula(
    (LogBiasConfig(t0=0.7), LogBiasConfig(t0=3, layers_to_transform=[1])),
    added,
    {
        "rows of the image too": lambda self, layer: Bias(
            lambda call: call.visual_keys.float(), rows="all", of_queries=self.of_queries
        ),
        "all keys": lambda self, layer: Bias(
            lambda call: torch.ones(call.visual_keys.shape), rows="text", of_queries=self.of_queries
        ),
        "text counted from 0": in_rows(lambda self, call: (torch.expm1(self.of_queries(call)) - 1 / self.t0).log1p()),
        "text counted from the first image": in_rows(lambda self, call: (behind(call, 0) / self.t0).log1p()),
        "text counted from the image before": in_rows(lambda self, call: (behind(call, -2) / self.t0).log1p()),
        "positions for distances": in_rows(lambda self, call: (call.context.noted()[0][..., 0] / self.t0).log1p()),
        "no logarithm": in_rows(lambda self, call: torch.expm1(self.of_queries(call))),
        "no 1 in the logarithm": in_rows(lambda self, call: torch.expm1(self.of_queries(call)).clamp(min=1e-6).log()),
        "before scaling": in_rows(lambda self, call: self.of_queries(call) * call.scaling),
        "scores times it": lambda self, layer: KeyScale(
            lambda call: torch.where(call.visual_keys, self.of_queries(call).amax(1, keepdim=True), 1.0), rows="text"
        ),
    },
)


# ---- PAI and HGAI


def raised(size: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, Change]]:
    """Scores of visual keys, in rows of text after an image, raised by a share of some size."""

    def make(config: PAIConfig | HGAIConfig, layers: list[int], ends: Sequence[int] = (-1,)) -> dict[str, Change]:
        def change(tokens: Tokens, layer_idx: int, scores: torch.Tensor) -> torch.Tensor:
            if layer_idx not in layers:
                return scores
            rows = acting_rows(tokens)
            if config.rows == "generated":
                is_end = torch.zeros(rows.shape[1], dtype=torch.bool)
                is_end[list(ends)] = True
                rows = rows & is_end
            pairs = (rows[:, :, None] & tokens.visual[:, None]).double()[:, None]
            return scores + config.alpha * pairs * size(scores)

        return {"change": change}

    return make


def of_visual_keys(size: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Stage]:
    """The method with another size of scores."""
    return lambda self, layer: Scores(lambda call, scores, queries: self.alpha * size(scores))


COMMON = {
    "no sizes": of_visual_keys(lambda scores: scores),
    "of the last score": lambda self, layer: Scores(
        lambda call, scores, *of: self.added(call, scores, *of).roll(1, -1)
    ),
    "the last row alone": lambda self, layer: Scores(self.added, "generated"),
    "keys times 1 + alpha": lambda self, layer: KeyScale(
        lambda call: 1 + self.alpha * call.visual_keys.float(), rows="text"
    ),
}
PAI = Formula(
    (PAIConfig(alpha=1.5), PAIConfig(alpha=0.7, rows="generated"), PAIConfig(alpha=1.0, layers_to_transform=[1])),
    raised(torch.abs),
    {**COMMON, "means over heads": of_visual_keys(lambda scores: scores.abs().mean(1, keepdim=True))},
)
HGAI = Formula(
    (HGAIConfig(alpha=1.5), HGAIConfig(alpha=0.7, rows="generated"), HGAIConfig(alpha=1.0, layers_to_transform=[1])),
    raised(lambda scores: scores.abs().mean(1, keepdim=True)),
    {
        **COMMON,
        "each head by itself": of_visual_keys(torch.abs),
        "the size of the mean": of_visual_keys(lambda scores: scores.mean(1, keepdim=True).abs()),
    },
)

# ---- VAR


def redistributed(config: VARConfig, layers: list[int]) -> dict[str, Change]:
    """Row by row and head by head, on the weights of a layer."""

    def weigh(tokens: Tokens, layer_idx: int, weights: torch.Tensor) -> torch.Tensor:
        if layer_idx not in layers:
            return weights
        states = tokens.layer_inputs[layer_idx]
        normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        is_sink = (normed[..., config.sink_channels].abs() > config.tau).any(-1)
        changed = weights.clone()
        for row, query in acting_rows(tokens).nonzero().tolist():
            sinks, visual = is_sink[row], tokens.visual[row]
            others = visual & ~sinks
            for head in range(weights.shape[1]):
                old, new = weights[row, head, query], changed[row, head, query]
                of_sinks, of_image = old[visual & sinks].sum(), old[visual].sum()
                if 0 < of_sinks <= config.rho * of_image and of_image >= config.least_visual and old[others].sum() > 0:
                    new[sinks] = config.p * old[sinks]
                    new[others] += (1 - config.p) * old[sinks].sum() * old[others] / old[others].sum()
        return changed

    return {"weigh": weigh}


def by_group(
    groups: Callable[[torch.Tensor], torch.Tensor] | None = None,
    changes: Callable[[VARConfig, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    rows: str = "text",
) -> Callable[..., Stage]:
    """The method with other groups, or other changes, which are given those of the method and what groups have."""

    def stages(self: VARConfig, layer: SteeredLayer) -> Stage:
        def of_keys(call: AttentionCall) -> torch.Tensor:
            own = self.groups(call, layer.layer_idx)
            return own if groups is None else groups(own.clone())

        def of_groups(call: AttentionCall, found: torch.Tensor) -> torch.Tensor:
            own = self.changes(call, found)
            return own if changes is None else changes(self, own, found)

        return GroupWeights(of_keys, of_groups, rows=rows, num_changed=2)

    return stages


def of_all_heads(self: VARConfig, own: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return found[..., 1:3] / found[..., 1:2].masked_fill(found[..., 3:4] == 0, torch.inf)


def sinks_of_some_kind_keep_theirs(visual: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def groups(own: torch.Tensor) -> torch.Tensor:
        kept = (own[..., 3] > 0) == visual
        own[..., [0, 2]] *= ~kept.unsqueeze(-1)
        return own

    return groups


VAR = Formula(
    (
        VARConfig(sink_channels=[1, 29, 31], tau=1.5, rho=0.6, least_visual=0.1, p=0.1),
        VARConfig(sink_channels=[0, 2, 4], tau=1.2, rho=0.9, least_visual=0.0, p=0.1, layers_to_transform=[1]),
    ),
    redistributed,
    {
        "rows of the image too": by_group(rows="all"),
        "all heads": by_group(changes=of_all_heads),
        "text sinks keep theirs": by_group(sinks_of_some_kind_keep_theirs(visual=False)),
        "sinks of the image keep theirs": by_group(sinks_of_some_kind_keep_theirs(visual=True)),
        "what is freed is shared evenly": by_group(
            changes=lambda self, own, found: torch.cat(
                [own[..., :1], own[..., 1:].mean((1, 2), keepdim=True).expand_as(own[..., 1:])], -1
            )
        ),
        "sinks of layer 0": lambda self, layer: GroupWeights(
            lambda call: self.groups(call, 0), self.changes, rows="text", num_changed=2
        ),
    },
)

# ---- CAI


def entropy(tokens: Tokens, layer_idx: int, row: int, query: int) -> float:
    logits = tokens.exit(tokens.layer_inputs[layer_idx][row, query][None])[0]
    weights = logits.sort(descending=True).values[:10].softmax(-1).tolist()
    return -sum(weight * math.log(weight) for weight in weights) / math.log(10)


def intervened(config: CAIConfig, layers: list[int], ends: Sequence[int] = (-1,)) -> dict[str, Change]:
    """Row by row, on the scores of a layer."""

    def change(tokens: Tokens, layer_idx: int, scores: torch.Tensor) -> torch.Tensor:
        if layer_idx not in layers:
            return scores
        embeddings, length = tokens.layer_inputs[0], scores.shape[-1]
        factors = torch.zeros(len(scores), 1, *scores.shape[2:], dtype=scores.dtype)
        last = [end % length for end in ends]
        for row, query in acting_rows(tokens).nonzero().tolist():
            asking = embeddings[row, query]
            if config.rows == "generated":
                if query not in last:
                    continue
                piece = range(max((end + 1 for end in last if end < query), default=0), query + 1)
                if len(piece) > 1:
                    text = [place for place in piece if tokens.real[row, place] and not tokens.visual[row, place]]
                    asking = embeddings[row, text].mean(0)
            found = entropy(tokens, layer_idx, row, query)
            assert abs(found - config.threshold) > 1e-6, "a token is on the threshold"
            if found > config.threshold:
                keys = [key for key in range(query) if tokens.visual[row, key]]
                cosines = torch.stack([torch.cosine_similarity(asking, embeddings[row, key], 0) for key in keys])
                factors[row, 0, query, keys] = torch.sigmoid(config.slope * (cosines - cosines.min()))
        return scores + scores.abs() * factors

    return {"change": change}


def between_tokens(family: TinyVLM, conversations: Sequence[str], config: CAIConfig) -> CAIConfig:
    """The settings with a threshold that some tokens are above and others below, in the widest gap."""
    found: list[float] = []

    def note(tokens: Tokens, layer_idx: int, scores: torch.Tensor) -> torch.Tensor:
        found.extend(entropy(tokens, layer_idx, *place) for place in acting_rows(tokens).nonzero().tolist())
        return scores

    for conversation in conversations:
        inputs = family.inputs(reference := family.build(), conversation)
        with oracle(reference, inputs, change=note):
            logits(reference, in_double(inputs))
    found.sort()
    middle = found[len(found) // 4 : -(len(found) // 4)]
    low, high = max(itertools.pairwise(middle), key=lambda pair: pair[1] - pair[0])
    return replace(config, threshold=(low + high) / 2)


def with_changed(change: Callable[..., torch.Tensor]) -> Callable[..., Stage]:
    """The method with something else made of what it adds."""
    return lambda self, layer: Scores(
        lambda call, scores, queries: change(self, call, self.added(layer.layer_idx, call, scores, queries), queries),
        self.rows,
    )


CAI = Formula(
    (
        CAIConfig(slope=20, layers_to_transform=[1, 2]),
        CAIConfig(slope=5, rows="generated", layers_to_transform=[1, 2]),
        CAIConfig(layers_to_transform=[1]),
    ),
    intervened,
    {
        "every token": lambda self, layer: Scores(
            lambda call, scores, queries: (
                scores.abs() * torch.sigmoid(self.slope * self._above_least(call, scores.dtype, queries)).unsqueeze(1)
            )
        ),
        "all keys alike": lambda self, layer: Scores(
            lambda call, scores, queries: scores.abs() * (self.added(layer.layer_idx, call, scores, queries) != 0)
        ),
        "the first rows' tokens": lambda self, layer: Scores(
            lambda call, scores, queries: self.added(layer.layer_idx, call, scores, slice(0, scores.shape[2]))
        ),
        "no sizes": with_changed(lambda self, call, added, queries: -added),
    },
    between_tokens,
)

FORMULAS = {"vaf": VAF, "log_bias": LOG_BIAS, "pai": PAI, "hgai": HGAI, "var": VAR, "cai": CAI}


def layers_of(config: AttentionMethod, model: torch.nn.Module) -> list[int]:
    return config.layers_to_transform or config.default_layers(type(config).layers_on(find_vlm(model)))


def agrees_with_the_oracle(family: TinyVLM, formula: Formula, config: AttentionMethod) -> bool:
    model, config = family.build_precise(), formula.settled(family, BATCH, config)
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with oracle(family.build(), inputs, **formula.oracle(config, layers_of(config, model))) as reference:
        expected = logits(reference, in_double(inputs))[real]
    assert difference(expected, base.double()) > 100 * TOLERANCE
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, row in FORMULAS.items() for number in range(len(row.configs))]
)
def test_forward(family: TinyVLM, name: str, number: int):
    assert agrees_with_the_oracle(family, FORMULAS[name], FORMULAS[name].configs[number])


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, row in FORMULAS.items() for variant in (None, *row.wrong)]
)
def test_wrong_variants_are_noticed(plain: TinyVLM, name: str, variant: str | None, monkeypatch):
    config = FORMULAS[name].configs[0]
    if variant is not None:
        monkeypatch.setattr(type(config), "stages", FORMULAS[name].wrong[variant])
    assert agrees_with_the_oracle(plain, FORMULAS[name], config) == (variant is None)


def test_scores_that_are_raised_far_overflow_nothing(plain: TinyVLM):
    """On a fused kernel the weights are not at hand: what is added is far beyond what exp takes in fp32."""
    found = []
    for kernel in ("eager", "sdpa"):
        model = plain.build(attn_implementation=kernel)
        with attached(model, PAIConfig(alpha=5_000.0)):
            found.append(logits(model, plain.inputs(model, "t4 i t3 i t6")))
    assert found[0].isfinite().all()
    assert difference(*found) < TOLERANCE


def test_cosines_are_precise_under_autocast(plain: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    """CAI multiplies their differences by a hundred: they are what they are without autocast."""
    found, original = [], CAIConfig._above_least

    def twice(*args: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            found.append((original(*args), None))
        found[-1] = found[-1][0], original(*args)
        return found[-1][1]

    monkeypatch.setattr(CAIConfig, "_above_least", twice)
    model = plain.build()
    with attached(model, CAIConfig(threshold=0, layers_to_transform=[1])), torch.autocast("cpu"):
        logits(model, plain.inputs(model, "t4 i t3 i t6"))
    assert found
    assert all(torch.equal(expected, made) and made.dtype == torch.float32 for expected, made in found)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_equal_the_oracles(plain: TinyVLM, name: str, checkpointed: bool):
    formula = FORMULAS[name]
    model, config = plain.build(), formula.settled(plain, BATCH, formula.configs[0])
    inputs = plain.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    with oracle(plain.build(), inputs, **formula.oracle(config, layers_of(config, model))) as reference:
        reference(**in_double(inputs)).logits[real].square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if "k_proj" in name}
    if checkpointed:
        model.gradient_checkpointing_enable()
    with attached(model.train(), config):
        model(**inputs, use_cache=False).logits[real].square().mean().backward()
    found = {name: model.get_parameter(name).grad for name in expected}
    assert max(gradient.abs().max() for gradient in expected.values() if gradient is not None) > 1e-3
    for parameter, gradient in expected.items():
        if gradient is not None:
            assert difference(found[parameter].double(), gradient) < TOLERANCE, parameter


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, row in FORMULAS.items() for number in range(len(row.configs))]
)
def test_two_chats_in_turns_are_what_the_oracle_makes_of_each(tiny: TinyVLM, name: str, number: int):
    """Each on its cache: a prompt, an answer token by token, another image in the same chat, an answer, more text."""
    formula, chats = FORMULAS[name], ("t4 i t3 i t6", "t5 i i t4 i t8")
    config = formula.settled(tiny, chats, formula.configs[number])
    depends_on_ends = getattr(config, "rows", "text") == "generated"
    model = tiny.build()
    layers = layers_of(config, model)
    cuts, expected = [], []
    for chat, first in zip(chats, ("t4 i t3", "t5 i i t4")):
        whole = tiny.inputs(model, chat)
        cuts.append(ends_of_turns(tiny, model, first, chat))
        ends = {"ends": [place - 1 for place in cuts[-1][1:]]} if depends_on_ends else {}
        with oracle(tiny.build(), whole, **formula.oracle(config, layers, **ends)) as reference:
            expected.append(logits(reference, in_double(whole)))
    with attached(model, config):
        found = logits_in_turns(tiny, model, chats, cuts)
    for made, whole in zip(found, expected):
        assert difference(made.double(), whole) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (VAFConfig(), range(9, 15)),
        (PAIConfig(), range(2, 32)),
        (HGAIConfig(), range(5, 18)),
        (VARConfig(), range(2, 31)),
        (CAIConfig(), range(16, 32)),
        (LogBiasConfig(), range(32)),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_layers_are_the_papers(config: AttentionMethod, layers: range):
    assert config.default_layers(list(range(32))) == list(layers)
    of_three = config.default_layers([0, 1, 2])
    assert of_three
    assert set(of_three) <= {0, 1, 2}

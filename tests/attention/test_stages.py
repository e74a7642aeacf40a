"""What adapters do to one layer of attention: each kind of stage, and all of them together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from forwards import TOLERANCE, difference, in_double, logits
from methods_under_test import METHODS
from peft import PeftModel, get_peft_model
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.reference import ReferenceStages
from peft_pvm.attention.scores import Scores
from peft_pvm.attention.stages import (
    Bias,
    GroupWeights,
    KeyScale,
    Later,
    LayerStages,
    Positions,
    Stage,
    Values,
    Watch,
    Weights,
)
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tuners.attention_method import AttentionMethod, SteeredLayer
from peft_pvm.tuners.registry import register
from peft_pvm.utils.checks import setting


BATCH = ("t4 i t3 i t6", "t7 i t5", "t9")


def visual(inside: float, outside: float = 1.0):
    return lambda call: torch.where(call.visual_keys, inside, outside)


def counted(call: AttentionCall) -> torch.Tensor:
    """A number of each query that no dtype holds exactly: a thirtieth of its place, from 1 on."""
    first = call.context.past_length + call.context.seq_len - call.query.shape[2]
    return (torch.arange(call.query.shape[2])[None] + first + 1) / 30


class Swapped(Positions):
    """Scores as if key and query had each other's channels: no rotation does that, but the kind does not care."""

    def widen(self, call: AttentionCall):
        return call.query.flip(-1).repeat(1, 1, 1, 2) / 2, call.key.repeat(1, 1, 1, 2)

    def reference(self, call: AttentionCall) -> torch.Tensor:
        return call.query.flip(-1) @ call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1).mT


def sharper() -> Weights:
    return Weights(
        lambda call: call.run_kernel(scaling=2 * call.scaling),
        lambda call, scores, hidden: (2 * scores).masked_fill(hidden, -1e30).softmax(-1),
    )


def by_group() -> GroupWeights:
    """Visual keys get more the less a row looks at them, and the more it looks at text."""

    def groups(call: AttentionCall) -> torch.Tensor:
        return torch.stack([0.7 * call.visual_keys, ~call.visual_keys], -1)

    def changes(call: AttentionCall, found: torch.Tensor) -> torch.Tensor:
        return (1 - found[..., :1]) * found[..., 1:]

    return GroupWeights(groups, changes, num_changed=1)


def size(call: AttentionCall, scores: torch.Tensor, queries: slice) -> torch.Tensor:
    return 1.5 * scores.abs()


KINDS = {
    "scale": lambda: KeyScale(visual(1.5)),
    "scale-text": lambda: KeyScale(visual(1.3, 0.9), rows="text"),
    "values": lambda: Values(visual(0.5)),
    "values-text": lambda: Values(visual(2.0), rows="text"),
    "groups": by_group,
    "groups-text": lambda: replace(by_group(), rows="text"),
    "positions": Swapped,
    "bias": lambda: Bias(visual(0.7, 0.0)),
    "bias-text": lambda: Bias(visual(-0.4, 0.0), rows="text"),
    "bias-pairs": lambda: Bias(visual(0.9, 0.1), of_queries=counted),
    "bias-pairs-text": lambda: Bias(visual(-1.1, 0.0), rows="text", of_queries=counted),
    "weights": sharper,
    "scores": lambda: Scores(size),
    "scores-last": lambda: Scores(size, "generated"),
}
# Of which a layer has one at most.
ALL_WITHOUT = [("scores", "scores-last", "groups"), ("weights", "scores-last", "groups-text")]


@dataclass
class OwnConfig(AttentionMethod):
    """A user's own method, which does what its field names."""

    method: ClassVar[str] = "own"

    kind: str = setting("scale", "Which kind of stage it is.", among=KINDS)

    def stages(self, layer: SteeredLayer) -> Stage:
        return KINDS[self.kind]()


register(OwnConfig)


def attach(model: torch.nn.Module, *kinds: str) -> PeftModel:
    names = [f"own-{kind}" for kind in kinds]
    peft_model = get_peft_model(model, OwnConfig(kind=kinds[0]), names[0])
    for name, kind in zip(names[1:], kinds[1:]):
        peft_model.add_adapter(name, OwnConfig(kind=kind))
    peft_model.base_model.set_adapter(names)
    return peft_model.eval()


def on_whole_matrices(monkeypatch) -> None:
    monkeypatch.setattr(
        LayerStages, "attend", lambda self, call: ReferenceStages(self.stages, self.adapters).attend(call)
    )


def meet(kinds: tuple[str, ...]) -> bool:
    """Whether kinds may act in one layer."""
    done_by_one = [part for kind in kinds if (part := KINDS[kind]().done_by_one)]
    return len(done_by_one) == len(set(done_by_one))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3"])
@pytest.mark.parametrize(
    "kinds",
    [
        *((kind,) for kind in KINDS),
        *(tuple(kind for kind in KINDS if kind not in without) for without in ALL_WITHOUT),
    ],
    ids="+".join,
)
def test_a_kind_is_what_it_is_on_whole_matrices(kinds: tuple[str, ...], name: str, kernel: str, monkeypatch):
    """On a padded batch, in a prefill and in a step of decoding, alone and all together."""
    family = FAMILIES[name]
    model = family.build(attn_implementation=kernel)
    inputs, tolerance = family.inputs(model, *BATCH), TOLERANCE
    prompt = family.prompt(model, *BATCH[:2])
    if kernel == "sdpa":  # eager attention of the base makes NaN of padding in float64
        model, inputs, prompt, tolerance = model.double(), in_double(inputs), in_double(prompt), 1e-9
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    model = attach(model, *kinds)
    found = logits(model, inputs)[real]
    settings = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    answer = model.generate(**prompt, **settings)
    assert difference(found, base) > 1e-4
    on_whole_matrices(monkeypatch)
    assert difference(found, logits(model, inputs)[real]) < tolerance
    expected = model.generate(**prompt, **settings)
    assert difference(torch.stack(answer.logits), torch.stack(expected.logits)) < tolerance


@pytest.mark.parametrize(("conversation", "behind"), [("t3 i t9", 9), ("t3 i t2 i t4", 4), ("i", 0), ("t2 i", 0)])
@pytest.mark.parametrize("kind", ["scale-text", "values-text"])
def test_rows_that_are_all_changed_are_computed_once(kind: str, conversation: str, behind: int, monkeypatch):
    """Without padding, the kernel's plain output is made up to the last token that keeps it: here, of an image."""
    family = FAMILIES["llava"]
    model = family.build().double()
    inputs = in_double(family.inputs(model, conversation))
    lengths = set()
    first = AttentionCall.first

    def noted(call: AttentionCall, length: int) -> AttentionCall:
        lengths.add(call.query.shape[2] - length)
        return first(call, length)

    monkeypatch.setattr(AttentionCall, "first", noted)
    model = attach(model, kind)
    found = logits(model, inputs)
    assert lengths == {behind}
    on_whole_matrices(monkeypatch)
    assert difference(found, logits(model, inputs)) < 1e-9


@pytest.mark.parametrize("kinds", [pair for pair in itertools.combinations(KINDS, 2) if meet(pair)], ids="+".join)
def test_the_order_of_attaching_changes_nothing(kinds: tuple[str, ...], monkeypatch):
    family = FAMILIES["llava"]
    inputs = family.inputs(family.build(), *BATCH)
    real = inputs["attention_mask"].bool()
    one, other = (logits(attach(family.build(), *order), inputs)[real] for order in (kinds, kinds[::-1]))
    assert torch.equal(one, other)
    model = attach(family.build(), *kinds)
    on_whole_matrices(monkeypatch)
    assert difference(one, logits(model, inputs)[real]) < TOLERANCE


@dataclass(frozen=True)
class Seeing(Stage):
    """Keeps the calls that reach it."""

    calls: list[AttentionCall]

    def attend(self, call: AttentionCall, later: Later):
        self.calls.append(call)
        return torch.empty(0), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bias_has_twice_the_bits_of_the_dtype(dtype: torch.dtype):
    """Numbers of queries, of keys, and their products."""
    query, key = torch.zeros(1, 4, 40, 16, dtype=dtype), torch.zeros(1, 2, 50, 16, dtype=dtype)
    call = AttentionCall(None, query, key, key, None, VisualContext(None), "sdpa", {})
    of_queries, of_keys = (torch.arange(40)[None] * 7.7).log1p(), 0.3 + torch.arange(50)[None] / 37
    for of_rows in (None, lambda call: of_queries):
        calls: list[AttentionCall] = []
        Bias(lambda call: of_keys, of_queries=of_rows).attend(call, Later((Seeing(calls),)))
        wide_query, wide_key = (tensor.double()[:, :1] for tensor in calls[0].scored_by)
        assert wide_query.shape[-1] % 8 == 0
        expected = (1 if of_rows is None else of_queries.double().mT) * of_keys.double()
        error = difference(wide_query @ wide_key.mT * call.scaling, expected.expand(1, 1, 40, 50))
        roundoff = torch.finfo(dtype).eps / 2
        assert error < 4 * expected.max() * max(roundoff**2, torch.finfo(torch.float32).eps)


def test_two_key_scales_multiply():
    family = FAMILIES["llava"]
    inputs = family.inputs(family.build(), *BATCH)
    model = get_peft_model(family.build(), OwnConfig(kind="scale"), "one")
    model.add_adapter("other", OwnConfig(kind="scale"))
    model.base_model.set_adapter(["one", "other"])
    twice = logits(model, inputs)
    model.base_model.set_adapter(["one"])
    once = logits(model, inputs)
    assert difference(twice, once) > 10 * TOLERANCE
    squared = attach(family.build(), "scale")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "scale", lambda: KeyScale(visual(1.5**2)))
        assert difference(twice, logits(squared, inputs)) < TOLERANCE


CLASHES = {
    "positions": [DIPEConfig(max_distance=0, layers_to_transform=[1]), OwnConfig(kind="positions")],
    "weights": [TDRSConfig(layers_to_transform=[1]), OwnConfig(kind="weights")],
}


@pytest.mark.parametrize("rows", [("t4 i t6",), ("t9",)], ids=["image", "text alone"])
@pytest.mark.parametrize("own_first", [False, True], ids=["", "own first"])
@pytest.mark.parametrize("part", CLASHES)
def test_what_one_adapter_decides_another_cannot(part: str, own_first: bool, rows: tuple[str, ...]):
    family = FAMILIES["llava"]
    model = family.build()
    for config in reversed(CLASHES[part]) if own_first else CLASHES[part]:
        peft_model = get_peft_model(model, config, config.method)
    published = "dipe" if part == "positions" else "tdrs"
    first, second = ("own", published) if own_first else (published, "own")
    inputs = family.inputs(model, *rows)
    message = (
        f"The adapters '{first}' and '{second}' are active and both decide the {part} of attention in decoder layer 1"
    )
    with pytest.raises(ValueError, match=message):
        logits(model, inputs)
    with peft_model.disable_adapter():  # the last one alone
        assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("kind", ["positions", "weights", "groups", "scores"])
def test_two_of_a_users_own_are_refused(kind: str):
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(), OwnConfig(kind=kind), "one")
    model.add_adapter("other", OwnConfig(kind=kind))
    model.base_model.set_adapter(["one", "other"])
    with pytest.raises(ValueError, match="adapters 'one' and 'other' are active and both decide"):
        logits(model, family.inputs(model.get_base_model(), "t4 i t6"))


@pytest.mark.parametrize(
    ("published", "kind"),
    [
        (published, kind)
        for published, own in (("dipe", "positions"), ("tdrs", "weights"))
        for kind in KINDS
        if kind not in ("positions", "weights") and KINDS[kind]().done_by_one != own
    ],
)
def test_other_kinds_go_with_the_published(published: str, kind: str, monkeypatch):
    """Both act, as on whole matrices."""
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    alone = logits(METHODS[published].attach(model, published), inputs)[real]
    get_peft_model(model, OwnConfig(kind=kind), "own")
    together = logits(model, inputs)[real]
    assert difference(together, alone) > 10 * TOLERANCE
    on_whole_matrices(monkeypatch)
    assert difference(together, logits(model, inputs)[real]) < 2 * TOLERANCE


@pytest.mark.parametrize(("published", "kind"), [("dipe", "weights"), ("tdrs", "positions")])
def test_positions_and_weights_go_together(published: str, kind: str, monkeypatch):
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    METHODS[published].attach(model, published)
    get_peft_model(model, OwnConfig(kind=kind), "own")
    together = logits(model, inputs)[real]
    on_whole_matrices(monkeypatch)
    assert difference(together, logits(model, inputs)[real]) < 2 * TOLERANCE


def test_several_adapters_of_dipe_make_a_union():
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(), DIPEConfig(max_distance=0, layers_to_transform=[0, 1]), "one")
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    model.add_adapter("other", DIPEConfig(max_distance=0, layers_to_transform=[1, 2]))
    model.base_model.set_adapter(["one", "other"])
    union = get_peft_model(family.build(), DIPEConfig(max_distance=0, layers_to_transform=[0, 1, 2]))
    assert torch.equal(logits(model, inputs), logits(union, inputs))


@pytest.mark.parametrize("kernel", [{"attn_implementation": "eager"}, {}], ids=["eager", "its own"])
def test_the_weights_of_the_last_row_are_read(family: TinyVLM, kernel: dict, monkeypatch: pytest.MonkeyPatch):
    """By `Watch`: those of the model's own queries and keys, whatever another stage makes of the keys."""
    model = family.build(attn_implementation="eager")
    inputs = family.inputs(model, "t4 i t3 i t6", "i t9", "t9")
    with torch.no_grad():
        weights = iter(model(**inputs, output_attentions=True, use_cache=False).attentions)
    model, seen = family.build(**kernel).requires_grad_(False), {}
    monkeypatch.setitem(
        KINDS, "watch", lambda: Watch(lambda call: seen.update({call.module.layer_idx: call.last_row_weights()}))
    )
    base, rows = logits(model, inputs), inputs["attention_mask"][:, -1].bool()
    model = attach(model, "watch")
    assert torch.equal(logits(model, inputs), base)
    for layer_idx in sorted(seen):
        own = next(weights)[:, :, -1]
        assert difference(seen[layer_idx][rows], own[rows]) < TOLERANCE, layer_idx
    first, before = min(seen), dict(seen)
    logits(attach(family.build(**kernel), "scale", "watch"), inputs)
    assert torch.equal(seen[first], before[first])

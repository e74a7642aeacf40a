"""Agreement of MemVR with an independent computation in float64, token by token, on every family."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from ffn_outputs import changing_ffns, ffn_of, text_model_of
from forwards import difference, ends_of_turns, in_double, logits, logits_in_turns
from methods_under_test import give_weight
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import FAMILIES, IMAGE, VIDEO, TinyVLM
from torch import nn

from peft_pvm import MemVRConfig, PVMConfig, attached
from peft_pvm.methods import memvr
from peft_pvm.tokens.early_exit import EarlyExit
from peft_pvm.tuners.ffn_method import FFNStep


pytestmark = pytest.mark.every_family
BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


class Retracing:
    """The formula on a whole forward, written from the paper and the authors' code: hooks on a model in float64.

    Attributes:
        turns: By token, `(row, column)`, the layer in which the image was mixed in.
        entropies: All that were asked for.
    """

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], config: MemVRConfig, ends: Sequence[int] = (-1,)):
        self.model, self.config = model, config
        self.text_model = text_model_of(model)
        self.shape = inputs["input_ids"].shape
        self.layers = config.layers_to_transform
        self.visual = torch.isin(inputs["input_ids"], torch.tensor((IMAGE, VIDEO)))
        self.rows = inputs["attention_mask"].bool() & ~self.visual & (self.visual.cumsum(1) > 0)
        if config.rows == "generated":
            is_end = torch.zeros(self.rows.shape[1], dtype=torch.bool)
            is_end[list(ends)] = True
            self.rows = self.rows & is_end
        self.turns: dict[tuple[int, int], int] = {}
        self.entropies: list[float] = []
        self.now: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def acting(self) -> Iterator[Retracing]:
        handles = [self.text_model.register_forward_pre_hook(self.start, with_kwargs=True)]
        for layer_idx in self.layers:
            layer = self.text_model.layers[layer_idx]
            handles += [
                layer.register_forward_pre_hook(lambda module, args: self.now.update(entering=args[0])),
                ffn_of(layer).register_forward_pre_hook(
                    lambda module, args: self.now.update(x=args[0].view(*self.shape, -1))
                ),
            ]
        try:
            with changing_ffns(self.model, self.layers, self.shape, self.mix):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.now = {"embeds": kwargs["inputs_embeds"].detach()}

    def mix(self, layer_idx: int, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        for row, column in self.rows.nonzero().tolist():
            if self.turns.get((row, column), layer_idx) != layer_idx:
                continue
            self.entropies.append(self.entropy(self.now["entering"][row, column]))
            if self.entropies[-1] > self.config.threshold:
                self.turns[row, column] = layer_idx
                x, before = self.now["x"][row, column], self.visual[row, :column].nonzero().flatten()
                image = sum(torch.dot(x, z) * z for z in self.now["embeds"][row, before])
                f, ratio = output[row, column], self.config.ratio
                changed[row, column] = (1 - ratio) * f + ratio * f.abs().mean() / image.abs().mean() * image
        return changed

    def entropy(self, hidden_state: torch.Tensor) -> float:
        with torch.no_grad():
            scores = self.model.get_output_embeddings()(self.text_model.norm(hidden_state[None]))[0]
        softcap = getattr(self.text_model.config, "final_logit_softcapping", None)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = [math.exp(score) for score in (scores - scores.max()).sort(descending=True).values[:10].tolist()]
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights) / math.log(10)


def undecided_enough(family: TinyVLM, conversations: Sequence[str], **fields: Any) -> MemVRConfig:
    """Settings by which tokens have their turn in several layers, and none nearly has."""
    reference = family.build()
    every_layer = list(range(len(text_model_of(reference).layers)))
    config = MemVRConfig(**{"ratio": 0.5, "layers_to_transform": every_layer, **fields})
    found: list[float] = []
    for conversation in conversations:
        inputs = family.inputs(reference, conversation)
        with (
            oracle(reference, inputs),
            Retracing(reference, inputs, dataclasses.replace(config, threshold=1)).acting() as acting,
        ):
            logits(reference, in_double(inputs))
        found += acting.entropies
    found.sort()
    middle = found[len(found) // 4 : -(len(found) // 4)]
    low, high = max(itertools.pairwise(middle), key=lambda pair: pair[1] - pair[0])
    return dataclasses.replace(config, threshold=(low + high) / 2)


def expected(
    family: TinyVLM, inputs: dict[str, torch.Tensor], config: MemVRConfig, ends: Sequence[int] = (-1,)
) -> tuple[torch.Tensor, Retracing]:
    with oracle(family.build(), inputs) as reference, Retracing(reference, inputs, config, ends).acting() as acting:
        found = logits(reference, in_double(inputs))
    assert min(abs(entropy - config.threshold) for entropy in acting.entropies) > 1e-6, "a token is on the threshold"
    return found, acting


def agrees(family: TinyVLM, config: MemVRConfig, batch: Sequence[str] = BATCH) -> bool:
    model = family.build_precise()
    inputs = family.inputs(model, *batch)
    real = inputs["attention_mask"].bool()
    whole, _ = expected(family, inputs, config)
    assert difference(whole[real], logits(model, inputs)[real].double()) > 100 * TOLERANCE
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), whole[real]) < TOLERANCE


def test_forward(family: TinyVLM):
    assert agrees(family, undecided_enough(family, BATCH[:3]))


def test_tokens_have_their_turns_in_several_layers(plain: TinyVLM):
    """What the other tests stand on."""
    config = undecided_enough(plain, BATCH[:3])
    inputs = plain.inputs(plain.build(), *BATCH)
    _, acting = expected(plain, inputs, config)
    assert len(set(acting.turns.values())) > 1


def in_step(**changes: Callable[[FFNStep], Any]) -> tuple[str, Callable[..., Any]]:
    """The method given something else."""
    changed = MemVRConfig.changed

    def wrong(self: MemVRConfig, step: FFNStep) -> torch.Tensor | None:
        return changed(self, dataclasses.replace(step, **{name: of_step(step) for name, of_step in changes.items()}))

    return "changed", wrong


def own_entropy(of_scores: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, Callable[..., Any]]:
    def undecided(self: EarlyExit, states: torch.Tensor, threshold: float, among: torch.Tensor) -> torch.Tensor:
        return among & (of_scores(self.logits(states).softmax(-1)) > threshold)

    return "undecided", undecided


def means_of_all(self: MemVRConfig, step: FFNStep, positions: torch.Tensor) -> torch.Tensor:
    embeddings = step.context.memory.embeddings
    image = step.ffn_input @ embeddings.transpose(1, 2) @ embeddings
    image = image * step.output.abs().mean() / image.abs().mean()
    return memvr.gather_rows((1 - self.ratio) * step.output + self.ratio * image, positions)


WRONG = {
    "in every layer": in_step(handed_on=lambda step: {}),
    "judged behind the FFN": in_step(entering=lambda step: step.entering + step.output),
    "of the stream as it is": in_step(ffn_input=lambda step: step.entering),
    "entropy over all tokens": own_entropy(
        lambda weights: -(weights * weights.log()).sum(-1) / math.log(weights.shape[-1])
    ),
    "ten likeliest as they are": own_entropy(
        lambda weights: -(weights.topk(10).values * weights.topk(10).values.log()).sum(-1) / math.log(10)
    ),
    "means over all tokens": ("_mixed_at", means_of_all),
}


@pytest.mark.parametrize("variant", [None, *WRONG])
def test_wrong_variants_are_noticed(plain: TinyVLM, variant: str | None, monkeypatch: pytest.MonkeyPatch):
    config = undecided_enough(plain, BATCH[:3])
    if variant is not None:
        monkeypatch.setattr(EarlyExit if WRONG[variant][0] == "undecided" else MemVRConfig, *WRONG[variant])
    assert agrees(plain, config) == (variant is None)


def test_images_behind_a_token_say_nothing_of_it(plain: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    config = undecided_enough(plain, BATCH[:3])
    monkeypatch.setattr(memvr, "causally_visible", lambda slots, positions: (slots >= 0).unsqueeze(1))
    assert not agrees(plain, config)


@pytest.mark.parametrize("rows", ["text", "generated"])
def test_two_chats_in_turns_are_what_the_oracle_makes_of_each(tiny: TinyVLM, rows: str):
    """Each on its cache: a prompt, an answer token by token, another image in the same chat, an answer, more text."""
    chats = ("t4 i t3 i t6", "t5 i i t4 i t8")
    config = undecided_enough(tiny, chats, rows=rows)
    model = tiny.build()
    cuts, whole = [], []
    for chat, first in zip(chats, ("t4 i t3", "t5 i i t4")):
        inputs = tiny.inputs(model, chat)
        cuts.append(ends_of_turns(tiny, model, first, chat))
        whole.append(expected(tiny, inputs, config, [stop - 1 for stop in cuts[-1][1:]])[0])
    with attached(model, config):
        found = logits_in_turns(tiny, model, chats, cuts)
    for made, of_oracle in zip(found, whole):
        assert difference(made.double(), of_oracle) < TOLERANCE


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_gradients_equal_the_oracles(plain: TinyVLM, checkpointed: bool):
    """A layer that runs again for the backward pass decides what it decided before."""
    config = undecided_enough(plain, BATCH[:3])
    model = plain.build()
    inputs = plain.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    with oracle(plain.build(), inputs) as reference, Retracing(reference, inputs, config).acting():
        reference(**in_double(inputs)).logits[real].square().mean().backward()
    of_oracle = {name: p.grad for name, p in reference.named_parameters() if "q_proj" in name and p.grad is not None}
    if checkpointed:
        model.gradient_checkpointing_enable()
    with attached(model.train(), config):
        model(**inputs, use_cache=False).logits[real].square().mean().backward()
    assert max(gradient.abs().max() for gradient in of_oracle.values()) > 1e-3
    for name, gradient in of_oracle.items():
        assert difference(model.get_parameter(name).grad.double(), gradient) < TOLERANCE, name


def test_many_tokens_are_computed_a_few_at_a_time(plain: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memvr, "PRODUCTS_AT_ONCE", 1)
    monkeypatch.setattr("peft_pvm.tokens.early_exit.LOGITS_AT_ONCE", 1)
    assert agrees(plain, undecided_enough(plain, BATCH[:3]))


def test_it_is_given_the_ffns_own_output():
    """And not what PVM adds to it, whichever was attached first; and neither takes the other for a broken layer."""
    family = FAMILIES["llava"]
    configs = {"memvr": MemVRConfig(threshold=0), "pvm": PVMConfig(r=32, layers_to_transform=[0, 1])}
    found = []
    for names in (("memvr",), ("memvr", "pvm"), ("pvm", "memvr")):
        model = family.build()
        for name in names:
            model.add_adapter(configs[name], adapter_name=name)
        model.set_adapter(list(names))
        give_weight(model)
        found.append(logits(model, family.inputs(model, *BATCH)))
    assert difference(found[0], found[1]) > 100 * TOLERANCE
    assert torch.equal(found[1], found[2])


def test_layers_are_the_papers():
    """Layers 6 to 15 are judged behind them in the authors' code, and the FFN of the next one acts."""
    assert MemVRConfig().default_layers(list(range(32))) == list(range(7, 17))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "ratio is 1.5, but must be a number from 0 to 1"),
        ({"threshold": -1}, "threshold is -1, but must be a number from 0 to 1"),
        ({"rows": "all"}, "rows is 'all', but must be one of"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MemVRConfig(**fields)


def test_layers_that_there_are_not_are_refused():
    model = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=r"names layers \[99\], but the text model has only 3 layers"):
        get_peft_model(model, MemVRConfig(layers_to_transform=[1, 99]))


def test_a_model_without_a_head_is_refused():
    model = FAMILIES["llava"].build().model
    with pytest.raises(ValueError, match="it has no head"):
        get_peft_model(model, MemVRConfig())


def test_large_features_do_not_overflow_under_autocast():
    """Features of real models are hundreds large. Their products are sums of thousands of them."""
    family = FAMILIES["llava"]
    model = family.build()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(100)
    inputs = family.inputs(model, "t4 i i i i t6")
    with attached(model, MemVRConfig(threshold=0, ratio=0.5)):
        expected = logits(model, inputs)
        with torch.autocast("cpu", dtype=torch.float16):
            found = logits(model, inputs)
    assert difference(found, expected) < 0.02

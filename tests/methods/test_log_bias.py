"""Agreement of the log-bias with an independent computation in float64, on every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from forwards import difference, in_double, logits
from oracle import ByPair, Tokens, oracle
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import LogBiasConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.stages import Bias, KeyScale, Stage
from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


def added(config: LogBiasConfig, layers: list[int]) -> ByPair:
    """What is added to scores, pair by pair, with tokens counted one by one."""

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

    return bias


def agrees_with_the_oracle(family: TinyVLM, config: LogBiasConfig) -> bool:
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    layers = config.layers_to_transform or LogBiasConfig.layers_on(find_vlm(model))
    with oracle(family.build(), inputs, bias=added(config, layers)) as reference:
        expected = logits(reference, in_double(inputs))[real]
    assert difference(expected, base.double()) > 100 * TOLERANCE
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), expected) < TOLERANCE


@pytest.mark.parametrize("config", [LogBiasConfig(t0=0.7), LogBiasConfig(t0=3, layers_to_transform=[1])])
def test_forward(family: TinyVLM, config: LogBiasConfig):
    assert agrees_with_the_oracle(family, config)


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


WRONG = {
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
}


@pytest.mark.parametrize("variant", [None, *WRONG])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_wrong_variants_are_noticed(name: str, variant: str | None, monkeypatch):
    if variant is not None:
        monkeypatch.setattr(LogBiasConfig, "stages", WRONG[variant])
    assert agrees_with_the_oracle(FAMILIES[name], LogBiasConfig(t0=0.7)) == (variant is None)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_gradients_equal_the_oracles(name: str, checkpointed: bool):
    family, config = FAMILIES[name], LogBiasConfig(t0=0.7)
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    bias = added(config, LogBiasConfig.layers_on(find_vlm(model)))
    with oracle(family.build(), inputs, bias=bias) as reference:
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


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3"])
def test_two_chats_in_turns_are_what_the_oracle_makes_of_each(name: str):
    """Each on its cache: a prompt, an answer token by token, another image in the same chat, an answer again."""
    family, config = FAMILIES[name], LogBiasConfig(t0=0.7)
    chats = ("t4 i t3 i t6", "t5 i i t4 i t8")
    model = family.build()
    bias = added(config, LogBiasConfig.layers_on(find_vlm(model)))
    expected = []
    for chat in chats:
        whole = family.inputs(model, chat)
        with oracle(family.build(), whole, bias=bias) as reference:
            expected.append(logits(reference, in_double(whole)))
    cuts = [[0, family.inputs(model, first)["input_ids"].shape[1]] for first in ("t4 i t3", "t5 i i t4")]
    for chat, places in zip(expected, cuts):
        length = chat.shape[1]
        places[1:] = [places[1] - 2, places[1] - 1, *places[1:], *range(length - 3, length + 1)]
    caches, found = [None, None], [[], []]
    with attached(model, config), torch.no_grad():
        for turn in range(len(cuts[0]) - 1):
            for number, chat in enumerate(chats):
                piece = family.inputs(model, chat, start=cuts[number][turn], stop=cuts[number][turn + 1])
                output = model(**piece, **{CACHE: caches[number]}, use_cache=True)
                caches[number] = output[CACHE]
                found[number].append(output.logits)
    for pieces, whole in zip(found, expected):
        assert difference(torch.cat(pieces, 1).double(), whole) < TOLERANCE


def test_the_default_does_not_act_on_text_alone_and_does_behind_an_image():
    family = FAMILIES["llava"]
    model = family.build()
    inputs = [family.inputs(model, conversation) for conversation in ("t9", "t4 i t9")]
    base = [logits(model, each) for each in inputs]
    with attached(model, LogBiasConfig()):
        text, image = (logits(model, each) for each in inputs)
    assert torch.equal(text, base[0])
    assert difference(image, base[1]) > 1e-4


def test_padding_behind_text_spoils_nothing():
    """It may be given any position, so that it stands before the image."""
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, "t7 i t5")
    with attached(model, LogBiasConfig(t0=0.7)):
        alone = logits(model, inputs)
        padded = {name: torch.nn.functional.pad(inputs[name], (0, 3)) for name in ("input_ids", "attention_mask")}
        positions = torch.nn.functional.pad(inputs["position_ids"], (0, 3), value=1)
        found = logits(model, {**inputs, **padded, "position_ids": positions})
    assert difference(found[:, : alone.shape[1]], alone) < TOLERANCE


def test_a_model_that_bends_its_scores_is_refused():
    family = FAMILIES["paligemma2"]
    config = family.config()
    config.text_config.attn_logit_softcapping = 50.0
    model = replace(family, config=lambda: config).build(attn_implementation="eager")
    inputs = family.inputs(model, *BATCH)
    with attached(model, LogBiasConfig()), pytest.raises(NotImplementedError, match="bends its scores"):
        logits(model, inputs)


@pytest.mark.parametrize("t0", [0, -1, None, "128", True])
def test_t0_is_a_number_above_0(t0):
    with pytest.raises(ValueError, match=r"LogBiasConfig.t0 is .*, but must be a number above 0"):
        LogBiasConfig(t0=t0)

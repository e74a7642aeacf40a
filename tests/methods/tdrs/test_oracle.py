"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from environment import on_a_cpu
from forwards import difference, in_double, logits
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import TDRSConfig, attached
from peft_pvm.methods.tdrs import blockwise, method
from peft_pvm.methods.tdrs.weights import boost_that_falls, reweighted
from peft_pvm.tokens.visibility import Visibility


pytestmark = pytest.mark.every_family
BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "sd": {"dc_strength": 0.0, "re_strength": 0.0, "sd_strength": 3.0},
    "dc": {"sd_strength": 0.0, "re_strength": 0.0},
    "re": {"sd_strength": 0.0, "dc_strength": 0.0, "re_strength": 0.8},
    "plain-floors": {"dc_floor": 0.1, "re_floor": 0.3},
    "mixed-floors": {"dc_floor": 0.1},
    "large-multiple": {"dc_floor": "50*min", "re_floor": "40.5*min"},
    "inter": {"pairs": "inter"},
    "logits": {"form": "logits"},
    "logits-inter": {"form": "logits", "pairs": "inter", "dc_floor": 0.2},
    "literal": {"form": "literal"},
    "literal-sd": {"form": "literal", "dc_strength": 0.0, "re_strength": 0.0},
    "literal-without-sd": {"form": "literal", "sd_strength": 0.0},
    "literal-inter": {"form": "literal", "pairs": "inter", "dc_floor": 0.2},
}


def check(family: TinyVLM, config: TDRSConfig, batch: tuple[str, ...] = BATCH) -> None:
    model = family.build_precise()
    inputs = family.inputs(model, *batch)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with oracle(family.build(), inputs, tdrs=config) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = logits(get_peft_model(model, config), inputs)[real]
    assert difference(expected, base.double()) > 100 * TOLERANCE
    assert difference(computed.double(), expected) < TOLERANCE


def test_every_family(family: TinyVLM):
    check(family, TDRSConfig())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3"])
def test_every_setting(name: str, case: str):
    check(FAMILIES[name], TDRSConfig(**CASES[case]))


def test_the_literal_sum_counts_scores_twice():
    """softmax(2 s + sem + s (w + 0.8 r)), where "logits" has s once; without SD-DRS, both are the same."""
    generator = torch.Generator().manual_seed(0)
    scores, similarity = (torch.randn(1, 2, 5, 7, generator=generator) for _ in range(2))
    similarity = similarity.tanh()
    distance = torch.arange(7).float().expand(5, 7)
    nothing = torch.zeros(1, 2, 5, 7, dtype=torch.bool)

    def weights(form: str, **fields) -> torch.Tensor:
        config = TDRSConfig(form=form, dc_floor=0.1, re_floor=0.2, **fields)
        return reweighted(config, scores, similarity, distance, nothing, None)

    twice = (weights("logits").log() + scores).softmax(-1)
    assert difference(weights("literal"), twice) < 1e-6
    alone = (2 * scores + (similarity + 1) / 2).softmax(-1)
    assert difference(weights("literal", dc_strength=0.0, re_strength=0.0), alone) < 1e-6
    assert torch.equal(weights("literal", sd_strength=0.0), weights("logits", sd_strength=0.0))


def test_every_strength_zero_is_the_base(family: TinyVLM):
    base = family.build()
    inputs = family.inputs(base, *BATCH)
    expected = logits(base, inputs)
    with attached(base, TDRSConfig(sd_strength=0.0, dc_strength=0, re_strength=0.0)):
        assert torch.equal(logits(base, inputs), expected)


def _unscaled(scale, *rest):
    """Distance in place of distance by similarity."""
    return boost_that_falls(torch.ones_like(scale), *rest)


def _linear(scale, distance, *rest):
    """The square root of distance in place of distance."""
    return boost_that_falls(scale, distance.abs().sqrt() * distance.sign(), *rest)


def _in_slots(visibility):
    """Padding counted as distance."""
    keys = torch.arange(visibility.num_keys)[None, None].clamp(min=3) * 2
    return keys, keys[..., visibility.columns]


def _no_turn(tables, *_):
    """Content with its position."""
    cosines, sines = tables
    return torch.ones_like(cosines), torch.zeros_like(sines)


WRONG = {
    "unscaled distance": (blockwise, "boost_that_falls", _unscaled),
    "another power of distance": (blockwise, "boost_that_falls", _linear),
    "similarity not shifted": (blockwise, "SEMANTIC_POSITION", (1.0, 0.0)),
    "padding counted": (Visibility, "ranks", _in_slots),
    "rotation left in": (method, "inverse", _no_turn),
}


@on_a_cpu
@pytest.mark.parametrize("variant", WRONG)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_wrong_variants_are_noticed(name: str, variant: str, monkeypatch):
    monkeypatch.setattr(*WRONG[variant])
    with pytest.raises(AssertionError):
        check(FAMILIES[name], TDRSConfig())


def test_layers_with_masks_of_their_own():
    """Longer than a chunk of Llama 4 and a window of the others: layers see different keys."""
    for name in ("llama4", "gemma3", "aya_vision"):
        check(FAMILIES[name], TDRSConfig(), batch=("i t80", "t9 i t60"))

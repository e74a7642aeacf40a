"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import difference, in_double, logits
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import TDRSConfig


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
}


def check(family: TinyVLM, config: TDRSConfig) -> None:
    model = family.build()
    inputs = family.inputs(model, *BATCH)
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

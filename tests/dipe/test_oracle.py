"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

import pytest
from conftest import difference, in_double, logits
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import TinyVLM

from peft_pvm import DIPEConfig


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


@pytest.mark.parametrize("dipe", [False, True], ids=["base", "dipe"])
def test_forward(family: TinyVLM, dipe: bool):
    """Without DIPE, this shows that the oracle is one."""
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with oracle(family.build(), inputs, dipe) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = logits(get_peft_model(model, DIPEConfig()), inputs)[real] if dipe else base
    if dipe:
        assert difference(expected, base.double()) > 1000 * TOLERANCE
    assert difference(computed.double(), expected) < TOLERANCE

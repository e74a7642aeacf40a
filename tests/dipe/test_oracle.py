"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

import pytest
import torch
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


def test_positions_of_padding_do_not_matter(family: TinyVLM):
    """Padding belongs to no run: the first one begins with the first real token."""
    model = get_peft_model(family.build(), DIPEConfig())
    inputs = family.inputs(model.get_base_model(), *BATCH)
    real = inputs["attention_mask"].bool()
    expected = logits(model, inputs)[real]
    inputs["position_ids"] = torch.where(real, inputs["position_ids"], 17)
    assert difference(logits(model, inputs)[real], expected) < TOLERANCE

"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

import pytest
from forwards import difference, in_double, logits
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import IMAGE, VIDEO, TinyVLM

from peft_pvm import DIPEConfig


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


@pytest.mark.parametrize(
    "dipe", [None, DIPEConfig(max_distance=0), DIPEConfig(max_distance=3)], ids=["base", "dipe", "limited"]
)
def test_forward(family: TinyVLM, dipe: DIPEConfig | None):
    """Without DIPE, this shows that the oracle is one."""
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with oracle(family.build(), inputs, dipe) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = base
    if dipe is not None:
        computed = logits(get_peft_model(model, dipe), inputs)[real]
        assert difference(expected, base.double()) > 1000 * TOLERANCE
    assert difference(computed.double(), expected) < TOLERANCE


def test_padding_belongs_to_no_run(family: TinyVLM):
    """Padding right after an image: the text run begins with the first real token behind it."""
    model = family.build()
    inputs = family.inputs(model, "t4 i t9")
    ids = inputs["input_ids"][0]
    after = int(((ids == IMAGE) | (ids == VIDEO)).nonzero().max()) + 1
    inputs["attention_mask"][0, after : after + 2] = 0
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=DIPEConfig(max_distance=0)) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = logits(get_peft_model(model, DIPEConfig(max_distance=0)), inputs)[real]
    assert difference(computed.double(), expected) < TOLERANCE

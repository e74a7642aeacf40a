"""Every method under `torch.autocast`, which computes some operations in half precision and others not."""

from __future__ import annotations

import pytest
import torch
from forwards import logits
from methods_under_test import METHODS
from tiny_vlms import FAMILIES


@pytest.mark.parametrize("rows", [["t4 i t3 i t20"], ["t4 i t3 i t20", "i t9"]], ids=["one row", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_it_differs_by_rounding_and_off_is_off(name: str, rows: list[str]):
    family = FAMILIES["llava"]
    model = METHODS[name].attach(family.build())
    inputs = family.inputs(model.get_base_model(), *rows)
    real = inputs["attention_mask"].bool()
    with model.disable_adapter():
        plain = logits(model, inputs)
    exact = logits(model, inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        on = logits(model, inputs)
        with model.disable_adapter():
            off = logits(model, inputs)
        base = logits(model.unload(), inputs)
    assert torch.equal(off, base)
    rounding, wrong, effect = (each[real].abs().mean() for each in (off - plain, on - exact, exact - plain))
    assert wrong < 3 * rounding < effect

"""Layers that hide more than padding: distances are those between all real tokens, whatever keys are chosen."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from forwards import TOLERANCE, difference, generate
from methods_under_test import METHODS

from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.keys import Keys


def test_a_static_cache_changes_nothing():
    """`generate` makes masks beforehand for it, and what a query sees in a step does not say what is padding."""
    tiny = ARCHITECTURES["mistral_large4"].tiny
    model = METHODS["tdrs"].attach(tiny.build())
    logits = [
        torch.stack(generate(tiny, model, "t4 i t3 i t6", "t7 i t5", **cache).logits).clamp(min=-1e4)
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert difference(*logits) < TOLERANCE


REAL = torch.tensor([[0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("num_keys", [6, 4])
@pytest.mark.parametrize("form", ["two axes", "four axes", "by layer type", "none"])
def test_padding_is_looked_up_in_the_models_mask(form: str, num_keys: int):
    """The last two tokens are queries; a window may have left their layer fewer keys."""
    causal = torch.ones(6, 6, dtype=torch.bool).tril() & REAL.bool()
    whole = causal[None, None, -2:, -num_keys:]
    masks = {"two axes": REAL, "four axes": whole, "by layer type": {"window": whole[..., :2], "all": whole}}
    context = VisualContext(None, masks.get(form))
    context.past_length, context.seq_len = 4, 2
    padding = Keys(context, num_keys).padding(2)
    of_keys, of_queries = padding.ranks()
    before = 0 if form == "none" or num_keys == 4 else 1
    assert of_keys[0, 0, before:].tolist() == list(range(num_keys - before))
    assert of_queries[0, 0].tolist() == [num_keys - before - 2, num_keys - before - 1]


def test_a_mask_of_other_keys_says_nothing():
    context = VisualContext(None, {"window": torch.ones(1, 1, 2, 3, dtype=torch.bool)})
    context.past_length, context.seq_len = 4, 2
    assert Keys(context, 6).padding(2) is None

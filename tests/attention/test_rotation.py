"""Rotations by the model's own functions, on every family: they add up, keep lengths and can be undone."""

from __future__ import annotations

import functools

import pytest
import torch
from forwards import TOLERANCE, difference
from tiny_vlms import TinyVLM
from torch import nn

from peft_pvm.attention import rotation
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.rotation import between, may_scale, rotate, rotation_tables, turned_by_matrix
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.families import find_vlm


pytestmark = pytest.mark.every_family


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_rotations(family: TinyVLM, factor: float):
    """Also where the rotary embedding multiplies attention by a factor, as YaRN does."""
    vlm = find_vlm(family.build())
    rotary = vlm.rotary
    for name in [name for name in vars(rotary) if name.endswith("attention_scaling")]:
        setattr(rotary, name, factor)
    generator = torch.Generator().manual_seed(0)
    axes = 3 if "mrope_section" in vlm.text_config.rope_parameters else 1
    one, other = (torch.randint(-50, 50, (2, 5, axes), generator=generator) for _ in range(2))
    for layer_idx, attention in vlm.self_attentions.items():
        if not vlm.rotates(attention):
            continue
        states = torch.randn(2, 4, 5, attention.head_dim, generator=generator)
        layer_type = vlm.layer_type(layer_idx)
        by_one, by_other, by_both = (rotation_tables(rotary, p, layer_type) for p in (one, other, one + other))
        is_scaled = may_scale(rotary, layer_type)
        assert is_scaled == (factor != 1)
        unit, inverse = (functools.partial(turn, is_scaled=is_scaled) for turn in (rotation.unit, rotation.inverse))
        turned = rotate(attention, states, unit(by_one))
        assert difference(turned, states) > 0.1
        assert difference(turned.norm(dim=-1), states.norm(dim=-1)) < TOLERANCE
        assert difference(rotate(attention, turned, unit(by_other)), rotate(attention, states, unit(by_both))) < 1e-4
        assert difference(rotate(attention, rotate(attention, states, by_one), inverse(by_one)), states) < TOLERANCE
        tail = rotate(attention, states[:, :, -2:], between(unit(by_one), -2, None))
        assert difference(tail, turned[:, :, -2:]) < TOLERANCE
        assert rotate(attention, states.bfloat16(), by_one).dtype == torch.bfloat16


def test_factors_of_layer_types_are_told_apart():
    """A factor that is not known, or that a rotary embedding has beside the one that all have, may be any."""
    rotary = nn.Module()
    assert may_scale(rotary, None)
    rotary.sliding_attention_scaling, rotary.full_attention_scaling = 1.0, 1.5
    assert not may_scale(rotary, "sliding")
    assert may_scale(rotary, "full")
    rotary.attention_scaling = 1.0
    assert not may_scale(rotary, None)
    assert not may_scale(rotary, "chunked")
    rotary.long_mscale = 1.2
    assert may_scale(rotary, None)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_turned_as_a_prompt_is(family: TinyVLM, autocast: bool):
    """By a matrix, also under autocast, which rounds the factors of products and not of sums."""
    vlm = find_vlm(family.build())
    axes = 3 if "mrope_section" in vlm.text_config.rope_parameters else 1
    positions = torch.randint(-50, 50, (2, 3, axes), generator=torch.Generator().manual_seed(0))
    for layer_idx, attention in vlm.self_attentions.items():
        if not vlm.rotates(attention):
            continue
        query = torch.randn(2, 4, 1, attention.head_dim)
        tables = rotation_tables(vlm.rotary, positions, vlm.layer_type(layer_idx))
        call = AttentionCall(attention, query, query, query, None, VisualContext(None), "sdpa", {})
        expected = rotate(attention, query.repeat(1, 1, 3, 1), tables)
        with torch.autocast("cpu", enabled=autocast):
            found = turned_by_matrix(call, tables, ("a test",))
        assert difference(found.unflatten(-1, (3, -1)).squeeze(2), expected) < TOLERANCE

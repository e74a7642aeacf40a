"""Text that does not see images, against softmax attention written out, for each form that masks have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Gemma2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.dispatch import SteeringHandle, steered_name
from peft_pvm.attention.hiding import hidden_from_text
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.memory import Coverage, VisualMemory


HEADS, KV_HEADS, WIDTH, WINDOW = 4, 2, 8, 3
# Row 0 is padded and has two images, row 1 ends with one, row 2 has none, and row 3 shows its image.
REAL = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7, [1] * 7, [1] * 7]).bool()
VISUAL = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1], [0] * 7, [0, 0, 1, 1, 0, 0, 0]]).bool()
ROWS = torch.tensor([True, True, True, False])
BATCH, KEYS = VISUAL.shape
CAUSAL = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()[None].expand(BATCH, -1, -1)
IN_WINDOW = CAUSAL.triu(1 - WINDOW)
BOTH_WAYS = CAUSAL | (VISUAL[:, :, None] & VISUAL[:, None])


def as_float(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape)[:, None].masked_fill(~visible[:, None], torch.finfo(torch.float).min)


def as_blocks(visible: torch.Tensor) -> BlockMask:
    return create_block_mask(lambda b, h, q, k: visible[b, q, k], BATCH, None, *visible.shape[1:], visible.device)


# What a layer sees, and how a kernel is told so.
FORMS: dict[str, tuple[str, torch.Tensor, Callable[[], Any], dict[str, Any]]] = {
    "eager": ("eager", CAUSAL & REAL[:, None], lambda: as_float(CAUSAL & REAL[:, None]), {}),
    "eager, both ways": ("eager", BOTH_WAYS, lambda: as_float(BOTH_WAYS), {}),
    "sdpa": ("sdpa", CAUSAL & REAL[:, None], lambda: (CAUSAL & REAL[:, None])[:, None], {}),
    "sdpa without a mask": ("sdpa", CAUSAL, lambda: None, {}),
    "sdpa, one mask for all rows": ("sdpa", IN_WINDOW, lambda: IN_WINDOW[:1, None], {"sliding_window": WINDOW}),
    "sdpa, not causal": ("sdpa", torch.ones_like(CAUSAL), lambda: None, {"is_causal": False}),
    "flex": ("flex_attention", CAUSAL & REAL[:, None], lambda: as_blocks(CAUSAL & REAL[:, None]), {}),
    "flex, both ways": ("flex_attention", BOTH_WAYS, lambda: as_blocks(BOTH_WAYS), {}),
    "flash": ("flash_attention_2", CAUSAL, lambda: None, {}),
    "flash, padded": ("flash_attention_2", CAUSAL & REAL[:, None], lambda: REAL.long(), {}),
    "flash, sliding": ("flash_attention_2", IN_WINDOW, lambda: None, {"sliding_window": WINDOW}),
    "flash, capped": ("flash_attention_2", CAUSAL & REAL[:, None], lambda: REAL.long(), {"softcap": 0.5}),
}


@pytest.fixture
def attention() -> Gemma2Attention:
    """Its eager attention can cap scores."""
    sizes = dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1, head_dim=WIDTH)
    attention = Gemma2Attention(Gemma2Config(hidden_size=HEADS * WIDTH, **sizes), layer_idx=0).eval()
    SteeringHandle(attention)
    return attention


def context_of(start: int = 0) -> VisualContext:
    """The tokens from one on; those before it are in the cache."""
    memory = VisualMemory()
    for first, stop in ((0, start), (start, KEYS)):
        context = VisualContext(VISUAL[:, first:stop])
        context.read(torch.randn(BATCH, stop - first, 2), memory, Coverage(first, first))
        memory = context.memory
    return context


def call_of(attention: Gemma2Attention, form: str, start: int = 0) -> AttentionCall:
    kernel, _, mask, kwargs = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, heads, KEYS, WIDTH, generator=generator, device="cpu").to(VISUAL.device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return AttentionCall(
        attention, query[:, :, start:], key, value, mask(), context_of(start), kernel, {"scaling": 0.5, **kwargs}
    )


def by_hand(call: AttentionCall, visible: torch.Tensor) -> torch.Tensor:
    """Softmax attention over the keys that are visible, `(batch, num_queries, num_keys)`; 0 where there are none."""
    key, value = (t.double().repeat_interleave(HEADS // KV_HEADS, 1) for t in (call.key, call.value))
    scores = call.query.double() @ key.transpose(2, 3) * call.scaling
    if softcap := call.kwargs.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2).float()


@pytest.mark.parametrize("form", FORMS)
def test_text_does_not_see_images_in_rows_that_hide_them(attention: Gemma2Attention, form: str):
    call, visible = call_of(attention, form), FORMS[form][1]
    hidden = ROWS[:, None, None] & ~VISUAL[:, :, None] & VISUAL[:, None]
    assert (visible & hidden).any()
    assert hidden_from_text(call) is call, "no row hides its image"
    call.context.hidden_rows = ROWS
    with torch.compiler.set_stance("force_eager"):
        output = hidden_from_text(call).attend()[0]
    expected = by_hand(call, visible & ~hidden)
    torch.testing.assert_close(output[REAL], expected[REAL], rtol=0, atol=1e-5)
    assert (output - by_hand(call, visible))[REAL].abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_values_of_hidden_images_do_not_matter(attention: Gemma2Attention, form: str):
    """Not to the last bit."""
    call = call_of(attention, form)
    call.context.hidden_rows = ROWS
    text = ~VISUAL & REAL & ROWS[:, None]
    with torch.compiler.set_stance("force_eager"):
        one = hidden_from_text(call).attend()[0]
        for states in (call.key, call.value):
            states[VISUAL[:, None].expand(-1, KV_HEADS, -1)] += 3.0
        other = hidden_from_text(call).attend()[0]
    assert torch.equal(one[text], other[text])
    assert not torch.equal(one[3], other[3])


@pytest.mark.parametrize("form", ["sdpa without a mask", "flash", "flash, padded"])
def test_a_mask_is_made_once_for_all_layers(attention: Gemma2Attention, form: str):
    call = call_of(attention, form)
    call.context.hidden_rows = ROWS
    hidden, again = hidden_from_text(call), hidden_from_text(call)
    assert hidden.attention_mask is again.attention_mask
    assert hidden.visibility is again.visibility is not call.visibility
    call.kwargs["sliding_window"] = 2
    assert hidden_from_text(call).attention_mask is not hidden.attention_mask


def test_images_in_the_cache_are_hidden_and_no_padding(attention: Gemma2Attention):
    """No query of this forward sees them: what counts tokens must not take them for padding."""
    start = 5
    call = call_of(attention, "sdpa without a mask", start)
    call.context.hidden_rows = ROWS
    call.context.attention_mask, call.attention_mask = REAL, (CAUSAL & REAL[:, None])[:, None, start:]
    hidden = hidden_from_text(call)
    expected = by_hand(call, (CAUSAL & REAL[:, None] & ~(ROWS[:, None] & VISUAL)[:, None])[:, start:])
    text = ~VISUAL[:, start:]
    torch.testing.assert_close(hidden.attend()[0][text], expected[text], rtol=0, atol=1e-5)
    for found, wanted in zip(hidden.visibility.ranks(), call.visibility.ranks()):
        assert torch.equal(found, wanted)
    assert hidden.visibility.ranks()[1][0, 0].tolist() == [4, 5], "behind padding and three visual tokens"


def test_steered_attention_hides(attention: Gemma2Attention):
    """Adapters and observers are given the call in which it is hidden."""
    call = call_of(attention, "sdpa")
    call.context.hidden_rows = ROWS
    seen: list[AttentionCall] = []
    call.context.observers.append(seen.append)
    steered = ALL_ATTENTION_FUNCTIONS[steered_name("sdpa")]
    states = (call.query, call.key, call.value, call.attention_mask)
    output, _ = steered(attention, *states, visual_context=call.context, **call.kwargs)
    assert torch.equal(output, hidden_from_text(call).attend()[0])
    assert seen[0].attention_mask is not call.attention_mask

"""Hides images from text in a call of attention, on any kernel. Everything else stays the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

from .call import AttentionCall


def hidden_from_text(call: AttentionCall) -> AttentionCall:
    """The call with a mask that hides visual tokens from text, in those rows of the batch that hide images.

    Visual tokens see the same as before. Flash attention has no masks of pairs, so its calls go to sdpa, or to eager
    attention where scores are capped, which sdpa cannot do.

    Args:
        call: As the attention module makes it, with `hidden_rows` in its context.
    """
    rows, kernel = call.context.hidden_rows, call.kernel
    if rows is None:
        return call
    if "flash" in kernel:
        kernel = "sdpa" if call.kwargs.get("softcap") is None else "eager"
    shared = call.visibility
    mask = call.context.derived(("hidden", shared, kernel), lambda: _without_pairs(call, rows, kernel))
    hidden = replace(call, attention_mask=mask, kernel=kernel)
    hidden.visibility.ranked_by = lambda: shared  # what text does not see is not padding
    return hidden


def _without_pairs(call: AttentionCall, rows: torch.Tensor, kernel: str) -> Any:
    """The mask of a call, without pairs of text and visual tokens in some rows of the batch, as a kernel takes it."""
    mask = call.attention_mask
    text, visual = ~call.visual_queries & rows.unsqueeze(1), call.visual_keys
    if isinstance(mask, BlockMask):
        _, heads, num_queries, num_keys = mask.shape
        rule = and_masks(mask.mask_mod, lambda batch, head, query, key: ~(text[batch, query] & visual[batch, key]))
        return create_block_mask(rule, len(text), heads, num_queries, num_keys, text.device, mask.BLOCK_SIZE)
    pairs = text[:, None, :, None] & visual[:, None, None]
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.is_floating_point():
        return mask[..., : pairs.shape[-1]].masked_fill(pairs, torch.finfo(mask.dtype).min)
    visible = call.visibility.mask()
    visible = ~pairs if visible is None else visible & ~pairs
    if kernel == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=call.query.dtype).masked_fill(~visible, torch.finfo(call.query.dtype).min)

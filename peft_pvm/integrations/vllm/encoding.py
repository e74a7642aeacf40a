"""What PVM and DIPE need of vLLM, written into what it carries: positions and the width of heads.

vLLM hands a model the tokens of many requests in one row, and with each token its position. It computes positions once
for a prompt; for generated tokens it adds a constant to the number of tokens before. Nothing else that belongs to a
request reaches the model in every way in which vLLM runs it (chunks of prompts, cached prefixes, graphs). So the upper
bits of a position say whether the token is visual, and what its anchor is::

    bit   0 ... 29   the position
    bit   30         1: the token is visual
    bit   32 ...     its anchor, where DIPE needs it

Without anchors, that fits the 32-bit integers of vLLM's second model runner.

vLLM's attention kernels and its paged cache know the keys and values of a token, and that a query sees what came
before it. Wider heads say the rest. Their shapes are `(num_tokens, heads, head_dim)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...tokens.positions import PADDING, modalities, run_anchors, run_starts


POSITION_BITS, ANCHOR_SHIFT = 30, 32
WIDEST = 1024
# A query and a key of this size give a hidden token a score of -16384 * scaling, so a weight of exactly 0 beside any
# that is not hidden. It is small enough for every dtype that a cache may have, down to 8 bits.
HIDING = 128.0

Widened = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attach_labels(
    positions: torch.Tensor, delta: int, visual_mask: torch.Tensor, with_anchors: bool
) -> tuple[torch.Tensor, int]:
    """Label the positions of a prompt, and the constant that generated tokens get theirs by.

    Args:
        positions: The positions of the prompt, `(axes, seq_len)`, int64, each below 2^30.
        delta: What is added to the number of tokens before a generated token, to make its position.
        visual_mask: Which tokens of the prompt are visual, `(seq_len,)`, bool.
        with_anchors: Whether anchors are wanted. They take 64 bits.

    Returns:
        The same, labelled. Generated tokens are text and continue the last run, if that is text.
    """
    labelled = positions + (visual_mask.long() << POSITION_BITS)
    if not with_anchors:
        return labelled, delta
    seq_len = positions.shape[1]
    # One more token, the first that is generated, tells the anchor of them all.
    first = torch.cat([positions[0], positions.new_tensor([seq_len + delta])])[None]
    modality = modalities(torch.cat([visual_mask, visual_mask.new_zeros(1)])[None], None)
    starts = run_starts(modality, modality.new_tensor([PADDING]))
    anchors = run_anchors(starts, first, first.new_zeros(1))[0]
    return labelled + (anchors[:-1] << ANCHOR_SHIFT), delta + (int(anchors[-1]) << ANCHOR_SHIFT)


def detach_labels(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `attach_labels` put together, token by token.

    Args:
        positions: Labelled, `(axes, num_tokens)`, int64.

    Returns:
        Positions `(axes, num_tokens)`, which tokens are visual `(num_tokens,)`, bool, and anchors `(num_tokens,)`,
        which are 0 where there are none.
    """
    visual_mask = (positions[0] >> POSITION_BITS) & 1 == 1
    return positions & ((1 << POSITION_BITS) - 1), visual_mask, positions[0] >> ANCHOR_SHIFT


def supported_width(least: int, supports: Callable[[int], bool]) -> int:
    """The smallest head size that is wide enough and has a kernel.

    Args:
        least: What is needed.
        supports: Says whether there is a kernel for a head size.

    Raises:
        NotImplementedError: There is none.
    """
    for width in range(least, WIDEST + 1):
        if supports(width):
            return width
    raise NotImplementedError(f"This attention backend of vLLM has no kernel for heads of {least} channels or more.")


def visual_keys_only(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visual_mask: torch.Tensor, width: int
) -> Widened:
    """Attention to visual tokens alone, with keys and values for all: one more channel hides the others.

    A query with no visual token in sight reads the values of the hidden ones, which are 0.

    Args:
        query: `(num_tokens, heads, head_dim)`.
        key: `(num_tokens, kv_heads, head_dim)`.
        value: The same shape as `key`.
        visual_mask: `(num_tokens,)`, bool.
        width: The width of the returned heads, more than `head_dim`.

    Returns:
        Queries, keys and values of this width. Beyond `head_dim`, what attention makes of the values is 0.
    """
    visual = visual_mask[:, None, None]
    head_dim = query.shape[-1]
    ask = F.pad(query.new_full((), HIDING).expand(*query.shape[:-1], 1), (0, width - head_dim - 1))
    hide = F.pad(key.new_full((), -HIDING).expand(*key.shape[:-1], 1), (head_dim, width - head_dim - 1))
    return (
        torch.cat([query, ask], -1),
        torch.where(visual, F.pad(key, (0, width - head_dim)), hide),
        F.pad(value.masked_fill(~visual, 0), (0, width - head_dim)),
    )


def anchored_across_modalities(
    query: torch.Tensor,
    anchored: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visual_mask: torch.Tensor,
    width: int,
) -> Widened:
    """DIPE's scores (arXiv 2603.10863): `anchored` meets the keys of the other modality, `query` those of its own.

    Keys are split by modality, `[text or 0, visual or 0]`; queries hold in each half what it is to be met with.

    Args:
        query: Rotated by their positions, `(num_tokens, heads, head_dim)`.
        anchored: Rotated by their anchors, as `query`.
        key: `(num_tokens, kv_heads, head_dim)`.
        value: The same shape as `key`.
        visual_mask: `(num_tokens,)`, bool.
        width: The width of the returned heads, at least twice `head_dim`.

    Returns:
        Queries, keys and values of this width. Beyond `head_dim`, what attention makes of the values is 0.
    """
    visual = visual_mask[:, None, None]
    head_dim = query.shape[-1]
    queries = torch.cat([torch.where(visual, anchored, query), torch.where(visual, query, anchored)], -1)
    keys = torch.cat([key.masked_fill(visual, 0), key.masked_fill(~visual, 0)], -1)
    spare = (0, width - 2 * head_dim)
    return F.pad(queries, spare), F.pad(keys, spare), F.pad(value, (0, width - head_dim))

"""What is handed to vLLM's attention, so that its kernels and its paged cache do what PVM and DIPE need.

Those know a token's keys and values, and that queries see what came before. Both methods say the rest by wider heads.
Tokens of many requests stand in one row: shapes are `(num_tokens, heads, head_dim)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


WIDEST = 1024
# A query and a key of this size give a hidden token a score of -16384 * scaling, so a weight of exactly 0 beside any
# that is not hidden. It is small enough for every dtype that a cache may have, down to 8 bits.
HIDING = 128.0

Widened = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        value: As `key`.
        visual_mask: `(num_tokens,)`, bool.
        width: Of the heads that come back, more than `head_dim`.

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
        value: As `key`.
        visual_mask: `(num_tokens,)`, bool.
        width: Of the heads that come back, at least twice `head_dim`.

    Returns:
        Queries, keys and values of this width. Beyond `head_dim`, what attention makes of the values is 0.
    """
    visual = visual_mask[:, None, None]
    head_dim = query.shape[-1]
    queries = torch.cat([torch.where(visual, anchored, query), torch.where(visual, query, anchored)], -1)
    keys = torch.cat([key.masked_fill(visual, 0), key.masked_fill(~visual, 0)], -1)
    spare = (0, width - 2 * head_dim)
    return F.pad(queries, spare), F.pad(keys, spare), F.pad(value, (0, width - head_dim))

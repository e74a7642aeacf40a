"""Wider heads whose scores are those that a method wants, for kernels that show no scores and take no masks.

Shapes are those of vLLM: a query is `(num_tokens, heads, head_dim)`, a key `(num_tokens, kv_heads, head_dim)`, and
what is said of tokens is `(num_tokens,)`. For several methods, each widens what the one before returned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...attention.stages import in_two


WIDEST = 1024
# A query and a key of this size give a hidden token a score of -16384 * scaling, so a weight of exactly 0 beside any
# that is not hidden. It is small enough for every dtype that a cache may have, down to 8 bits.
HIDING = 128.0
BIAS_CHANNELS = 4


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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visual_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to visual tokens only, with keys and values for all tokens: one more channel hides the others.

    A query with no visual token in sight reads the values of the hidden ones, which are 0.

    Args:
        query: The queries.
        key: The keys.
        value: The same shape as `key`.
        visual_mask: Which tokens are visual, bool.

    Returns:
        Queries and keys with one more channel, and values of the same shape.
    """
    visual = visual_mask[:, None, None]
    hidden = F.pad(torch.zeros_like(key), (0, 1), value=-HIDING)
    return (
        F.pad(query, (0, 1), value=HIDING),
        torch.where(visual, F.pad(key, (0, 1)), hidden),
        value.masked_fill(~visual, 0),
    )


def anchored_across_modalities(
    query: torch.Tensor, anchored: torch.Tensor, key: torch.Tensor, visual_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """DIPE's scores (arXiv 2603.10863): `anchored` meets the keys of the other modality, `query` those of its own.

    Keys are split by modality, `[text or 0, visual or 0]`; queries hold in each half what it is to be met with.

    Args:
        query: Rotated by their positions.
        anchored: Rotated by their anchors, as `query`.
        key: Rotated by their positions.
        visual_mask: Which tokens are visual, bool. With none, the scores are those of `query`.

    Returns:
        Queries and keys of twice the width.
    """
    visual = visual_mask[:, None, None]
    queries = torch.cat([torch.where(visual, anchored, query), torch.where(visual, query, anchored)], -1)
    keys = torch.cat([key.masked_fill(visual, 0), key.masked_fill(~visual, 0)], -1)
    return queries, keys


def scaled_for_some(
    query: torch.Tensor, key: torch.Tensor, factors: torch.Tensor, acting: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each key multiplied by a factor, for some queries.

    Keys are there twice, `[as they are, scaled]`; a query meets one of both.

    Args:
        query: The queries.
        key: The keys.
        factors: What scores of each key are multiplied by, float.
        acting: For which queries, bool.

    Returns:
        Queries and keys of twice the width.
    """
    scaled = acting[:, None, None]
    queries = torch.cat([query.masked_fill(scaled, 0), query.masked_fill(~scaled, 0)], -1)
    return queries, torch.cat([key, key * factors[:, None, None].to(key.dtype)], -1)


def with_bias(
    query: torch.Tensor, key: torch.Tensor, of_queries: torch.Tensor, of_keys: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A number of the query times a number of the key, added to the score after scaling.

    Both are split in two, what their dtype holds and what it rounds away: each part of one meets both of the other.

    Args:
        query: The queries.
        key: The keys.
        of_queries: fp32.
        of_keys: fp32.
        scaling: Of scores.

    Returns:
        Queries and keys with `BIAS_CHANNELS` more channels.
    """
    asks = in_two(of_queries, query.dtype).repeat_interleave(2, -1)
    answers = in_two(of_keys / scaling, key.dtype).repeat(1, 2)
    wider = [
        torch.cat([part, more[:, None].expand(-1, part.shape[1], -1)], -1)
        for part, more in ((query, asks), (key, answers))
    ]
    return wider[0], wider[1]

"""Labels of tokens that travel with their positions.

vLLM hands a model the tokens of many requests in one row, and of each token its position: what was made of the prompt
once, and for generated tokens the number of tokens before plus a constant. Nothing else that belongs to a request
reaches the model in every way vLLM runs it (chunks of prompts, cached prefixes, graphs). So whether a token is visual,
and its anchor, stand in the upper bits of its position::

    bit   0 ... 29   the position
    bit   30         1: the token is visual
    bit   32 ...     its anchor, where DIPE needs it

Without anchors, that fits the 32-bit integers of vLLM's second model runner.
"""

from __future__ import annotations

import torch

from ...positions import PADDING, modalities, run_anchors, run_starts


POSITION_BITS, ANCHOR_SHIFT = 30, 32


def attach_labels(
    positions: torch.Tensor, delta: int, visual_mask: torch.Tensor, with_anchors: bool
) -> tuple[torch.Tensor, int]:
    """Label the positions of a prompt, and the constant that generated tokens get theirs by.

    Args:
        positions: Of the prompt, `(axes, seq_len)`, int64, each below 2^30.
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

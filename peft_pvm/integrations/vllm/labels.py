"""What travels with the positions of tokens: which are visual, which come after an image, and anchors."""

from __future__ import annotations

import torch

from ...tokens.positions import PADDING, modalities, run_anchors, run_starts


POSITION_BITS = 29
VISUAL_SHIFT, AFTER_IMAGE_SHIFT, ANCHOR_SHIFT = POSITION_BITS, POSITION_BITS + 1, 32


def attach_labels(
    positions: torch.Tensor, delta: int, visual_mask: torch.Tensor, with_anchors: bool
) -> tuple[torch.Tensor, int]:
    """Label the positions of a prompt, and the constant that generated tokens get theirs by.

    Args:
        positions: The positions of the prompt, `(axes, seq_len)`, int64, each below 2^29.
        delta: What is added to the number of tokens before a generated token, to make its position.
        visual_mask: Which tokens of the prompt are visual, `(seq_len,)`, bool.
        with_anchors: Whether anchors are wanted. They take 64 bits.

    Returns:
        The same, labelled. Generated tokens are text and continue the last run, if that is text.
    """
    after_image = visual_mask.cummax(0).values.long() << AFTER_IMAGE_SHIFT
    labelled = positions + (visual_mask.long() << VISUAL_SHIFT) + after_image
    labelled_delta = delta + int(after_image[-1])
    if not with_anchors:
        return labelled, labelled_delta
    seq_len = positions.shape[1]
    # One more token, the first that is generated, tells the anchor of them all.
    first = torch.cat([positions[0], positions.new_tensor([seq_len + delta])])[None]
    modality = modalities(torch.cat([visual_mask, visual_mask.new_zeros(1)])[None], None)
    starts = run_starts(modality, modality.new_tensor([PADDING]))
    anchors = run_anchors(starts, first, first.new_zeros(1))[0]
    return labelled + (anchors[:-1] << ANCHOR_SHIFT), labelled_delta + (int(anchors[-1]) << ANCHOR_SHIFT)


def detach_labels(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `attach_labels` put together, token by token.

    Args:
        positions: Labelled, `(axes, num_tokens)`, or of one axis `(num_tokens,)`, int64.

    Returns:
        Positions of the same shape, and `(num_tokens,)` each: which tokens are visual, bool; which have a visual token
        at their place or before it, bool; and anchors, which are 0 where there are none.
    """
    first = positions if positions.dim() == 1 else positions[0]
    visual_mask, after_image = ((first >> shift) & 1 == 1 for shift in (VISUAL_SHIFT, AFTER_IMAGE_SHIFT))
    return positions & ((1 << POSITION_BITS) - 1), visual_mask, after_image, first >> ANCHOR_SHIFT

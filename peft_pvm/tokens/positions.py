"""Where tokens are in a batch, and which are visual: pure functions on tensors, without any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


EMPTY_SLOT = -1  # marks padding in a table of positions
BEYOND = 2**62  # a position that no token has
TEXT, VISUAL, PADDING = 0, 1, -1  # the modality of a token
MULTIMODAL_AXES = 3  # of a rotary embedding that tells time, height and width apart


def placeholder_mask(input_ids: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Mark the placeholder tokens that visual features are written over.

    Args:
        input_ids: Token ids, `(batch, seq_len)`, integer.
        token_ids: The placeholder ids to look for; none marks nothing.

    Returns:
        `(batch, seq_len)`, bool.

    Example:
        >>> placeholder_mask(torch.tensor([[5, 9, 9, 6]]), [9])
        tensor([[False,  True,  True, False]])
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in token_ids:
        mask = mask | (input_ids == token_id)
    return mask


def pack(mask: torch.Tensor, min_length: int = 0) -> torch.Tensor:
    """List the positions of the marked entries of every row, left-aligned and padded to the longest list.

    The width of the result depends on the data, so this waits for the device.

    Args:
        mask: `(batch, seq_len)`, bool.
        min_length: The result is at least this wide.

    Returns:
        `(batch, max(longest, min_length))`, int64: ascending positions, then `EMPTY_SLOT`.

    Example:
        >>> pack(torch.tensor([[False, True, True], [True, False, False]]))
        tensor([[ 1,  2],
                [ 0, -1]])
    """
    counts = mask.sum(1)
    width = max(int(counts.max()), min_length) if mask.numel() else min_length
    positions = torch.full((mask.shape[0], width), EMPTY_SLOT, dtype=torch.long, device=mask.device)
    rows, columns = mask.nonzero(as_tuple=True)
    rank = mask.cumsum(1)[rows, columns] - 1
    positions[rows, rank] = columns
    return positions


def select_rows(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions out of every row. Unlike `torch.gather`, this keeps nothing but the positions for a backward.

    Args:
        tensor: `(batch, seq_len, features)`.
        positions: `(batch, length)`, int64, from 0.

    Returns:
        `(batch, length, features)`.

    Example:
        >>> select_rows(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1], [0]]))
        tensor([[[2.]],
        <BLANKLINE>
                [[3.]]])
    """
    batch_size, seq_len = tensor.shape[:2]
    firsts = torch.arange(batch_size, device=positions.device).unsqueeze(1) * seq_len
    return tensor.flatten(0, 1).index_select(0, (positions + firsts).flatten()).view(*positions.shape, tensor.shape[2])


def gather_rows(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions out of every row; `EMPTY_SLOT` picks zeros.

    Args:
        tensor: `(batch, seq_len, features)`.
        positions: `(batch, length)`, int64, as `pack` gives them.

    Returns:
        `(batch, length, features)`.

    Example:
        >>> gather_rows(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, -1]]))
        tensor([[[3.],
                 [0.]]])
    """
    return select_rows(tensor, positions.clamp(min=0)) * (positions >= 0).unsqueeze(-1).to(tensor.dtype)


def scatter_rows(values: torch.Tensor, positions: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Put values back where `gather_rows` took them from; everything else is exactly zero.

    Args:
        values: `(batch, length, features)`.
        positions: `(batch, length)`, int64; entries of a row are distinct, values at `EMPTY_SLOT` are dropped.
        seq_len: Length of the result.

    Returns:
        `(batch, seq_len, features)`.

    Example:
        >>> scatter_rows(torch.tensor([[[3.0], [7.0]]]), torch.tensor([[2, -1]]), 3)
        tensor([[[0.],
                 [0.],
                 [3.]]])
    """
    kept = values.masked_fill((positions < 0).unsqueeze(-1), 0)
    index = positions.clamp(min=0).unsqueeze(-1).expand_as(values)
    # Dropped entries add their zero at position 0, which leaves whatever is there unchanged.
    return values.new_zeros(values.shape[0], seq_len, values.shape[2]).scatter_add(1, index, kept)


def causally_visible(slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Which visual tokens come before each query.

    Args:
        slots: Positions of the visual tokens, `(batch, num_visual)`, int64, `EMPTY_SLOT` where there is none.
        positions: Positions of the queries, counted like `slots`, `(batch, num_queries)`, int64.

    Returns:
        `(batch, num_queries, num_visual)`, bool.

    Example:
        >>> causally_visible(torch.tensor([[1, 4, -1]]), torch.tensor([[0, 2, 5]]))
        tensor([[[False, False, False],
                 [ True, False, False],
                 [ True,  True, False]]])
    """
    slots = slots.unsqueeze(1)
    return (slots >= 0) & (slots < positions.unsqueeze(2))


def modalities(visual_mask: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The modality of every token.

    Args:
        visual_mask: Which tokens are visual, `(batch, seq_len)`, bool.
        real: Which tokens are not padding, as `visual_mask`. `None`: all.

    Returns:
        `(batch, seq_len)`, int64: `TEXT`, `VISUAL` or `PADDING`.

    Example:
        >>> modalities(torch.tensor([[False, False, True]]), torch.tensor([[False, True, True]]))
        tensor([[-1,  0,  1]])
    """
    modality = torch.where(visual_mask, VISUAL, TEXT)
    return modality if real is None else torch.where(real, modality, PADDING)


def run_starts(modality: torch.Tensor, open_modality: torch.Tensor) -> torch.Tensor:
    """Mark the first token of every contiguous run of one modality. Padding belongs to no run and ends none.

    Args:
        modality: As `modalities` gives it, `(batch, seq_len)`, int64.
        open_modality: The modality of the last real token before, `PADDING` if there is none, `(batch,)`, int64.

    Returns:
        `(batch, seq_len)`, bool.

    Example:
        >>> run_starts(torch.tensor([[-1, 0, 0, 1, 1, 0]]), torch.tensor([-1]))
        tensor([[False,  True, False,  True, False,  True]])
    """
    extended = torch.cat([open_modality.unsqueeze(1), modality], 1)
    places = torch.arange(extended.shape[1], device=modality.device).expand_as(extended)
    last_real = torch.where(extended != PADDING, places, 0).cummax(1).values[:, :-1]
    return (modality != PADDING) & (modality != extended.gather(1, last_real))


def run_anchors(starts: torch.Tensor, positions: torch.Tensor, open_anchor: torch.Tensor) -> torch.Tensor:
    """The position of the first token of the run that holds each token (DIPE, arXiv 2603.10863).

    Args:
        starts: As `run_starts` gives it, `(batch, seq_len)`, bool.
        positions: The positions of these tokens, `(batch, seq_len)`, int64.
        open_anchor: The anchor of the run that goes on from before, `(batch,)`, int64.

    Returns:
        `(batch, seq_len)`, int64.

    Example:
        >>> starts = torch.tensor([[False, True, False, True]])
        >>> run_anchors(starts, torch.tensor([[5, 6, 7, 8]]), torch.tensor([2]))
        tensor([[2, 6, 6, 8]])
    """
    extended = torch.cat([open_anchor.unsqueeze(1), positions], 1)
    places = torch.arange(1, extended.shape[1], device=positions.device).expand_as(positions)
    return extended.gather(1, torch.where(starts, places, 0).cummax(1).values)


def images_of_runs(
    starts: torch.Tensor, anchors: torch.Tensor, modalities: torch.Tensor, image_gap: int, max_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the runs of visual tokens together to images. Waits for the device.

    Args:
        starts: Where the runs of each row begin, `(batch, num_runs)`, int64, ascending, `EMPTY_SLOT` for no run.
        anchors: The positions of their first tokens, as `starts`.
        modalities: `TEXT` or `VISUAL`, in turn in every row, as `starts`.
        image_gap: Visual runs with fewer positions of text between them belong to one image.
        max_images: How many images are told apart in a row, 1 or more. Later ones belong to the last of them.

    Returns:
        Where the first token of each image is, counted like `starts`, and the position at which the text after its
        last run begins: `(batch, num_images)` both, int64, `BEYOND` where there is none.

    Example:
        >>> starts, anchors = torch.tensor([[0, 4, 5, 9, 40, 44]]), torch.tensor([[0, 2, 3, 5, 36, 38]])
        >>> images_of_runs(starts, anchors, torch.tensor([[1, 0, 1, 0, 1, 0]]), image_gap=8, max_images=4)
        (tensor([[ 0, 40]]), tensor([[ 5, 38]]))
    """
    order = F.pad(starts, (1, 0), value=EMPTY_SLOT).argsort(1)  # every row begins with a run that is missing
    starts, anchors, modalities = (
        F.pad(table, (1, 0), value=EMPTY_SLOT).gather(1, order) for table in (starts, anchors, modalities)
    )
    is_visual = (starts >= 0) & (modalities == VISUAL)
    text_between = anchors.diff(dim=1, prepend=anchors[:, :1])
    is_first = is_visual & ((text_between >= image_gap) | (is_visual.cumsum(1) == 1))
    image = torch.where(is_visual, (is_first.cumsum(1) - 1).clamp(max=max_images - 1), EMPTY_SLOT)
    numbers = torch.arange(max(int(image.max()) + 1, 1), device=image.device)
    is_of_image = image.unsqueeze(1) == numbers[:, None]  # (batch, num_images, num_runs)
    ends = F.pad(anchors[:, 1:], (0, 1), value=BEYOND).unsqueeze(1)
    first = torch.where(is_of_image, starts.unsqueeze(1), BEYOND).amin(2)
    end = torch.where(is_of_image, ends, EMPTY_SLOT).amax(2)
    return first, torch.where(first < BEYOND, end, BEYOND)


def on_same_axes(*positions: torch.Tensor) -> list[torch.Tensor]:
    """Positions of tokens with as many axes as any of them has. Where one has a single axis, it stands for all.

    Args:
        positions: Each `(batch, seq_len, axes)`, int64.

    Example:
        >>> on_same_axes(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[5]]]))
        [tensor([[[0, 1, 2]]]), tensor([[[5, 5, 5]]])]
    """
    axes = max(part.shape[-1] for part in positions)
    return [part.expand(-1, -1, axes) for part in positions]


def filled_up(of_tokens: torch.Tensor, length: int) -> torch.Tensor:
    """The same with zeros after it, up to a length.

    Args:
        of_tokens: `(batch, number of tokens, ...)`.
        length: Of how many tokens there is room for.
    """
    missing = length - of_tokens.shape[1]
    if missing <= 0:
        return of_tokens
    return torch.cat([of_tokens, of_tokens.new_zeros(len(of_tokens), missing, *of_tokens.shape[2:])], 1)

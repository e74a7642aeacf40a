"""Who reads the visual memory in a forward, and what is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import VisualContext
from ..positions import EMPTY_SLOT, causally_visible, gather_rows, pack


@dataclass(eq=False)
class MemoryView:
    """Which tokens of a forward read the memory, and which part of it each may see.

    Attributes:
        positions: Positions, inside this forward, of the tokens that read, `(batch, num_queries)`, int64, `EMPTY_SLOT`
            for padding. `None`: every token reads.
        mask: What each may attend to, `(batch, 1, num_queries or 1, num_visual)`, bool; no row is all False. `None`:
            everything.
        has_memory: Rows with something to read, `(batch, 1, 1)`, bool; the others get exactly zero. `None`: all.
    """

    positions: torch.Tensor | None
    mask: torch.Tensor | None
    has_memory: torch.Tensor | None


def view_of_memory(context: VisualContext, visibility: str) -> MemoryView | None:
    """Who reads the memory in a forward, for one rule of visibility; `None` if nobody does.

    Where gradients are recorded somebody always reads, if only a padding token (whose output is dropped): a rank of a
    sharded model that skipped the branch would leave the others waiting in their collectives.

    Args:
        context: Of the forward.
        visibility: "causal": a token sees the visual tokens before it. "sample": all of its row that are known.
    """
    return context.derived(("view", visibility), lambda: _make_view(context, visibility))


def _make_view(context: VisualContext, visibility: str) -> MemoryView | None:
    memory = context.memory
    if memory.is_empty:
        if not context.records_gradients:
            return None
        nobody = torch.full((context.batch_size, 1), EMPTY_SLOT, device=context.device)
        return MemoryView(nobody, None, None)
    filled = memory.slots >= 0
    if context.visual_mask is None:  # the decode path: the whole memory stands before every token
        if memory.is_dense:
            return MemoryView(None, None, None)
        has_memory = filled.any(1)[:, None, None]
        return MemoryView(None, (filled[:, None] | ~has_memory).unsqueeze(1), has_memory)

    # Only the tokens that are not silenced read: text with a visual token in sight.
    if visibility == "causal":
        reads = context.text_behind_images()
    else:
        reads = ~context.visual_mask & filled.any(1, keepdim=True)
    positions = pack(reads, min_length=int(context.records_gradients))
    if positions.shape[1] == 0:
        return None
    if visibility == "causal":
        mask = causally_visible(memory.slots, positions + context.past_length)
    else:
        mask = filled.unsqueeze(1).expand(-1, positions.shape[1], -1)
    mask = mask | (positions < 0).unsqueeze(-1)
    return MemoryView(positions, None if bool(mask.all()) else mask.unsqueeze(1), None)


def bank_of_hidden_states(context: VisualContext, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """The hidden states at one layer of all visual tokens in memory, this forward's included.

    Args:
        context: Of the forward.
        layer_idx: The layer.
        hidden_states: This forward's, `(batch, seq_len, hidden_size)`.

    Returns:
        `(batch, num_visual, hidden_size)`, detached.

    Raises:
        RuntimeError: The memory holds tokens that were read while nobody kept their hidden states.
    """
    memory = context.memory
    bank = memory.hidden_states.get(layer_idx)
    num_visual = memory.slots.shape[1]
    if bank is not None and bank.shape[1] == num_visual:
        return bank
    pieces = [] if bank is None else [bank]
    if context.visual_positions is not None:
        pieces.append(gather_rows(hidden_states.detach(), context.visual_positions))
    if sum(piece.shape[1] for piece in pieces) != num_visual:
        raise RuntimeError(
            f"Layer {layer_idx} did not keep the hidden states of all images in this KV cache: an adapter with "
            "memory_source='hidden_states' must be active from the first image on, in layers that compute the "
            "whole prompt. Start with a new cache."
        )
    bank = memory.hidden_states[layer_idx] = torch.cat(pieces, 1)
    return bank

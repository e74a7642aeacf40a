"""What the tuners know about visual tokens: `VisualContext` for one forward, `VisualMemory` across decode steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from .positions import EMPTY_SLOT, causally_visible, gather_rows, pack


@dataclass(eq=False)
class VisualMemory:
    """The visual tokens seen so far by a batch of conversations. It rides on their KV cache.

    A memory is never changed by later tokens: reading another image makes a new memory, so a forward that still needs
    the old one (gradient checkpointing, a copied cache) keeps it. Only `hidden_states` and `projections` fill up, with
    values that are functions of the memory itself.

    Attributes:
        embeddings: What the vision tower wrote into `inputs_embeds`, `(batch, num_visual, hidden_size)`, detached,
            zero where there is no token. `num_visual` is 0 before the first image.
        slots: Positions of these tokens in the KV cache, `(batch, num_visual)`, int64, `EMPTY_SLOT` where there is
            none.
        last_slot: The largest slot, -1 without images.
        is_dense: Whether no slot is empty.
        hidden_states: By layer index, the hidden states of these tokens at that layer, shaped as `embeddings`.
        projections: Keys and values that an adapter made from these tokens, `(batch, heads, num_projected, head_dim)`
            each, by the adapter's identity. The last tokens may not be projected yet.
    """

    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    last_slot: int = EMPTY_SLOT
    is_dense: bool = True
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    projections: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _replicas: dict[torch.device, VisualMemory] = field(default_factory=dict, repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is no visual token in any row."""
        return self.slots.shape[1] == 0

    def extended(self, embeddings: torch.Tensor, slots: torch.Tensor) -> VisualMemory:
        """The memory with more tokens at its end.

        Args:
            embeddings: `(batch, num_new, hidden_size)`.
            slots: `(batch, num_new)`, `EMPTY_SLOT` where a row has fewer tokens.
        """
        embeddings = embeddings.detach()
        last_slot, is_dense = int(slots.max()), bool((slots >= 0).all())
        if self.is_empty:
            return VisualMemory(embeddings, slots, last_slot, is_dense)
        return VisualMemory(
            torch.cat([self.embeddings, embeddings], 1),
            torch.cat([self.slots, slots], 1),
            max(self.last_slot, last_slot),
            self.is_dense and is_dense,
            dict(self.hidden_states),
            dict(self.projections),
        )

    def cropped(self, length: int) -> VisualMemory:
        """The memory of a cache that was cut to its first `length` positions."""
        if self.is_empty or length > self.last_slot:
            return self
        kept = (self.slots >= 0) & (self.slots < length)
        if not bool(kept.any()):
            return VisualMemory()
        slots = torch.where(kept, self.slots, EMPTY_SLOT)
        return VisualMemory(
            self.embeddings, slots, int(slots.max()), False, dict(self.hidden_states), dict(self.projections)
        )

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VisualMemory:
        """The memory with `function` applied to every tensor; the first axis of each is the batch."""
        if self.is_empty:
            return self
        return VisualMemory(
            function(self.embeddings),
            function(self.slots),
            self.last_slot,
            self.is_dense,
            {key: function(tensor) for key, tensor in self.hidden_states.items()},
            {identity: (function(keys), function(values)) for identity, (keys, values) in self.projections.items()},
        )

    def to(self, device: torch.device) -> VisualMemory:
        """The memory on another device; it is copied once, then found again."""
        if self.is_empty or self.embeddings.device == device:
            return self
        if device not in self._replicas:
            # What fills up is shared: a layer and an adapter's identity there stay on their device.
            self._replicas[device] = VisualMemory(
                self.embeddings.to(device),
                self.slots.to(device),
                self.last_slot,
                self.is_dense,
                self.hidden_states,
                self.projections,
            )
        return self._replicas[device]


class _FollowedByMemory(Cache):
    """Mixed into a cache's class: what the cache does to its rows happens to the memory that rides on it."""

    visual_memory: VisualMemory
    visual_length: int  # tokens that the memory covers; more in the cache came without the tap reading them

    def __reduce__(self):
        return _restored, (type(self).__bases__[1], dict(self.__dict__))

    def _map_memory(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.visual_memory = self.visual_memory.mapped(function)

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        self._map_memory(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._map_memory(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self._map_memory(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self):
        super().reset()
        self.visual_memory, self.visual_length = VisualMemory(), 0


@functools.cache
def _followed(cache_class: type) -> type[Cache]:
    return type(cache_class.__name__, (_FollowedByMemory, cache_class), {"__module__": cache_class.__module__})


def _restored(cache_class: type, state: dict[str, Any]) -> Cache:
    cache = object.__new__(_followed(cache_class))
    cache.__dict__.update(state)
    return cache


def attach_memory(cache: Cache, memory: VisualMemory, length: int | torch.Tensor) -> None:
    """Put `memory` on `cache`, where it shares the cache's life: copies, beams, row selection, reset.

    Args:
        cache: The cache.
        memory: The visual tokens among the first `length`.
        length: Number of tokens that the tap has read. Not kept for a static cache, whose length is a tensor.
    """
    if not isinstance(cache, _FollowedByMemory):
        cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]
    cache.visual_memory = memory
    if isinstance(length, int):
        cache.visual_length = length


def memory_of(cache: Cache | None) -> VisualMemory | None:
    """The memory riding on `cache`, `None` if there is none."""
    return getattr(cache, "visual_memory", None)


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


class VisualContext:
    """What one forward knows about its visual tokens. It travels as a keyword argument, down to the attention.

    Args:
        visual_mask: Which of this forward's tokens are visual, `(batch, seq_len)`, bool. `None`: none is.
    """

    def __init__(self, visual_mask: torch.Tensor | None):
        self.visual_mask = visual_mask
        self.visual_positions: torch.Tensor | None = None
        self.memory = VisualMemory()
        self.past_length: int | torch.Tensor = 0
        self.batch_size = 0
        self.device = torch.device("cpu")
        self.records_gradients = False
        self.refusal: Exception | None = None  # why nobody can know what is visual here
        self._views: dict[str, MemoryView | None] = {}

    def read(self, inputs_embeds: torch.Tensor, memory: VisualMemory, past_length: int | torch.Tensor) -> None:
        """Take in the text model's inputs: extends `memory` by this forward's visual tokens.

        Args:
            inputs_embeds: `(batch, seq_len, hidden_size)`.
            memory: What the cache remembered so far.
            past_length: Number of tokens in the cache; a tensor for a static cache.
        """
        self.memory = memory
        self.past_length = past_length
        self.batch_size, self.device = inputs_embeds.shape[0], inputs_embeds.device
        self.records_gradients = torch.is_grad_enabled()
        if self.visual_mask is None:
            return
        self.visual_mask = self.visual_mask.to(inputs_embeds.device)
        positions = pack(self.visual_mask)
        if positions.shape[1] == 0:
            self.visual_mask = None
            return
        self.visual_positions = positions
        slots = torch.where(positions >= 0, positions + past_length, EMPTY_SLOT)
        self.memory = memory.extended(gather_rows(inputs_embeds, positions), slots)

    def check(self) -> None:
        """Raise the refusal if there is one. Whoever is about to read the context calls this first."""
        if self.refusal is not None:
            raise self.refusal

    def to(self, device, *args, **kwargs) -> VisualContext:
        """The context on another device (accelerate moves the keyword arguments of a dispatched model's layers)."""
        device = torch.device(device)
        moved = VisualContext(self.visual_mask)
        moved.__dict__.update(self.__dict__)
        moved.device = device
        moved._views = {}
        moved.memory = self.memory.to(device)
        for name in ("visual_mask", "visual_positions", "past_length"):
            value = getattr(self, name)
            setattr(moved, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return moved

    def hidden_states_bank(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states at one layer of all visual tokens in memory, this forward's included.

        Args:
            layer_idx: The layer.
            hidden_states: This forward's, `(batch, seq_len, hidden_size)`.

        Returns:
            `(batch, num_visual, hidden_size)`, detached.

        Raises:
            RuntimeError: The memory holds tokens that were read while nobody kept their hidden states.
        """
        bank = self.memory.hidden_states.get(layer_idx)
        num_visual = self.memory.slots.shape[1]
        if bank is not None and bank.shape[1] == num_visual:
            return bank
        pieces = [] if bank is None else [bank]
        if self.visual_positions is not None:
            pieces.append(gather_rows(hidden_states.detach(), self.visual_positions))
        if sum(piece.shape[1] for piece in pieces) != num_visual:
            raise RuntimeError(
                f"Layer {layer_idx} did not keep the hidden states of all images in this KV cache: an adapter with "
                "memory_source='hidden_states' must be active from the first image on. Start with a new cache."
            )
        bank = self.memory.hidden_states[layer_idx] = torch.cat(pieces, 1)
        return bank

    def view(self, visibility: str) -> MemoryView | None:
        """Who reads the memory in this forward, for one rule of visibility; `None` if nobody does.

        Where gradients are recorded somebody always reads, if only a padding token (whose output is dropped): a rank
        of a sharded model that skipped the branch would leave the others waiting in their collectives.

        Args:
            visibility: "causal": a token sees the visual tokens before it. "sample": all of its row that are known.
        """
        if visibility not in self._views:
            self._views[visibility] = self._make_view(visibility)
        return self._views[visibility]

    def _make_view(self, visibility: str) -> MemoryView | None:
        memory = self.memory
        if memory.is_empty:
            if not self.records_gradients:
                return None
            nobody = torch.full((self.batch_size, 1), EMPTY_SLOT, device=self.device)
            return MemoryView(nobody, None, None)
        if self.visual_mask is None:
            return self._view_of_the_past()

        # Only the tokens that are not silenced read: text with a visual token in sight.
        filled = memory.slots >= 0
        if visibility == "causal":
            first_slot = torch.where(filled, memory.slots, torch.iinfo(torch.long).max).amin(1, keepdim=True)
            slots = torch.arange(self.visual_mask.shape[1], device=self.device) + self.past_length
            reads = ~self.visual_mask & (slots > first_slot)
        else:
            reads = ~self.visual_mask & filled.any(1, keepdim=True)
        positions = pack(reads, min_length=int(self.records_gradients))
        if positions.shape[1] == 0:
            return None
        if visibility == "causal":
            mask = causally_visible(memory.slots, positions + self.past_length)
        else:
            mask = filled.unsqueeze(1).expand(-1, positions.shape[1], -1)
        mask = mask | (positions < 0).unsqueeze(-1)
        return MemoryView(positions, None if bool(mask.all()) else mask.unsqueeze(1), None)

    def _view_of_the_past(self) -> MemoryView:
        """No new visual tokens: the whole memory stands before every token. The decode path."""
        if self.memory.is_dense:
            return MemoryView(None, None, None)
        filled = self.memory.slots >= 0
        has_memory = filled.any(1)[:, None, None]
        return MemoryView(None, (filled[:, None] | ~has_memory).unsqueeze(1), has_memory)

"""What a batch of conversations remembers of its tokens from one forward to the next. It is kept on the KV cache."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from .positions import EMPTY_SLOT, PADDING, TEXT, images_of_runs


@dataclass(frozen=True, eq=False)
class Runs:
    """The contiguous runs of tokens of one modality in every conversation. Never changed, only replaced.

    Attributes:
        starts: Where each run's first token is in the KV cache, `(batch, num_runs)`, int64, `EMPTY_SLOT` where a
            row has fewer runs. Padding belongs to no run.
        anchors: That token's position, as the rotary embedding is given it, on the first axis, as `starts`.
        modalities: The run's modality, as `starts`.
        open_anchor: The anchor of the last run, which goes on until the modality changes, `(batch,)`, int64.
        open_modality: Its modality, `(batch,)`, int64, `PADDING` without a run.
        last_start: The largest of `starts`, -1 without any.
        awaits_text: Whether the next text token starts a run in some row.
        known_images: What `images` has returned, by its arguments.
    """

    starts: torch.Tensor
    anchors: torch.Tensor
    modalities: torch.Tensor
    open_anchor: torch.Tensor
    open_modality: torch.Tensor
    last_start: int
    awaits_text: bool
    known_images: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(starts: torch.Tensor, anchors: torch.Tensor, modalities: torch.Tensor) -> Runs:
        """A table with these runs. Waits for the device."""
        if starts.shape[1] == 0:
            none = torch.full_like(starts[:, :1].sum(1), PADDING)
            return Runs(starts, anchors, modalities, none, none, EMPTY_SLOT, True)
        last = starts.argmax(1, keepdim=True)
        modality = torch.where(starts.gather(1, last) >= 0, modalities.gather(1, last), PADDING).squeeze(1)
        return Runs(
            starts,
            anchors,
            modalities,
            anchors.gather(1, last).squeeze(1),
            modality,
            int(starts.max()),
            bool((modality != TEXT).any()),
        )

    @staticmethod
    def none(batch_size: int, device: torch.device) -> Runs:
        """The table of a batch without any token yet."""
        nothing = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        return Runs.of(nothing, nothing, nothing)

    def extended(self, starts: torch.Tensor, anchors: torch.Tensor, modalities: torch.Tensor) -> Runs:
        """The table with more runs at its end, given as the attributes are."""
        if starts.shape[1] == 0:
            return self
        return Runs.of(
            torch.cat([self.starts, starts], 1),
            torch.cat([self.anchors, anchors], 1),
            torch.cat([self.modalities, modalities], 1),
        )

    def cropped(self, length: int) -> Runs:
        """The table of a cache that was cut to its first `length` positions."""
        if length > self.last_start:
            return self
        return Runs.of(torch.where(self.starts < length, self.starts, EMPTY_SLOT), self.anchors, self.modalities)

    def images(self, image_gap: int, max_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images that the runs of visual tokens make up: see `images_of_runs`. Waits for the device once."""
        key = image_gap, max_images
        if key not in self.known_images:
            self.known_images[key] = images_of_runs(self.starts, self.anchors, self.modalities, *key)
        return self.known_images[key]

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Runs:
        """The table with `function` applied to every tensor; the first axis of each is the batch."""
        return Runs(
            function(self.starts),
            function(self.anchors),
            function(self.modalities),
            function(self.open_anchor),
            function(self.open_modality),
            self.last_start,
            self.awaits_text,
            {key: (function(starts), function(ends)) for key, (starts, ends) in self.known_images.items()},
        )


@dataclass(eq=False)
class VisualMemory:
    """The tokens read so far by a batch of conversations, as far as adapters need them.

    A memory is never changed by later tokens: reading more makes a new memory, so a forward that still needs the old
    one (gradient checkpointing, a copied cache) keeps it. Only `hidden_states` and `projections` fill up, with values
    that are functions of the memory itself, and `marks`, while the forward runs that the memory was made for.

    Attributes:
        embeddings: What the vision tower wrote into `inputs_embeds`, `(batch, num_visual, hidden_size)`, detached,
            zero where there is no token. `num_visual` is 0 before the first image.
        slots: Positions of these tokens in the KV cache, `(batch, num_visual)`, int64, `EMPTY_SLOT` where there is
            none.
        last_slot: The largest slot, -1 without images.
        is_dense: Whether no slot is empty.
        hidden_states: By layer index, the hidden states of these tokens at that layer, shaped as `embeddings`.
        projections: Keys and values that branches made from these tokens, `(batch, heads, num_projected, head_dim)`
            each, by a weak reference to the branch. The last tokens may not be projected yet.
        runs: Where the modality changes, for text and visual tokens alike. `None` before the first token.
        kept: What adapters keep of every token in the cache, by name, `(batch, length, axes)`, int64.
        marks: What adapters have decoder layers note of every token in the cache, by name, `(batch, length, ...)`.
            Some may be of tokens that were cropped since. With a static cache, this and `kept` have room for as many
            tokens as the cache has.
        grounding: After each forward with images, the largest slot so far and the probability that some visual token
            up to there gives each token of the vocabulary, `(batch, vocab_size)`.
        notes: What adapters noted at the end of the last forward for the next, by name, `(batch, ...)`.
    """

    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    last_slot: int = EMPTY_SLOT
    is_dense: bool = True
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    projections: dict[weakref.ref[Any], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    runs: Runs | None = None
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    marks: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    grounding: tuple[tuple[int, torch.Tensor], ...] = ()
    notes: dict[str, torch.Tensor] = field(default_factory=dict)
    _replicas: dict[torch.device, VisualMemory] = field(default_factory=dict, init=False, repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is no visual token in any row."""
        return self.slots.shape[1] == 0

    @property
    def is_grounded(self) -> bool:
        """Whether the last of `grounding` is that of all visual tokens."""
        return self.last_slot == (self.grounding[-1][0] if self.grounding else EMPTY_SLOT)

    def keep_projections(self, branch: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the keys and values that a branch made, and forget those of branches that are gone."""
        for reference in [reference for reference in self.projections if reference() is None]:
            del self.projections[reference]
        self.projections[weakref.ref(branch)] = (keys, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> VisualMemory:
        return self.mapped(lambda tensor: copy.deepcopy(tensor, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "projections": {}}  # the process that unpickles it has other branches

    def extended(self, embeddings: torch.Tensor, slots: torch.Tensor) -> VisualMemory:
        """The memory with more visual tokens at its end.

        Args:
            embeddings: `(batch, num_new, hidden_size)`.
            slots: `(batch, num_new)`, `EMPTY_SLOT` where a row has fewer tokens.
        """
        embeddings = embeddings.detach()
        last_slot, is_dense = int(slots.max()), bool((slots >= 0).all())
        if not self.is_empty:
            embeddings, slots = torch.cat([self.embeddings, embeddings], 1), torch.cat([self.slots, slots], 1)
        return replace(
            self,
            embeddings=embeddings,
            slots=slots,
            last_slot=max(self.last_slot, last_slot),
            is_dense=self.is_dense and is_dense,
            hidden_states=dict(self.hidden_states),
            projections=dict(self.projections),
        )

    def cropped(self, length: int) -> VisualMemory:
        """The memory of a cache that was cut to its first `length` positions."""
        memory = self
        if memory.runs is not None and length <= memory.runs.last_start:
            memory = replace(memory, runs=memory.runs.cropped(length))
        if any(length < tensor.shape[1] for tensor in memory.kept.values()):
            memory = replace(memory, kept={name: tensor[:, :length] for name, tensor in memory.kept.items()})
        if length > memory.last_slot:
            return memory
        kept = (memory.slots >= 0) & (memory.slots < length)
        if not bool(kept.any()):
            return VisualMemory(runs=memory.runs, kept=memory.kept, marks=memory.marks)
        slots = torch.where(kept, memory.slots, EMPTY_SLOT)
        return replace(
            memory,
            slots=slots,
            last_slot=int(slots.max()),
            is_dense=False,
            hidden_states=dict(memory.hidden_states),
            projections=dict(memory.projections),
            grounding=tuple((slot, tensor) for slot, tensor in memory.grounding if slot < length),
        )

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VisualMemory:
        """The memory with `function` applied to every tensor; the first axis of each is the batch."""
        return replace(
            self,
            embeddings=self.embeddings if self.is_empty else function(self.embeddings),
            slots=self.slots if self.is_empty else function(self.slots),
            hidden_states={key: function(tensor) for key, tensor in self.hidden_states.items()},
            projections={key: (function(keys), function(values)) for key, (keys, values) in self.projections.items()},
            runs=None if self.runs is None else self.runs.mapped(function),
            kept={name: function(tensor) for name, tensor in self.kept.items()},
            marks={name: function(tensor) for name, tensor in self.marks.items()},
            grounding=tuple((slot, function(tensor)) for slot, tensor in self.grounding),
            notes={name: function(tensor) for name, tensor in self.notes.items()},
        )

    def to(self, device: torch.device) -> VisualMemory:
        """The memory on another device; it is copied once, then found again."""
        if self.slots.device == device or (self.is_empty and not self.kept):
            return self
        if device not in self._replicas:
            # What fills up is shared: a layer and its branches stay on their device.
            self._replicas[device] = replace(
                self,
                embeddings=self.embeddings.to(device),
                slots=self.slots.to(device),
                runs=None if self.runs is None else self.runs.mapped(lambda tensor: tensor.to(device)),
                kept={name: tensor.to(device) for name, tensor in self.kept.items()},
            )
        return self._replicas[device]


@dataclass(frozen=True, eq=False)
class Coverage:
    """The part of a KV cache that its memory covers.

    Attributes:
        num_tokens: How many tokens were read, an int or, for a static cache, a tensor.
        num_keys: The length of the cache after the last of them, likewise. More in the cache came without the tap.
        is_evicted: Whether some layer has lost keys during a forward, so that keys no longer belong to tokens in turn.
        read_by: The name of the tap that read the last of them.
    """

    num_tokens: int | torch.Tensor = 0
    num_keys: int | torch.Tensor = 0
    is_evicted: bool = False
    read_by: str | None = None


class _FollowedByMemory(Cache):
    """Mixed into a cache's class, so that what the cache does to its rows also happens to the memory on it."""

    visual_memory: VisualMemory
    visual_coverage: Coverage

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__bases__[1], dict(self.__dict__))

    def _map_memory(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.visual_memory = self.visual_memory.mapped(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_memory(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_memory(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_memory(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        length, coverage = int(self.get_seq_length()), self.visual_coverage
        # Before a forward without the adapter fills it up again. Of an evicted cache, nobody knows what is left.
        if self.is_compileable or (not coverage.is_evicted and length < coverage.num_keys):
            self.visual_memory = replace(self.visual_memory.cropped(length), notes={})
            self.visual_coverage = replace(coverage, num_tokens=length, num_keys=length)

    def reset(self) -> None:
        super().reset()
        self.visual_memory, self.visual_coverage = VisualMemory(), Coverage()


@functools.cache
def _followed(cache_class: type) -> type[Cache]:
    return type(cache_class.__name__, (_FollowedByMemory, cache_class), {"__module__": cache_class.__module__})


def _restored(cache_class: type, state: dict[str, Any]) -> Cache:
    cache = object.__new__(_followed(cache_class))
    cache.__dict__.update(state)
    return cache


def attach_memory(cache: Cache, memory: VisualMemory, coverage: Coverage) -> None:
    """Put `memory` on `cache`, where it shares the cache's life: copies, beams, row selection, reset.

    Args:
        cache: The cache.
        memory: What is remembered of its tokens.
        coverage: Which tokens these are.
    """
    if not isinstance(cache, _FollowedByMemory):
        cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]
    cache.visual_memory, cache.visual_coverage = memory, coverage


def memory_of(cache: Cache | None) -> VisualMemory | None:
    """The memory on `cache`, `None` if there is none."""
    return getattr(cache, "visual_memory", None)


def coverage_of(cache: Cache | None) -> Coverage:
    """The part of `cache` that its memory covers."""
    return getattr(cache, "visual_coverage", Coverage())


def keys_by_layer(cache: Cache | None) -> list[int | None]:
    """How many keys each layer of a cache holds. `None`: the layer keeps none yet, or has room for a fixed number."""
    return [_num_keys(layer) for layer in getattr(cache, "layers", ())]


def num_fixed_keys(cache: Cache | None) -> int:
    """How many keys, from the first, stay in layers that drop others: those of the prompt, or none.

    In reference sliding-window attention (Unlimited-OCR), a window slides only over what is decoded.
    """
    return max([0, *[_num_fixed(layer) for layer in getattr(cache, "layers", ())]])


def capacity_of(cache: Cache | None) -> int | None:
    """How many tokens a static cache has room for. `None`: it grows, or a window slides over it in every layer."""
    static = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StaticLayer)]
    lengths = [layer.max_cache_len for layer in static if not layer.is_sliding]
    return max(lengths) if lengths else None


def has_lost_keys(cache: Cache, keys_before: list[int | None], seq_len: int) -> bool:
    """Whether keys were taken out of a cache while a forward ran.

    Args:
        cache: The cache after the forward.
        keys_before: What `keys_by_layer` said before it.
        seq_len: How many tokens the forward read.
    """
    for layer_idx, num_keys in enumerate(keys_by_layer(cache)):
        if num_keys is None:
            continue
        layer = cache.layers[layer_idx]
        expected = seq_len + ((keys_before[layer_idx] or 0) if layer_idx < len(keys_before) else 0)
        if layer.is_sliding:
            expected = min(expected, _num_fixed(layer) + layer.sliding_window - 1)
        if num_keys < expected:
            return True
    return False


def _num_keys(layer: Any) -> int | None:
    if layer.is_compileable or getattr(layer, "keys", None) is None:
        return None
    # A layer with a sliding window counts all tokens; one that quantises holds only its last keys as they are.
    if not layer.is_sliding:
        return layer.get_seq_length()
    held = [keys for keys in (getattr(layer, "prefill_keys", None), layer.keys) if keys is not None and keys.numel()]
    return sum(keys.shape[-2] for keys in held)


def _num_fixed(layer: Any) -> int:
    return getattr(layer, "prefill_cumulative_length", 0)

"""`VisualContext`: what one forward knows about its tokens, sent down to the attention as a keyword argument."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from .memory import Coverage, Runs, VisualMemory
from .positions import (
    EMPTY_SLOT,
    MULTIMODAL_AXES,
    filled_up,
    gather_rows,
    modalities,
    on_same_axes,
    pack,
    run_anchors,
    run_starts,
)
from .visibility import real_tokens


CONTEXT = "visual_context"  # the keyword argument
T = TypeVar("T")
# Makes the error for layers that a forward did not reach, from their indices and the name of the model's class.
NotReached = Callable[[list[int], str], NotImplementedError]


def dropped_keywords(layers: list[int], model: str) -> NotImplementedError:
    """The error for decoder layers that keep the context from their attention."""
    return NotImplementedError(
        f"The decoder layers of {model} do not pass keyword arguments on to their attention, or the attention "
        "was replaced after the adapter was attached, so that the adapter learns nothing about the image. Replace "
        "modules before you attach the adapter; if none was replaced, it cannot work on this model."
    )


class VisualContext:
    """What one forward knows about its tokens.

    Args:
        visual_mask: Which of this forward's tokens are visual, `(batch, seq_len)`, bool. `None`: none is.
        attention_mask: The mask the model was given, in any of its forms.

    Attributes:
        visual_positions: Where the visual tokens are in this forward, as `pack` gives them. `None`: nowhere.
        memory: The tokens known up to here, this forward's included.
        inputs_embeds: What the text model was given, `(batch, seq_len, hidden_size)`, without gradients. `None` where
            it was given token ids.
        cache: The KV cache that the text model was given. `None`: none.
        notes: What adapters noted at the end of the forward before, by name, `(batch, ...)`.
        past_length: Number of tokens read before this forward; a tensor for a static cache.
        slots: Where the tokens are in the cache, `(batch, seq_len)`, int64, `EMPTY_SLOT` for padding. `None`: one
            after the other, from `past_length` on.
        whole_length: The length of the whole rows of the batch, if `slots` are only a part of them.
        is_evicted: Whether the cache has lost keys of some tokens.
        keys_before: How many keys each layer of the cache held before this forward.
        num_fixed_keys: How many keys, from the first, layers with a sliding window keep for good.
        capacity: How many tokens a static cache has room for. `None`: as many as come.
        position_ids: What the rotary embedding was given, `(batch, seq_len, axes)`, int64.
        anchors: The position of the first token of the run that holds each token, `(batch, seq_len)`, int64.
        keeps: What is to be kept of every token in the memory, by name: a function that gives it for this forward's
            tokens, `(batch, seq_len, axes)`, int64.
        marks_before: What was noted of the tokens before this forward, as `VisualMemory.marks`.
        stages: By layer index, what adapters do to the attention there.
        observers: Each is called with every `AttentionCall` of this forward, once its output is made.
        hidden_rows: The rows of the batch in which text does not attend to visual tokens, `(batch,)`, bool. `None`:
            none.
        steering: What keeps these hidden from text, for as long as this forward is kept.
        text_alone: The context that decoder layers are given instead, if they are to compute only the text.
        handed_on: What a method hands from layer to layer, by its owner and then by layer index. A layer that gradient
            checkpointing runs again finds what it made.
        awaited: The layers that this forward still has to reach, by the function that makes the error if it does not.
        adapter_names: The adapter that acts on each row of the batch. `None`: the active ones act on all.
        refusal: Why nobody can know what is visual here.
    """

    def __init__(self, visual_mask: torch.Tensor | None, attention_mask: Any = None):
        self.visual_mask = visual_mask
        self.attention_mask = attention_mask
        self.visual_positions: torch.Tensor | None = None
        self.memory = VisualMemory()
        self.inputs_embeds: torch.Tensor | None = None
        self.cache: Any = None
        self.notes: dict[str, torch.Tensor] = {}
        self.past_length: int | torch.Tensor = 0
        self.slots: torch.Tensor | None = None
        self.whole_length = 0
        self.is_evicted = False
        self.keys_before: list[int | None] = []
        self.num_fixed_keys = 0
        self.capacity: int | None = None
        self.batch_size = self.seq_len = 0
        self.device = torch.device("cpu")
        self.records_gradients = False
        self.position_ids: torch.Tensor | None = None
        self.anchors: torch.Tensor | None = None
        self.keeps: dict[str, Callable[[VisualContext], torch.Tensor]] = {}
        self.marks_before: dict[Hashable, torch.Tensor] = {}
        self.stages: dict[int, Any] = {}
        self.observers: list[Callable[[Any], None]] = []
        self.hidden_rows: torch.Tensor | None = None
        self.steering: Any = None
        self.text_alone: VisualContext | None = None
        self.handed_on: dict[Any, dict[int, Any]] = {}
        self.awaited: dict[NotReached, set[int]] = {}
        self.adapter_names: list[str] | None = None
        self.refusal: Exception | None = None
        self._derived: dict[Any, Any] = {}
        self._is_first = False
        self._moved: list[VisualContext] = []

    def read(self, inputs_embeds: torch.Tensor, memory: VisualMemory, coverage: Coverage) -> None:
        """Take in the text model's inputs: extends `memory` by this forward's visual tokens.

        Args:
            inputs_embeds: `(batch, seq_len, hidden_size)`.
            memory: What the cache remembered so far.
            coverage: The tokens that it covers.
        """
        self.notes = memory.notes
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and memory.slots.is_inference():
            memory = memory.mapped(torch.clone)  # autograd does not keep tensors of inference mode
        memory = replace(memory, notes={})  # a dictionary of its own, which layers may write into
        self.memory, self.is_evicted, self._is_first = memory, coverage.is_evicted, memory.runs is None
        self.marks_before = memory.marks
        if memory.marks:  # other forwards may need them as they are, and what nobody goes on noting is forgotten
            self.memory = memory = replace(memory, marks={})
        past_length = coverage.num_tokens
        # A static cache counts in place, layer by layer.
        self.past_length = past_length.clone() if isinstance(past_length, torch.Tensor) else past_length
        self.batch_size, self.seq_len = inputs_embeds.shape[:2]
        self.device = inputs_embeds.device
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

    def note_positions(self, position_ids: torch.Tensor) -> None:
        """Take in what the rotary embedding is given. Only the first call of a forward counts.

        Args:
            position_ids: `(batch or 1, seq_len)` or `(axes, batch or 1, seq_len)`, integer. Those of the tokens in the
                cache may come before, as in Qwen4-Exp.
        """
        if self.position_ids is not None or self.refusal is not None:
            return
        by_axis = position_ids if position_ids.dim() == 3 else position_ids.unsqueeze(0)
        if position_ids.dim() == 3 and len(by_axis) == 1:  # generate's shorthand for a turn of text
            by_axis = by_axis.expand(MULTIMODAL_AXES, -1, -1)
        by_axis = by_axis[..., -self.seq_len :]
        self.position_ids = by_axis.movedim(0, -1).expand(self.batch_size, self.seq_len, -1).long()
        is_first = self.memory.runs is None or self.memory.runs.last_start < 0
        self.anchors = self._read_runs(self.position_ids[..., 0])
        self._keep_tokens(is_first)
        for moved in self._moved:  # of a text model that was moved as a whole, before it asked for positions
            moved._take_positions(self)

    def _keep_tokens(self, is_first: bool) -> None:
        """Add these tokens to what is kept of all, unless others were read before anybody kept it."""
        if not self.keeps and not self.memory.kept:
            return
        kept = {}
        for name, of_tokens in self.keeps.items():
            new = of_tokens(self)
            if name in self.memory.kept:
                kept[name] = self._behind(*on_same_axes(self.memory.kept[name], new))
            elif is_first:
                kept[name] = self._behind(new[:, :0], new)
        self.memory = replace(self.memory, kept=kept)

    def mark(self, name: Hashable, of_tokens: torch.Tensor) -> None:
        """Note something of this forward's tokens, after what was noted of earlier ones. Doing it twice does no harm.

        Args:
            name: The name of the note. If it is missing for earlier tokens, nothing is noted.
            of_tokens: `(batch, seq_len, ...)`.
        """
        before, past_length = self.marks_before.get(name, of_tokens[:, :0]), self.past_length
        if isinstance(past_length, int):  # a static cache has room for all; what was cropped is written over
            before = before[:, :past_length]
            is_known = before.shape[1] == past_length
        else:
            is_known = name in self.marks_before or self._is_first
        if is_known:
            self.memory.marks[name] = self._behind(before.to(of_tokens.device), of_tokens)

    def _behind(self, before: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
        """What was noted of earlier tokens and of these.

        With a static cache the tensor is as long as the cache, so that a compiled step stays as it is.
        """
        if self.capacity is None:
            return torch.cat([before, of_tokens], 1)
        return filled_up(before, self.capacity).index_copy(1, self.own_slots()[0].to(of_tokens.device), of_tokens)

    def own_slots(self) -> torch.Tensor:
        """Where this forward's tokens are in the cache, `(batch, seq_len)`, int64."""
        return self.derived("own slots", self._find_own_slots)

    def _find_own_slots(self) -> torch.Tensor:
        if self.slots is not None:
            return self.slots
        slots = torch.arange(self.seq_len, device=self.device) + self.past_length
        return slots.expand(self.batch_size, -1)

    def noted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` and `anchors`.

        Raises:
            NotImplementedError: The text model did not ask its rotary embedding for this forward's positions.
        """
        if self.position_ids is None or self.anchors is None:
            raise NotImplementedError(
                "The text model did not call its rotary_emb in this forward, so that the positions of its tokens are "
                "not known. The adapter needs them; take it off with unload()."
            )
        return self.position_ids, self.anchors

    def _read_runs(self, positions: torch.Tensor) -> torch.Tensor:
        """The anchors of this forward's tokens; runs that start here go into the memory."""
        runs = self.memory.runs
        if runs is None:
            runs = Runs.none(self.batch_size, self.device)
        if self.visual_mask is None and not runs.awaits_text:  # the decode path: text goes on
            return runs.open_anchor.unsqueeze(1).expand_as(positions)
        visual_mask = torch.zeros_like(positions, dtype=torch.bool) if self.visual_mask is None else self.visual_mask
        first_column = None if self.is_evicted else self.past_length
        modality = modalities(visual_mask, real_tokens(self.attention_mask, visual_mask.shape, first_column))
        starts = run_starts(modality, runs.open_modality)
        found = pack(starts)
        first = found.clamp(min=0)
        slots = torch.where(found >= 0, found + self.past_length, EMPTY_SLOT)
        extended = runs.extended(slots, positions.gather(1, first), modality.gather(1, first))
        self.memory = replace(self.memory, runs=extended)
        return run_anchors(starts, positions, runs.open_anchor)

    def check(self) -> None:
        """Raise the refusal if there is one. Whoever is about to read the context calls this first."""
        if self.refusal is not None:
            raise copy.copy(self.refusal)  # with a traceback of its own, whose frames hold this context

    def check_keys(self) -> None:
        """Also raise a NotImplementedError if nobody can know which tokens the keys in the cache belong to."""
        self.check()
        if self.is_evicted:
            raise NotImplementedError(
                "Keys of this KV cache were taken out during a forward, by kvpress or another compression of the "
                "cache, so that the tokens of the other keys are not known. What changes or observes attention needs "
                "to know them. Start with a new cache without compression, or disable the adapter."
            )

    def to(self, device: torch.device | str | int, *args: Any, **kwargs: Any) -> VisualContext:
        """The context on another device (accelerate moves the keyword arguments of a dispatched model's modules)."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = VisualContext(self.visual_mask)
        moved.__dict__.update(self.__dict__)
        moved.device = device
        moved._derived = {}
        moved._moved = []
        moved.notes = {name: tensor.to(device) for name, tensor in self.notes.items()}
        for name in ("visual_mask", "visual_positions", "past_length", "slots", "hidden_rows"):
            value = getattr(self, name)
            setattr(moved, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        moved._take_positions(self)
        self._moved.append(moved)
        return moved

    def _take_positions(self, other: VisualContext) -> None:
        """Take over what another context of this forward knows by now about positions, on this device."""
        self.memory = other.memory.to(self.device)
        for name in ("position_ids", "anchors"):
            value = getattr(other, name)
            setattr(self, name, None if value is None else value.to(self.device))

    def tail(self, length: int) -> VisualContext:
        """The context of only the last `length` tokens. Some models leave the others out of their last layers.

        Gemma 4 does so in layers that share the keys and values of earlier ones, if only the last logits are wanted.
        """
        if length == self.seq_len:
            return self
        return self.derived(("tail", length), lambda: self._make_tail(length))

    def _make_tail(self, length: int) -> VisualContext:
        cut = copy.copy(self)
        cut._derived = {}
        cut.past_length = self.past_length + self.seq_len - length
        cut.seq_len = length
        if self.inputs_embeds is not None:
            cut.inputs_embeds = self.inputs_embeds[:, -length:]
        cut.visual_positions = None  # the visual tokens have no hidden states there
        if self.visual_mask is not None:
            cut.visual_mask = self.visual_mask[:, -length:]
        return cut

    def real_text(self) -> torch.Tensor:
        """Which tokens of this forward are text and no padding, `(batch, seq_len)`, bool."""
        return self.derived("real text", self._find_real_text)

    def _find_real_text(self) -> torch.Tensor:
        shape = (self.batch_size, self.seq_len)
        text = torch.ones(shape, dtype=torch.bool, device=self.device)
        if self.visual_mask is not None:
            text = text & ~self.visual_mask
        real = real_tokens(self.attention_mask, shape, self.past_length)
        return text if real is None else text & real.to(self.device)

    def leave_out_images(self) -> None:
        """Have decoder layers compute only the text. The forward begins a conversation and needs nothing else."""
        text = copy.copy(self)
        text._derived, text._moved = {}, []
        text.slots = pack(self.real_text())
        text.seq_len, text.whole_length = text.slots.shape[1], self.seq_len
        text.visual_mask = torch.zeros_like(text.slots, dtype=torch.bool)
        text.visual_positions = text.inputs_embeds = text.hidden_rows = text.text_alone = None
        self.text_alone = text

    def hide_images(self, rows: torch.Tensor, steering: Any) -> None:
        """Hide visual tokens from text in some rows of the batch, beside those that already hide them.

        Args:
            rows: `(batch,)`, bool.
            steering: What hides them. It is kept until no layer can run again.
        """
        rows = rows.to(self.device)
        self.hidden_rows = rows if self.hidden_rows is None else self.hidden_rows | rows
        self.steering = steering

    def await_layer(self, layer_idx: int, not_reached: NotReached) -> None:
        """Have the forward raise an error at its end unless it has `reached` a layer.

        Args:
            layer_idx: The layer.
            not_reached: Makes the error, from the layers that were not reached and the name of the model's class.
        """
        self.awaited.setdefault(not_reached, set()).add(layer_idx)

    def reached(self, layer_idx: int, not_reached: NotReached) -> None:
        """Note that a layer is reached, which may have been awaited."""
        if not_reached in self.awaited:
            self.awaited[not_reached].discard(layer_idx)

    def missed(self, model: str) -> NotImplementedError | None:
        """The error for a forward that has ended, if an adapter did not act in a layer in which it should have."""
        for not_reached, layers in self.awaited.items():
            if layers:
                return not_reached(sorted(layers), model)
        return None

    def derived(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, made once in this forward for all layers that ask for the same `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def images(self, image_gap: int, max_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where images begin, and where the text after them begins: see `Runs.images`."""
        self.noted()
        runs = cast(Runs, self.memory.runs)  # there are some once positions are noted
        return runs.images(image_gap, max_images)

    @property
    def only_text_after_images(self) -> bool:
        """Whether all tokens are known to be text with a visual token before them, without waiting for the device."""
        return self.visual_mask is None and self.memory.is_dense and not self.memory.is_empty

    def text_after_images(self) -> torch.Tensor:
        """Which tokens of this forward are text with a visual token before them, `(batch, seq_len)`, bool."""
        return self.derived("text after images", self._find_text_after_images)

    def _find_text_after_images(self) -> torch.Tensor:
        if self.memory.is_empty:
            return torch.zeros(self.batch_size, self.seq_len, dtype=torch.bool, device=self.device)
        if self.visual_mask is None:  # whatever is in memory comes before these tokens
            return (self.memory.slots >= 0).any(1, keepdim=True).expand(self.batch_size, self.seq_len)
        return ~self.visual_mask & (self.own_slots() > self.first_visual_slots())

    def first_visual_slots(self) -> torch.Tensor:
        """The slot of each row's first visual token, `(batch, 1)`, int64; the largest there is in a row without."""
        slots, none = self.memory.slots, torch.iinfo(torch.long).max
        return torch.where(slots >= 0, slots, none).amin(1, keepdim=True)

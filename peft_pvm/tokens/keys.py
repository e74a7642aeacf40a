"""`Keys`: for each key that a layer hands to its attention, the token that it belongs to."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .context import VisualContext
from .positions import filled_up
from .visibility import Visibility


@dataclass(frozen=True)
class Keys:
    """The keys that a layer hands to its attention in one forward, and which tokens they belong to.

    Layers with a sliding window hand out fewer keys than there are tokens, static caches hand out more. What is worked
    out is kept in the context, for all layers that hand out as many.

    Attributes:
        context: What the forward knows about its tokens.
        number: How many keys there are.
    """

    context: VisualContext
    number: int

    @property
    def dropped(self) -> int | torch.Tensor:
        """How many tokens have no key here; a tensor for a static cache. They come after the first, which stay."""
        dropped = self.context.past_length + self.context.seq_len - self.number
        return max(dropped, 0) if isinstance(dropped, int) else dropped.clamp(min=0)

    @property
    def slots(self) -> torch.Tensor:
        """Where the tokens of the keys are in the cache, `(number,)`, int64."""
        keys, dropped = torch.arange(self.number, device=self.context.device), self.dropped
        if isinstance(dropped, int) and dropped == 0:
            return keys
        return keys + dropped * (keys >= self.context.num_fixed_keys)

    @property
    def visual(self) -> torch.Tensor:
        """Which keys belong to visual tokens, `(batch, number)`, bool."""
        return self.context.derived(("visual keys", self.number), self._find_visual)

    def _find_visual(self) -> torch.Tensor:
        context = self.context
        mask = torch.zeros(context.batch_size, self.number + 1, dtype=torch.bool, device=context.device)
        if context.memory.is_empty:
            return mask[:, : self.number]
        return mask.scatter_(1, self.visual_columns, True)[:, : self.number]

    @property
    def visual_columns(self) -> torch.Tensor:
        """Which of the keys belong to the visual tokens of the memory, `(batch, num_visual)`, int64.

        `number` where there is none, or where it fell out of a sliding window.
        """
        return self.context.derived(("visual columns", self.number), self._find_visual_columns)

    @property
    def has_all_visual(self) -> bool:
        """Whether each visual token is known to have its key at its place in the cache, and all rows have as many."""
        dropped = self.dropped
        return self.context.memory.is_dense and isinstance(dropped, int) and dropped == 0

    def _find_visual_columns(self) -> torch.Tensor:
        slots, fixed = self.context.memory.slots, self.context.num_fixed_keys
        if self.has_all_visual:
            return slots
        columns = slots - self.dropped * (slots >= fixed)
        return torch.where((slots >= 0) & (columns >= slots.clamp(max=fixed)), columns, self.number)

    @property
    def text_before_images(self) -> torch.Tensor:
        """Which keys belong to text before a row's first visual token, `(batch, number)`, bool: none without one."""
        return self.context.derived(("text before images", self.number), self._find_text_before_images)

    def _find_text_before_images(self) -> torch.Tensor:
        context = self.context
        if context.memory.is_empty:
            return torch.zeros(context.batch_size, self.number, dtype=torch.bool, device=context.device)
        return (self.slots < context.first_visual_slots()) & (context.memory.slots >= 0).any(1, keepdim=True)

    def images(self, image_gap: int, max_images: int) -> torch.Tensor:
        """Which image each key belongs to, if it is of a visual token: `(batch, number)`, int64. Else anything.

        Args:
            image_gap: See `Runs.images`.
            max_images: Likewise.
        """
        starts, _ = self.context.images(image_gap, max_images)
        slots = self.slots.expand(len(starts), -1).contiguous()
        return (torch.searchsorted(starts, slots, right=True) - 1).clamp(min=0)

    def kept(self, name: str) -> torch.Tensor | None:
        """What is kept of the keys' tokens, `(batch, number, axes)`, int64. `None` if it was not kept of all."""
        kept = self.context.memory.kept.get(name)
        return None if kept is None else self.context.derived(("kept", name, self.number), lambda: self._of(kept))

    def marks(self, name: Hashable) -> torch.Tensor | None:
        """What layers noted of the keys' tokens, `(batch, number, ...)`. `None` if it was not noted of all tokens."""
        marks = self.context.memory.marks.get(name)
        return None if marks is None else self._of(marks.to(self.context.device))

    def _of(self, of_tokens: torch.Tensor) -> torch.Tensor:
        if of_tokens.shape[1] == self.number:  # every token has its key
            return of_tokens
        return filled_up(of_tokens, self.number).index_select(1, self.slots)

    def padding(self, num_queries: int) -> Visibility | None:
        """Which keys are padding, by the mask that the model was given. `None` if that mask does not say.

        Args:
            num_queries: How many queries there are.
        """
        return self.context.derived(("padding", num_queries, self.number), lambda: self._find_padding(num_queries))

    def _find_padding(self, num_queries: int) -> Visibility | None:
        context, dropped = self.context, self.dropped
        mask = context.attention_mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            slots = self.slots.to(mask.device)
            mask = F.pad(mask.bool(), (0, self.number)).index_select(1, slots)  # a static cache is not full
        elif mask is not None:
            masks = mask.values() if isinstance(mask, Mapping) else [mask]
            fits = [one for one in masks if isinstance(one, torch.Tensor) and one.shape[-1] == self.number]
            if not fits:
                return None
            mask = fits[0]
        mask = None if mask is None else mask.to(context.device)
        sizes = num_queries, self.number, context.past_length + context.seq_len - num_queries - dropped
        return Visibility(mask, *sizes, device=context.device, gap=(context.num_fixed_keys, dropped))

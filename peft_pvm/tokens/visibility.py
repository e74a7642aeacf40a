"""Which keys a query may attend to, read off the masks of every attention kernel, without any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn.attention.flex_attention import BlockMask


T = TypeVar("T")


@dataclass(eq=False)
class Visibility:
    """Which of `num_keys` keys each of `num_queries` queries may attend to.

    Args:
        attention_mask: What the kernel is given. `None`: causal. `(batch, num_keys or fewer)`: causal, and False or 0
            at padding. `(batch or 1, heads or 1, num_queries, num_keys or more)`: bool, or float to be added to the
            scores. Or the `BlockMask` of flex attention.
        num_queries: Length of the queries.
        num_keys: Length of the keys.
        first_column: The key that belongs to the first query; the others follow. A tensor for a static cache.
        is_causal: Whether a query sees only keys up to its own, where the mask does not say.
        sliding_window: How many keys up to its own a query sees, where the mask does not say. `None`: all.
        device: Where to build masks.
        gap: After how many keys how many others are left out, none of them padding.
        ranked_by: Gives where padding is looked up, if this mask hides other tokens as well; `None`: here. It is asked
            when somebody wants to know, which few do.
    """

    attention_mask: Any
    num_queries: int
    num_keys: int
    first_column: int | torch.Tensor
    is_causal: bool = True
    sliding_window: int | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    gap: tuple[int, int | torch.Tensor] = (0, 0)
    ranked_by: Callable[[], Visibility | None] = lambda: None
    _ranks: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False, repr=False)
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def derived(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, made once for all layers that are given the same mask and ask for the same `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    @property
    def columns(self) -> torch.Tensor:
        """The key that belongs to each query, `(num_queries,)`, int64."""
        return torch.arange(self.num_queries, device=self.device) + self.first_column

    @property
    def is_plain_causal(self) -> bool:
        """Whether every query sees all keys up to its own and no others."""
        return self.attention_mask is None and self.is_causal and self.sliding_window is None

    def mask(self, queries: slice = slice(None), keys: slice = slice(None)) -> torch.Tensor | None:
        """The part of the mask for some queries and some keys.

        Returns:
            Bool, broadcastable to `(batch, heads, queries, keys)`. `None`: each sees all.
        """
        mask = self.attention_mask
        if self.mask_decides:
            return self._of_four_axes(queries, keys)

        visible = None
        if self.is_plain_causal and isinstance(self.first_column, int):
            first_query, last_key = queries.indices(self.num_queries)[0], keys.indices(self.num_keys)[1] - 1
            if last_key <= self.first_column + first_query:
                return None
        if self.num_queries > 1 or self.sliding_window is not None or mask is not None:
            own, others = self.columns[queries][:, None], self._keys(keys)
            visible = others <= own if self.is_causal else torch.ones_like(others <= own)
            if self.sliding_window is not None:
                visible = visible & (others > own - self.sliding_window)
            visible = visible[None, None]
        if mask is not None:
            real = self._padded(mask)[:, None, None, keys]
            visible = real if visible is None else visible & real
        return visible

    def bias(self, queries: slice = slice(None), keys: slice = slice(None)) -> torch.Tensor | None:
        """What a float mask adds to the scores of the keys that are visible, shaped like `mask`."""
        mask = self.attention_mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.dtype == torch.bool:
            return None
        return mask[:, :, queries, : self.num_keys][..., keys]

    def entries(self) -> tuple[torch.Tensor | None, float | None]:
        """The mask as one tensor, for a kernel that reads it by itself: a rule in Python is written out whole.

        Returns:
            `(batch or 1, heads or 1, num_queries or 1, num_keys)`, bool, or float to be added to the scores, `None`
            without a mask; and for a float mask what an entry must be above for its key to be visible.
        """
        mask = self.attention_mask
        if mask is None:
            return None, None
        if isinstance(mask, BlockMask):
            return self.mask(), None
        if mask.dim() == 2:
            return self._padded(mask)[:, None, None], None
        mask = mask[..., : self.num_keys]
        return mask, None if mask.dtype == torch.bool else _least(mask)

    @property
    def mask_decides(self) -> bool:
        """Whether the mask by itself says what is visible, unlike one that only marks padding."""
        mask = self.attention_mask
        return isinstance(mask, BlockMask) or (mask is not None and mask.dim() == 4)

    @property
    def differs_by_head(self) -> bool:
        """Whether heads may see different keys, as in block-sparse attention."""
        return isinstance(self.attention_mask, torch.Tensor) and self.mask_decides and self.attention_mask.shape[1] > 1

    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many real tokens come before each key and before each query's own key.

        A key that no query sees is taken for padding.

        Returns:
            `(batch or 1, 1, num_keys)` and `(batch or 1, 1, num_queries)`, int64. Of padding itself: anything.
        """
        if (elsewhere := self.ranked_by()) is not None:
            return elsewhere.ranks()
        if self._ranks is None:  # asked by every layer
            self._ranks = self._count_ranks()
        return self._ranks

    def _count_ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        real = self._real_keys()
        ranks = self._keys(slice(None))[None, None] if real is None else (real.long().cumsum(1) - 1).unsqueeze(1)
        if self.gap[0]:
            ranks = ranks + self.gap[1] * (self._keys(slice(None)) >= self.gap[0])
        return ranks, ranks[..., self.columns]

    def _real_keys(self) -> torch.Tensor | None:
        """Which keys are not padding, `(batch or 1, num_keys)`. `None`: all."""
        mask = self.attention_mask
        if mask is None:
            return None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return self._padded(mask)
        return self._of_four_axes(slice(None), slice(None)).any(dim=2).any(dim=1)

    def _of_four_axes(self, queries: slice, keys: slice) -> torch.Tensor:
        mask = self.attention_mask
        if isinstance(mask, BlockMask):
            batch = torch.arange(mask.shape[0], device=self.device)[:, None, None, None]
            rows = torch.arange(self.num_queries, device=self.device)[queries][:, None]
            part = mask.mask_mod(batch, torch.zeros_like(batch), rows, self._keys(keys))
            return part[(None,) * (4 - part.dim())]  # a rule that does not look at the batch gives no such axis
        part = mask[:, :, queries, : self.num_keys][..., keys]
        return part if part.dtype == torch.bool else part > _least(part)

    def _padded(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask of two axes, as long as there are keys: what a static cache has not filled is hidden."""
        return torch.nn.functional.pad(mask.bool(), (0, max(self.num_keys - mask.shape[1], 0)))[:, : self.num_keys]

    def _keys(self, keys: slice) -> torch.Tensor:
        return torch.arange(self.num_keys, device=self.device)[keys]


def real_tokens(
    attention_mask: Any, shape: tuple[int, ...] | torch.Size, first_column: int | torch.Tensor | None
) -> torch.Tensor | None:
    """Which tokens of a forward are not padding.

    Args:
        attention_mask: The mask a model is given, in any form that `Visibility` takes or a dict of them by layer type,
            of which that of full attention counts.
        shape: `(batch, seq_len)` of this forward.
        first_column: The mask's column for the first of them. `None`: the last columns are theirs.

    Returns:
        `(batch, seq_len)`, bool: in a mask of four axes, the tokens that see themselves. `None`: all.
    """
    if isinstance(attention_mask, Mapping):
        by_type = [mask for mask in attention_mask.values() if mask is not None]
        attention_mask = attention_mask.get("full_attention", by_type[0] if by_type else None)
    if attention_mask is None:
        return None
    batch, seq_len = shape
    if first_column is None:
        first_column = attention_mask.shape[-1] - seq_len
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        # A mask made beforehand for a static cache is longer than what has been read.
        columns = torch.arange(seq_len, device=attention_mask.device) + first_column
        return attention_mask.index_select(1, columns).bool()
    device = first_column.device if isinstance(first_column, torch.Tensor) else None
    num_keys = attention_mask.shape[-1]
    visibility = Visibility(
        attention_mask, seq_len, num_keys, first_column, device=device or _device_of(attention_mask)
    )
    visible = visibility._of_four_axes(slice(None), slice(None))[:, 0].expand(batch, seq_len, num_keys)
    return visible.gather(2, visibility.columns.expand(batch, -1).unsqueeze(2)).squeeze(2)


def parts_rows(mask: Any, visual_mask: torch.Tensor) -> bool:
    """Whether a mask divides a row of the batch after a visual token, so that what follows sees nothing before it.

    Waits for the device.

    Args:
        mask: As a model is given it. Only one of four axes, for all pairs of tokens, can divide rows, also as a
            `BlockMask`. It may have more columns, as for a static cache.
        visual_mask: Which tokens are visual, `(batch, seq_len)`, bool.
    """
    seq_len = visual_mask.shape[1]
    shape: tuple[int, ...] = getattr(mask, "shape", ())
    if len(shape) != 4 or shape[2] != seq_len or shape[3] < seq_len:
        return False
    visibility = Visibility(mask, seq_len, seq_len, 0, device=_device_of(mask))
    sees = visibility._of_four_axes(slice(None), slice(None)).any(1)
    first_seen = torch.where(sees.any(-1), sees.int().argmax(-1), seq_len)
    seen_from_here_on = first_seen.flip(1).cummin(1).values.flip(1)  # the first key
    places = visibility.columns
    is_parted = (seen_from_here_on >= places) & (seen_from_here_on < seq_len)
    return bool((is_parted & (visual_mask.cumsum(1) > visual_mask).to(sees.device)).any())


def _least(mask: torch.Tensor) -> float:
    """What an entry of a mask that is added to the scores must be above for its key to be visible."""
    return torch.finfo(mask.dtype).min / 2


def _device_of(attention_mask: Any) -> torch.device:
    tensor = attention_mask.kv_num_blocks if isinstance(attention_mask, BlockMask) else attention_mask
    return tensor.device

"""`AttentionCall`: what an attention function is called with, and the kernel that it would have run."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..tokens.context import VisualContext
from ..tokens.keys import Keys
from ..tokens.visibility import Visibility


SINKS = ("s_aux", "sinks")  # keywords that bring attention sinks
WIDEST_FOR_FLASH = 256  # channels a head
CHANNELS = 8  # widths of heads that fused kernels take are multiples of this
Output = tuple[torch.Tensor, torch.Tensor | None]  # (batch, num_queries, heads, value_dim), and weights or None


@dataclass(eq=False)
class AttentionCall:
    """What an attention function is called with.

    Attributes:
        module: The attention module.
        query: Rotated queries, `(batch, heads, num_queries, head_dim)`.
        key: Rotated keys, the cached ones included, `(batch, kv_heads, num_keys, head_dim)`.
        value: `(batch, kv_heads, num_keys, value_dim)`.
        attention_mask: As the kernel wants it.
        context: What this forward knows.
        kernel: The kernel's name.
        kwargs: All other arguments.
        widened: Queries and keys with more channels, whose products are the scores. `None`: of `query` and `key`.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: Any
    context: VisualContext
    kernel: str
    kwargs: dict[str, Any]
    widened: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def scored_by(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries and keys whose products are the scores."""
        return self.widened or (self.query, self.key)

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        scaling = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def position_bias(self) -> torch.Tensor | None:
        """What the model adds to scores after scaling, by the distance, `(batch, heads, num_queries, num_keys)`."""
        return self.kwargs.get("position_bias")

    @property
    def wants_weights(self) -> bool:
        """Whether the caller asked for the attention weights."""
        config = self.module.config
        return bool(self.kwargs.get("output_attentions") or getattr(config, "output_attentions", False))

    @property
    def visibility(self) -> Visibility:
        """Which keys each query may attend to: one object for all layers that are given the same mask."""
        context, num_queries, num_keys = self.context, self.query.shape[2], self.key.shape[2]
        is_causal = self.kwargs.get("is_causal")
        is_causal = getattr(self.module, "is_causal", True) if is_causal is None else is_causal
        window = self.kwargs.get("sliding_window")

        def make() -> Visibility:
            first_query = context.past_length + context.seq_len - num_queries
            dropped = self.keys.dropped
            sizes = num_queries, num_keys, first_query - dropped
            gap = context.num_fixed_keys, dropped
            visibility = Visibility(self.attention_mask, *sizes, is_causal, window, self.query.device, gap)
            if visibility.mask_decides:  # it may hide more than padding
                # The context keeps the visibility, and would not go with its forward if that kept the context.
                owner = weakref.ref(context)
                visibility.ranked_by = lambda: Keys(cast(VisualContext, owner()), num_keys).padding(num_queries)
            return visibility

        # The mask lives as long as what is derived from it, so that its id names it.
        return context.derived((id(self.attention_mask), num_queries, num_keys, is_causal, window), make)

    @property
    def visual_queries(self) -> torch.Tensor:
        """Which queries are those of visual tokens, `(batch, num_queries)`, bool."""
        mask, num_queries = self.context.visual_mask, self.query.shape[2]
        if mask is None:
            return torch.zeros(self.query.shape[0], num_queries, dtype=torch.bool, device=self.query.device)
        return mask[:, -num_queries:]

    @property
    def visual_keys(self) -> torch.Tensor:
        """Which keys are those of visual tokens, `(batch, num_keys)`, bool."""
        return self.keys.visual

    @property
    def keys(self) -> Keys:
        """Which tokens the keys belong to."""
        return Keys(self.context, self.key.shape[2])

    @property
    def can_be_cut(self) -> bool:
        """Whether the kernel can be given only the first tokens: each sees those up to itself, without a mask."""
        is_whole = self.query.shape[2] == self.key.shape[2] and self.widened is None
        return is_whole and self.kernel == "sdpa" and self.position_bias is None and self.visibility.is_plain_causal

    def first(self, length: int) -> AttentionCall:
        """The call with only its first tokens, if it `can_be_cut`. It goes to the kernel, not to further stages."""
        query, key, value = (tensor[:, :, :length] for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def attend(self) -> Output:
        """What the attention function returns, with what the active adapters do to it.

        Raises:
            NotImplementedError: The kernel is asked for something that adapters do not know.
        """
        stages = self.context.stages.get(self.module.layer_idx)
        if stages is not None:
            sinks = [name for name in SINKS if self.kwargs.get(name) is not None]
            if sinks:
                raise NotImplementedError(
                    f"{type(self.module).__name__} has attention sinks ({sinks[0]}), which the active adapters do not "
                    "know."
                )
            return stages.attend(self)
        kernel = base_kernel(self.kernel, self.module)
        return kernel(self.query, self.key, self.value, self.attention_mask, **self.kwargs)

    def attend_to(self, value: torch.Tensor) -> torch.Tensor:
        """The output for other values: the same weights, whatever makes them.

        Args:
            value: Shaped as the call's own.

        Returns:
            `(batch, num_queries, heads, value_dim)`.
        """
        return replace(self, value=value).attend()[0]

    def row_scores(self, queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The scores of single queries, scaled, before the mask. The keys are read once, and not copied.

        Args:
            queries: A few for each head, `(batch, heads, number, head_dim)`.

        Returns:
            `(batch, kv_heads, heads / kv_heads, num_keys)` for each of them.
        """
        by_kv_head = queries.reshape(len(queries), self.key.shape[1], -1, queries.shape[-1])
        return scaled_products(by_kv_head, self.key, self.scaling).unflatten(2, (-1, queries.shape[2])).unbind(3)

    def last_row_weights(self) -> torch.Tensor:
        """The weights of the last query, `(batch, heads, num_keys)`, in fp32 at least. No stage has changed them."""
        (scores,) = self.row_scores(self.query[:, :, -1:])
        return self._row_weights(scores).squeeze(2)

    def attend_row(self, scores: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Output:
        """What the attention function returns for a single query, given its scores. The cache is read, and not copied.

        Args:
            scores: As `row_scores` gives them, changed or not.
            change: Makes other weights of those of all heads, `(batch, heads, 1, num_keys)` both. It is given fp32 at
                least, and may round them to the dtype of the values.
        """
        value, weights = self.value, self._row_weights(scores, is_final=change is None)
        weights = (weights if change is None else change(weights)).to(value.dtype)
        if dropout := self.kwargs.get("dropout", 0.0):
            weights = F.dropout(weights, dropout, self.module.training)
        by_kv_head = weights.reshape(len(weights) * value.shape[1], -1, weights.shape[-1])
        output = torch.bmm(by_kv_head, value.flatten(0, 1)).view(len(weights), 1, -1, value.shape[-1])
        return output, weights if self.kernel == "eager" or self.wants_weights else None

    def _row_weights(self, scores: torch.Tensor, is_final: bool = False) -> torch.Tensor:
        """The weights of the last query, `(batch, heads, 1, num_keys)`, from its scores as `row_scores` gives them.

        In fp32 at least, unless they are final: softmax computes in fp32 whatever it is given.
        """
        softcap, last = self.kwargs.get("softcap"), slice(-1, None)
        mask, bias = self.visibility.mask(last), self.visibility.bias(last)
        if not is_final or any(addend is not None for addend in (softcap, self.position_bias, bias)):
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.reshape(len(scores), -1, 1, scores.shape[-1])  # all heads, as masks have them
        if self.position_bias is not None:
            scores = scores + self.position_bias[:, :, last]
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.softmax(scores, -1)

    def run_kernel(self, scaling: float | None = None) -> Output:
        """The kernel's own output for these queries, keys and values.

        Args:
            scaling: What scores are multiplied by. `None`: what the model multiplies them by.

        Raises:
            NotImplementedError: Flash attention does not take heads as wide as stages have made them.
        """
        query, key = self.scored_by
        width, value_dim = key.shape[-1], self.value.shape[-1]
        if "flash" in self.kernel and width > max(WIDEST_FOR_FLASH, self.key.shape[-1]):
            raise NotImplementedError(
                f"The active adapters widen heads to {width} channels, and flash attention takes at most "
                f"{WIDEST_FOR_FLASH}. Use attn_implementation='sdpa'."
            )
        run = functools.partial(
            base_kernel(self.kernel, self.module),
            attention_mask=self.attention_mask,
            **{**self.kwargs, "scaling": self.scaling if scaling is None else scaling},
        )
        if self.widened is None and value_dim <= width:
            return run(query, key, self.value)
        # Fused kernels want values as wide as keys: the narrower are filled up.
        at_once = max(width if "flash" in self.kernel else width + CHANNELS, WIDEST_FOR_FLASH)
        outputs, all_weights = [], []
        for piece in self.value.split(at_once, -1):
            wide = max(width, piece.shape[-1] + -piece.shape[-1] % CHANNELS)
            output, weights = run(*(F.pad(tensor, (0, wide - tensor.shape[-1])) for tensor in (query, key, piece)))
            outputs.append(output[..., : piece.shape[-1]])
            all_weights.append(weights)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), all_weights[0]


def scaled_products(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """The products of queries and keys, `(batch, kv_heads, num_queries or num_keys, head_dim)`, times a number.

    Returns:
        `(batch, kv_heads, num_queries, num_keys)`. It is scaled before it is rounded, and in one operation.
    """
    keys = key.flatten(0, 1).transpose(1, 2)
    products = torch.baddbmm(key.new_empty(()), query.flatten(0, 1), keys, beta=0, alpha=scaling)
    return products.view(*query.shape[:3], -1)


def records_gradients(*tensors: Any) -> bool:
    """Whether gradients are recorded for what is computed from these values. Only tensors count."""
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


def base_kernel(kernel: str, module: nn.Module) -> Callable[..., tuple[Any, Any]]:
    """The function that `module` would call if adapters did not steer it."""
    if kernel == "eager":
        classes = type(module).__mro__
        first = next(number for number, cls in enumerate(classes) if "forward" in vars(cls))  # who calls it
        for cls in classes[first:]:
            function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
            if function is not None:
                return functools.partial(function, module)
    function = ALL_ATTENTION_FUNCTIONS[kernel]
    # Flash attention reads its own name from the module's config.
    return functools.partial(function, _Unsteered(module) if "flash" in kernel else module)


class _Unsteered:
    """A module, with its config as it is."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.config = module.config.config  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

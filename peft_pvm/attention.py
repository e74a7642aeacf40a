"""Attention that adapters steer: how scores are made, and how they are weighed.

While an adapter that changes attention is attached, every self-attention module of the text model looks up its kernel
through a view of its config, which names a steered function instead of the kernel. Nothing else sees another name, so
masks are those of the kernel, and `set_attn_implementation` is followed. Where no adapter acts, the steered function
calls the kernel with what it was given.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .context import CONTEXT, VisualContext
from .visibility import Visibility


PREFIX = "visual|"  # before the kernel's name


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
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: Any
    context: VisualContext
    kernel: str
    kwargs: dict[str, Any]

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        scaling = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

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
            first_column = first_query - context.first_key(num_keys)
            mask = self.attention_mask
            return Visibility(mask, num_queries, num_keys, first_column, is_causal, window, self.query.device)

        # The mask lives as long as what is derived from it, so that its id names it.
        return context.derived((id(self.attention_mask), num_queries, num_keys, is_causal, window), make)

    @property
    def visual_queries(self) -> torch.Tensor:
        """Which queries are those of visual tokens, `(batch, num_queries)`, bool."""
        mask, num_queries = self.context.visual_mask, self.query.shape[2]
        if mask is None:
            return torch.zeros(self.query.shape[0], num_queries, dtype=torch.bool, device=self.query.device)
        return mask[:, -num_queries:]

    def attend(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention function returns, with what the adapters do to it.

        Returns:
            `(batch, num_queries, heads, value_dim)`, and weights or `None`.

        Raises:
            NotImplementedError: The kernel is asked for something that adapters do not know.
        """
        steering = self.context.steering.get(self.module.layer_idx)
        if steering is not None:
            unknown = [name for name in ("s_aux", "position_bias") if self.kwargs.get(name) is not None]
            if unknown:
                raise NotImplementedError(
                    f"{type(self.module).__name__} has {unknown}, which DIPE and T-DRS do not know."
                )
            # With text alone there is one modality.
            scoring = None if self.context.memory.is_empty else steering.scoring
            if steering.weighing is not None:
                query, key = (self.query, self.key) if scoring is None else scoring.widen(self)
                return steering.weighing.attend(self, query, key)
            if scoring is not None:
                return scoring.attend(self)
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

    def run_kernel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """The kernel's own output for these queries, keys and values, scaled as they should have been."""
        kwargs = {**self.kwargs, "scaling": self.scaling}
        return base_kernel(self.kernel, self.module)(query, key, value, self.attention_mask, **kwargs)


class Scoring(Protocol):
    """How scores are made: DIPE."""

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention function returns."""

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, wider than those given, whose products are the scores."""


class Weighing(Protocol):
    """How scores are weighed: T-DRS."""

    def attend(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention function returns, with scores from `query` and `key`."""


@dataclass(frozen=True)
class Steering:
    """What adapters do to the attention of one layer. Each part is done by one adapter.

    Attributes:
        scoring: How scores are made. `None`: as the kernel makes them.
        weighing: How scores are weighed. `None`: as the kernel weighs them.
        adapters: By the name of the part, the adapter that does it.
    """

    scoring: Scoring | None = None
    weighing: Weighing | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def add(
        context: VisualContext,
        layer_idx: int,
        adapter_name: str,
        scoring: Scoring | None = None,
        weighing: Weighing | None = None,
    ) -> None:
        """Have an adapter do its part in one layer, for the length of a forward.

        Args:
            context: Of the forward.
            layer_idx: The layer.
            adapter_name: The adapter.
            scoring: How it makes scores, if it does.
            weighing: How it weighs scores, if it does.

        Raises:
            ValueError: Another adapter does the same part in this layer.
        """
        steering = context.steering.get(layer_idx, Steering())
        parts = {"scoring": scoring, "weighing": weighing}
        added = {part: how for part, how in parts.items() if how is not None}
        for part in added:
            if part in steering.adapters:
                raise ValueError(
                    f"The adapters {steering.adapters[part]!r} and {adapter_name!r} are active and both do the {part} "
                    f"of attention in decoder layer {layer_idx}, which one adapter can do. Choose one with "
                    "set_adapter, or give them different layers_to_transform."
                )
        adapters = {**steering.adapters, **dict.fromkeys(added, adapter_name)}
        context.steering[layer_idx] = replace(steering, **added, adapters=adapters)


def steered_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    kernel: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function as transformers calls it. Observers come after the output: they cannot change it."""
    context: VisualContext | None = kwargs.get(CONTEXT)
    if context is None:
        return base_kernel(kernel, module)(query, key, value, attention_mask, **kwargs)
    context.arrived_at.add(module.layer_idx)
    call = AttentionCall(module, query, key, value, attention_mask, context, kernel, kwargs)
    output = call.attend()
    for observe in context.observers:
        observe(call)
    return output


def base_kernel(kernel: str, module: nn.Module) -> Callable[..., tuple[Any, Any]]:
    """The function that `module` would call if it were not steered."""
    if kernel == "eager":
        for cls in type(module).__mro__:
            function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
            if function is not None:
                return functools.partial(function, module)
    function = ALL_ATTENTION_FUNCTIONS[kernel]
    # Flash attention reads its own name from the module's config.
    return functools.partial(function, _Unsteered(module) if "flash" in kernel else module)


class ConfigView:
    """A config in which the attention implementation has another name.

    Args:
        config: The config. Whatever else is read or written is its own.
    """

    def __init__(self, config: Any):
        self.__dict__["config"] = config
        self.__dict__["users"] = 0

    @property
    def _attn_implementation(self) -> str:
        return steered_name(self.config._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # asked by copy and pickle before there is a config
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)


class _Unsteered:
    """A module, with its config as it is."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.config = module.config.config  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def steered_name(kernel: str) -> str:
    """The name under which the steered form of a kernel is registered with transformers."""
    name = PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(steered_attention, kernel=kernel))
    return name


def steer(attention: Any) -> None:
    """Let adapters steer an attention module. Count with `release`."""
    view = attention.config
    if not isinstance(view, ConfigView):
        view = ConfigView(view)
        attention.config = view
    view.__dict__["users"] += 1


def release(attention: Any) -> None:
    """Take back one `steer`; after the last one the module is as it was."""
    view = attention.config
    if not isinstance(view, ConfigView):
        return  # somebody has set another config since: it is theirs
    view.__dict__["users"] -= 1
    if view.__dict__["users"] == 0:
        attention.config = view.config


def is_steerable(attention: nn.Module) -> bool:
    """Whether an attention module looks up its kernel in transformers' attention interface."""
    modules = [sys.modules[cls.__module__] for cls in type(attention).__mro__]
    has_names = hasattr(attention, "config") and hasattr(attention, "layer_idx")
    return has_names and any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules)

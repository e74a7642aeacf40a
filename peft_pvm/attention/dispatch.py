"""How adapters reach attention: attention modules find a steered function in place of their kernel.

While an adapter that changes attention is attached, every self-attention module of the text model looks up its kernel
through a view of its config. In this view, the name of the kernel finds a steered function. When the name is compared
or printed, it is the kernel's own name, so masks are made for the kernel, and `set_attn_implementation` takes effect.
If no adapter acts, the steered function calls the kernel with the arguments that it was given.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..tokens.context import CONTEXT, VisualContext, dropped_keywords
from ..tokens.families import VisionLanguageModel
from ..utils.packages import attn_implementation
from .call import AttentionCall, Output, base_kernel
from .hiding import hidden_from_text


PREFIX = "visual|"  # before the kernel's name


def steered_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    kernel: str,
    **kwargs: Any,
) -> Output:
    """The attention function that transformers calls instead of a kernel. Observers run last and change nothing."""
    context: VisualContext | None = kwargs.get(CONTEXT)
    if context is None:
        return base_kernel(kernel, module)(query, key, value, attention_mask, **kwargs)
    context.reached(module.layer_idx, dropped_keywords)
    call = hidden_from_text(AttentionCall(module, query, key, value, attention_mask, context, kernel, kwargs))
    output = call.attend()
    for observe in context.observers:
        observe(call)
    return output


class SteeredName(str):
    """The name of a kernel, under which transformers' attention interface finds its steered form.

    It equals both names: models test for "eager" or "sdpa" before they make a mask, and must find what they would
    without adapters. Its hash is that of the steered name, so that a table is searched for this one.
    """

    steered: str

    def __new__(cls, kernel: str) -> SteeredName:
        name = super().__new__(cls, kernel)
        name.steered = PREFIX + kernel
        return name

    # In plain Python, on plain strings, which torch.compile can follow.

    def __eq__(self, other: object) -> bool:
        return other in (self.steered, self.steered.removeprefix(PREFIX))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.steered)


class ConfigView:
    """A config in which the attention implementation has a name that finds its steered form.

    Args:
        config: The config. Everything else is read from it and written to it.
    """

    def __init__(self, config: Any):
        self.__dict__["config"] = config
        self.__dict__["users"] = 0

    @property
    def _attn_implementation(self) -> str:
        return steered_name(attn_implementation(self.config))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # asked by copy and pickle before there is a config
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)


def steered_name(kernel: str) -> SteeredName:
    """The name by which the steered form of a kernel is found, once it is registered with transformers."""
    if kernel not in _STEERED:
        AttentionInterface.register(PREFIX + kernel, functools.partial(steered_attention, kernel=kernel))
        _STEERED[kernel] = SteeredName(kernel)
    return _STEERED[kernel]


_STEERED: dict[str, SteeredName] = {}


class SteeringHandle:
    """Lets adapters steer an attention module until `remove` is called, like the handle of a hook.

    Args:
        attention: The module. After the last handle on it is removed, it is as it was.
    """

    def __init__(self, attention: Any):
        self.attention = attention
        if not isinstance(attention.config, ConfigView):
            attention.config = ConfigView(attention.config)
        attention.config.__dict__["users"] += 1

    def remove(self) -> None:
        """Remove this handle."""
        view = self.attention.config
        if not isinstance(view, ConfigView):
            return  # somebody has set another config since, which stays
        view.__dict__["users"] -= 1
        if view.__dict__["users"] == 0:
            self.attention.config = view.config


def is_steerable(attention: nn.Module) -> bool:
    """Whether an attention module looks up its kernel in transformers' attention interface."""
    modules = [sys.modules[cls.__module__] for cls in type(attention).__mro__]
    has_names = hasattr(attention, "config") and hasattr(attention, "layer_idx")
    return has_names and any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules)


def steerable_attentions(vlm: VisionLanguageModel, needed_by: str) -> dict[int, nn.Module]:
    """By layer index, the self-attention modules, all of which look up their kernel where it can be steered.

    Args:
        vlm: The model's parts.
        needed_by: Who wants to steer or observe them, for the message.

    Raises:
        ValueError: There is none, or one that cannot be steered; the message says why.
    """
    attentions = vlm.self_attentions
    if not attentions:
        raise ValueError(f"{type(vlm.model).__name__} has no layer with self-attention, which {needed_by} works on.")
    for layer_idx, attention in attentions.items():
        where = f"{type(attention).__name__} (decoder layer {layer_idx} of {type(vlm.model).__name__})"
        if not is_steerable(attention):
            raise ValueError(
                f"{where} does not look up its kernel in transformers' AttentionInterface, through which {needed_by} "
                "reaches attention."
            )
        if hasattr(attention, "sinks"):
            raise ValueError(f"{where} has attention sinks, which {needed_by} does not know.")
    return attentions

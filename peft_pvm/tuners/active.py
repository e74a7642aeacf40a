"""Which adapters of a model act, whatever their type, and letting only some of them act for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from peft import PeftModel
from torch import nn

from ..peft_internals import adapter_layers, held_by


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model in which the adapters stand, however often PEFT wrapped it."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def acting_adapters(model: nn.Module) -> list[str]:
    """The adapters that take part in a forward as the model stands, in the order in which they were attached.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.

    Returns:
        Names: those active in some layer that holds them and is not disabled.
    """
    acting = set()
    for layer in adapter_layers(model):
        if not layer.disable_adapters:
            acting |= set(layer.active_adapters) & held_by(layer)
    return [name for name in getattr(model, "peft_config", {}) if name in acting]


def activate(model: nn.Module, names: Collection[str], trainable: bool = True) -> None:
    """Let some adapters act, of whatever types, and no others.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.
        names: Those that act.
        trainable: Whether their weights require gradients from now on.
    """
    for layer in adapter_layers(model):
        layer.enable_adapters(True)
        layer.set_adapter([name for name in names if name in held_by(layer)], inference_mode=not trainable)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[dict[Any, list[str]]]:
    """Put back, at the end of a block, which adapters act and what is trainable. PEFT changes one with the other.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers. Layers that the block
            brings are left alone.

    Yields:
        By layer that holds adapters, those that are active there and not disabled.
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = {layer: (list(layer.active_adapters), layer.disable_adapters) for layer in adapter_layers(model)}
    try:
        yield {layer: [] if disabled else active for layer, (active, disabled) in before.items()}
    finally:
        for layer, (active, disabled) in before.items():
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad = requires_grad


@contextlib.contextmanager
def only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Of the adapters that act, let only some act for the length of a block. Nothing begins to act.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.
        names: Those that go on acting.
    """
    with restored(model) as acting:
        for layer, active in acting.items():
            kept = [name for name in active if name in names]
            if active and not kept:
                layer.enable_adapters(False)
            elif kept != active:
                layer.set_adapter(kept)
        yield

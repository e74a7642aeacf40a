"""Which adapters of a model act, whatever their type, and how to have others act during a `with` block."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar, cast

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ..utils.packages import adapter_layers, held_by
from ..utils.text import quoted
from .base import VisualConfig, VisualTuner
from .layers import VisualTunerLayer
from .names import adapter_names


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model that holds the adapters, however often PEFT wrapped it."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def acting_adapters(model: nn.Module) -> list[str]:
    """The adapters that would act in a forward now, in the order in which they were attached.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.

    Returns:
        Names of the adapters that are active in a layer that holds them and is not disabled.
    """
    acting = set()
    for layer in adapter_layers(model):
        if not layer.disable_adapters:
            acting |= set(layer.active_adapters) & held_by(layer)
    return [name for name in getattr(model, "peft_config", {}) if name in acting]


def activate(model: nn.Module, names: Collection[str], trainable: bool = True) -> None:
    """Let some adapters act, of whatever types, and no others. As in PEFT, merged ones are unmerged first.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.
        names: Those that act.
        trainable: Whether their weights require gradients from now on.
    """
    for layer in adapter_layers(model):
        if getattr(layer, "merged_adapters", None):
            layer.unmerge()
        layer.enable_adapters(True)
        layer.set_adapter([name for name in names if name in held_by(layer)], inference_mode=not trainable)


def remembered(model: nn.Module) -> tuple[dict[Any, list[str]], Callable[[], None]]:
    """Which adapters act and what is trainable, and what puts this back. PEFT changes one with the other.

    Args:
        model: A transformers model with adapters of any of PEFT's types that live in layers.

    Returns:
        By layer that holds adapters, those that are active there and not disabled; and a function. Layers that are new
        when it is called are not changed.
    """
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = {layer: (list(layer.active_adapters), layer.disable_adapters) for layer in adapter_layers(model)}
    merged = {layer: list(names) for layer in before if (names := getattr(layer, "merged_adapters", None))}

    def put_back() -> None:
        for layer, names in merged.items():
            if not layer.merged_adapters:
                layer.merge(adapter_names=names)
        for layer, (active, disabled) in before.items():
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad = requires_grad

    return {layer: [] if disabled else active for layer, (active, disabled) in before.items()}, put_back


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[dict[Any, list[str]]]:
    """Put back, at the end of a block, which adapters act and what is trainable: see `remembered`.

    Yields:
        By layer that holds adapters, those that are active there and not disabled.
    """
    acting, put_back = remembered(model)
    try:
        yield acting
    finally:
        put_back()


@contextlib.contextmanager
def only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let only some of the adapters that act do so, for the length of a block. No other adapter begins to act.

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


Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def attached(model: Model, *configs: VisualConfig) -> Iterator[Model]:
    """Attach fresh adapters to a model, all active beside those it has, and take them off at the end.

    The adapters get the names of their methods, with a number if a name is taken. They act even if the model's own
    adapters are disabled. Their parameters are trainable; the `requires_grad` of the model's own does not change. At
    the end, also after an exception, the model is as it was: modules, hooks, adapters and which of them act.

    Args:
        model: A vision-language model from transformers, or a PeftModel of one.
        configs: What to attach.

    Yields:
        The same model.

    Raises:
        TypeError: A configuration is not one of this package's.
        ValueError: A configuration does not fit the model, or was loaded from a saved adapter, whose weights would be
            ignored.

    Example:
        with attached(model, DIPEConfig(), TDRSConfig()):
            model.generate(**inputs)
    """
    for config in configs:
        if not isinstance(config, VisualConfig):
            raise TypeError(f"attached takes the configurations of peft_pvm, not {type(config).__name__}.")
        if config.source is not None and config.has_parameters:
            raise ValueError(
                f"{type(config).__name__} was loaded from {quoted(config.source.path)}, but attached starts adapters "
                "afresh. Load the adapter with PeftModel.from_pretrained."
            )
    base = base_of(model)
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    with contextlib.ExitStack() as stack:
        if getattr(base, "peft_config", None) != {}:  # another block that is open may end before this one
            stack.callback(forget_configs, base)
        acting = stack.enter_context(restored(base))
        names = list(adapter_names([config.method for config in configs], base))
        for name, config in zip(names, configs):
            tuner_cls = cast(Any, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type])  # type: ignore[index]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
                tuner: VisualTuner = tuner_cls(base, copy.copy(config), name)
            stack.callback(tuner.remove_adapter, name)
        for layer in base.modules():
            if isinstance(layer, VisualTunerLayer):
                layer.enable_adapters(True)
                layer.set_adapter([*acting.get(layer, []), *names])
        for parameter, requires_grad in trainable.items():  # attaching has frozen the base
            parameter.requires_grad = requires_grad
        yield model


def forget_configs(base: nn.Module) -> None:
    """Remove PEFT's table of configurations from a model that has no adapters left."""
    if not getattr(base, "peft_config", True):
        del base.peft_config

"""Our tuner layers on a model: how hooks join them to its modules, and how they are removed. Also PEFT's wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..tokens.families import VisionLanguageModel
from ..tokens.tap import Tap
from ..utils.packages import held_by
from ..utils.text import quoted
from ..utils.wrapping import plain_name


class VisualTunerLayer(nn.Module, BaseTunerLayer):
    """Base of our layers: a child that is added beside the base's modules and joined to them by hooks.

    Args:
        vlm: The parts of the model that it belongs to.

    Attributes:
        configs: The configuration of each of its adapters, by name.
    """

    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, vlm: VisionLanguageModel):
        super().__init__()
        self.configs: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._vlm = (vlm,)  # in a tuple: its modules are no submodules
        self._handles: list[Any] = []

    @property
    def vlm(self) -> VisionLanguageModel:
        """The parts of the model that it belongs to."""
        return self._vlm[0]

    def new_hooks(self) -> list[Any]:
        """Put hooks on the modules that are there now, and return their handles."""
        raise NotImplementedError

    def attach_hooks(self) -> None:
        """Put the hooks on, unless they are on."""
        self._handles = self._handles or self.new_hooks()

    def detach_hooks(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def acting(self, names: Collection[str] | None = None) -> list[str]:
        """The adapters that act, of those named or else of the active ones: none if adapters are disabled."""
        if self.disable_adapters:
            return []
        return [name for name in dict.fromkeys(names or self.active_adapters) if name in self.configs]

    def get_base_layer(self) -> nn.Module:
        # An AttributeError, so that hasattr(layer, "weight") is False rather than an error.
        raise AttributeError(f"{type(self).__name__} is beside the base's modules and wraps none.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT asks all layers when adapters of another type are merged. To merge ours, tuners refuse."""

    def unmerge(self) -> None:
        """Nothing: see `merge`."""


def take_off(model: nn.Module, layers: Collection[VisualTunerLayer]) -> None:
    """Remove tuner layers from a model, and the tap with the last of them."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, VisualTunerLayer) and child in layers:
                child.detach_hooks()
                delattr(module, name)
    if layers and not any(isinstance(module, VisualTunerLayer) for module in model.modules()):
        Tap.on(next(iter(layers)).vlm).remove()


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of our layers off a model for a block in which modules may be copied or replaced.

    A copy must not carry them: they would copy the model along. They come back on whatever is in the modules' places
    then.

    Args:
        model: The model.
    """

    def layers() -> list[VisualTunerLayer]:
        return [module for module in model.modules() if isinstance(module, VisualTunerLayer)]

    for layer in layers():
        layer.detach_hooks()
    try:
        yield
    finally:
        for layer in layers():
            Tap.on(layer.vlm)  # first: hooks run in the order they were put on, and some of ours read what it notes
            layer.attach_hooks()


def tensors_of_others(model: nn.Module, adapter_name: str) -> set[str]:
    """The plain names of the tensors that belong to adapters of this package, but not to one of that name.

    Whether the name is a part of a tensor's name does not tell: our layers and weights may be called so.
    """
    return {
        f"{plain_name(name)}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, VisualTunerLayer)
        for key in layer.state_dict()
        if key.split(".")[1] != adapter_name
    }


def unwrap_what_is_left(model: nn.Module, names: Collection[str]) -> None:
    """Take off what some adapters trained along: PEFT's wrappers of modules, or what these hold beside that of others.

    Args:
        model: The model.
        names: The adapters, which are about to go.
    """
    modules = list(model.named_modules())
    acting = {name for _, layer in modules if isinstance(layer, BaseTunerLayer) for name in layer.active_adapters}
    for name, module in modules:
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        stays = held_by(module) - set(names)
        if not stays:
            parent, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent), child_name, module.original_module)
            continue
        for adapter_name in held_by(module) & set(names):
            module.delete_adapter(adapter_name, sorted(stays & acting)[:1])  # one can act there


@contextlib.contextmanager
def unwrapped_for(model: nn.Module, ours: Collection[str], others: Collection[str]) -> Iterator[None]:
    """Take off, for a block that unloads other adapters, the wrappers of what ours train along.

    Args:
        model: The model.
        ours: Names of adapters that stay.
        others: Names of adapters that go.

    Raises:
        NotImplementedError: A module is trained along by both.
    """
    kept: list[tuple[nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper) or held_by(module).isdisjoint(ours):
            continue
        if not held_by(module).isdisjoint(others):
            raise NotImplementedError(
                f"{name} is trained along by {' and '.join(map(quoted, sorted(held_by(module))))}, so that one cannot "
                "be unloaded without the other. Save and delete the one that is to stay, and load it again afterwards."
            )
        parent, _, child_name = name.rpartition(".")
        kept.append((model.get_submodule(parent), child_name, module))
    for owner, child_name, wrapper in kept:
        setattr(owner, child_name, wrapper.original_module)
    try:
        yield
    finally:
        for owner, child_name, wrapper in kept:
            wrapper.original_module = getattr(owner, child_name)
            setattr(owner, child_name, wrapper)

"""What wraps a model's modules and methods: wrappers of others, which are looked through, and functions of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


# Where a wrapper keeps what it wraps: FSDP 1, activation checkpointing and offloading, torch.compile.
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
DISTRIBUTED = "module."  # before all names of a model in DistributedDataParallel


def plain_name(name: str) -> str:
    """The name of a module or tensor as if nothing were wrapped.

    Example:
        >>> plain_name("module.layers.0._checkpoint_wrapped_module.mlp"), plain_name("_orig_mod")
        ('layers.0.mlp', '')
    """
    return ".".join(part for part in name.removeprefix(DISTRIBUTED).split(".") if part not in WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """What a module wraps, or itself."""
    return look_inside("", module)[1]


def look_inside(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """What a module wraps, however often, and its name; for a module that wraps nothing, both as given."""
    for key in WRAPPED:
        if (inner := module._modules.get(key)) is not None:
            return look_inside(f"{name}.{key}".removeprefix("."), inner)
    return name, module


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model, or anything inside it, is wrapped."""
    return any(unwrapped(module) is not module for module in model.modules())


@contextlib.contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take the wrappers inside a model away for the length of a block, so that all has its plain name."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and unwrapped(child) is not child
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = unwrapped(child)
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


class Shadow:
    """Puts something else in the place of a module's method, until `remove` is called.

    Args:
        module: The module.
        name: The method's name.
        stand_in: What is called in its place: a method, of which a copied model gets that of the copied object.
    """

    def __init__(self, module: nn.Module, name: str, stand_in: Callable[..., Any]):
        self.module, self.name, self.stand_in = module, name, stand_in
        self.earlier = vars(module).get(name)  # a user's, for this one model
        vars(module)[name] = stand_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method that it replaces: the module's own, or that of its class."""
        if self.earlier is not None:
            return self.earlier(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there before, unless somebody has put something else there since."""
        own = vars(self.module)
        if own.get(self.name) != self.stand_in:
            return
        if self.earlier is None:
            del own[self.name]
        else:
            own[self.name] = self.earlier

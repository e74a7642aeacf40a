"""Whether tensors are those that an adapter needs on a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .checks import LARGEST
from .families import is_tuner_child
from .text import listed, quoted


PEFT_PREFIX = "base_model.model."  # PEFT saves every key below this name


def misfits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], base: Collection[str] = ()
) -> list[str]:
    """What is wrong with the names, shapes and dtypes of an adapter's tensors, a sentence for each problem.

    Args:
        found: By key; their numbers are not looked at.
        expected: By key, a tensor of the shape and kind of number that is needed.
        base: Keys of the base model, for the message.
    """
    missing = [f"{key} is missing" for key in expected if key not in found]
    problems, strays = [], []
    for key, tensor in found.items():
        if key not in expected and key in base:
            problems.append(f"{key} belongs to the base model, and modules_to_save does not name it")
        elif key not in expected:
            strays.append(f"{key} belongs to nothing in this model")
        elif tensor.shape != expected[key].shape:
            shape, needed = tuple(tensor.shape), tuple(expected[key].shape)
            problems.append(f"{key} has shape {shape}, this model needs {needed}")
        elif tensor.is_floating_point() != expected[key].is_floating_point():
            kind = "floating-point" if expected[key].is_floating_point() else "whole"
            problems.append(f"{key} holds {tensor.dtype}, not {kind} numbers")
    return problems + missing + strays


def flaws(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Which tensors hold numbers that no weight can be, a sentence for each.

    Args:
        tensors: With their keys.
    """
    found = []
    for key, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        largest = float(tensor.detach().float().abs().max())  # NaN if any number is
        if not math.isfinite(largest):
            found.append(f"{key} holds NaN or infinity")
        elif largest > LARGEST:
            found.append(f"{key} holds {largest:.3g}, which is larger than any number of fp16")
    return found


def refuse_unless_fit(whom: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare tensors that come without a file with those that are needed.

    Args:
        whom: What needs them, for the message.
        found: By key.
        expected: By key.

    Raises:
        ValueError: They are others.
    """
    if problems := misfits(found, expected) or flaws(found.items()):
        raise ValueError(f"The weights do not fit {whom}; nothing was loaded: {listed(problems)}")


def bare(tensors: Mapping[str, torch.Tensor], adapter_name: str = "") -> dict[str, torch.Tensor]:
    """Tensors by keys without what PEFT adds to them in a file, or in its wrapper of a module that is saved along."""
    return {_bare(key, adapter_name): tensor for key, tensor in tensors.items()}


def _bare(key: str, adapter_name: str) -> str:
    return key.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{adapter_name}.", ".")


def fitted(model: Any, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors for an adapter that is attached, checked, and in the dtypes that it has on the model.

    PEFT would leave what is missing as it is, and say nothing. With `low_cpu_mem_usage=True` it would let a module
    that is saved along have the dtype of the file.

    Args:
        model: The model, wrapped by PEFT or not.
        adapter_name: The adapter's name.
        tensors: By their keys in an adapter's file.

    Returns:
        The tensors, by the same keys.

    Raises:
        ValueError: They are not those that it needs.
    """
    expected = {}
    for name, module in model.named_modules():
        if not is_tuner_child(module) and not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        for key, tensor in module.state_dict().items():
            weight, _, rest = key.partition(f".{adapter_name}.")
            if rest:
                expected[f"{name}.{rest}" if weight == "modules_to_save" else f"{name}.{weight}.{rest}"] = tensor
    wanted = bare(expected)
    refuse_unless_fit(f"adapter {quoted(adapter_name)}", bare(tensors, adapter_name), wanted)
    return {key: tensor.to(wanted[_bare(key, adapter_name)].dtype) for key, tensor in tensors.items()}


def adapter_parts(model: nn.Module) -> tuple[str, ...]:
    """The names of all modules of a model that adapters brought, each with a dot at its end."""
    parts = []
    for name, module in model.named_modules():
        if is_tuner_child(module):
            parts.append(f"{name}.")
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = module._modules.keys() - {"base_layer", "original_module"}  # type: ignore[union-attr]
            parts += [f"{name}.{child}." for child in own]
    return tuple(parts)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a model has without adapters, by the keys that they would have in an adapter's file."""
    parts = adapter_parts(model)
    return {
        PEFT_PREFIX + key.replace(".original_module.", ".").replace(".base_layer.", "."): tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith(parts)
    }


def check_modules_to_save(model: nn.Module, modules_to_save: Sequence[str], own: Collection[str]) -> None:
    """See that what PEFT is going to copy are modules of the base, without any part of an adapter in them.

    Args:
        model: The model.
        modules_to_save: How the names of these modules end.
        own: The keys of the tensors that the adapter will have in tuner layers.

    Raises:
        ValueError: A name stands for no module, or for one that is a part of an adapter or has one inside.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    coming = {key.removeprefix(PEFT_PREFIX).rpartition(".")[0] for key in own}  # the modules that hold them
    coming |= {name.rpartition(".")[0] for name in coming}  # and the tuner layers around
    of_adapters = (*adapter_parts(model), *(f"{name}." for name in coming))
    for ending in modules_to_save:
        hits = [name for name in (*modules, *coming) if name.endswith(ending)]
        if not hits:
            raise ValueError(f"modules_to_save names {quoted(ending)}, but no module of the model is called so.")
        for name in hits:
            is_shared = isinstance(modules.get(name), AuxiliaryTrainingWrapper)  # PEFT adds a copy to those it holds
            has_some = not is_shared and any(part.startswith(f"{name}.") for part in of_adapters)
            if has_some or f"{name}.".startswith(of_adapters):
                raise ValueError(
                    f"modules_to_save names {quoted(ending)}, which is also the end of {quoted(name)}, a part of an "
                    "adapter or a module with one inside. Give more of the name, or name modules where no adapter is."
                )

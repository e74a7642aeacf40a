"""What is being loaded, and whether it fits a model. PEFT and transformers do not tell the tuners what they load."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..utils.packages import adapter_parts, base_name, is_tuner_child
from ..utils.text import listed, quoted
from .adapter_file import PEFT_PREFIX, AdapterFile, flaws, misfits


@dataclass(frozen=True)
class Incoming:
    """What a call of `from_pretrained` or `load_adapter` is going to load, and how it renames the keys.

    Attributes:
        file: The adapter's file. `None`: `tensors` or, without these, the file that its configuration came from.
        tensors: Its tensors by key, if the caller has them.
        patterns: PEFT's `key_mapping`: of regular expressions, the first that is found in a key is replaced in it.
        conversions: transformers' `weight_mapping`. `None`: the model's own.
        exact_patterns: PEFT's `key_mapping` that is still to be filled in, with a pattern for each renamed key.
        by_transformers: Whether transformers loads it.
    """

    file: AdapterFile | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    patterns: Mapping[str, str] | None = None
    conversions: Sequence[Any] | None = None
    exact_patterns: dict[str, str] | None = None
    by_transformers: bool = False

    def renaming(self, model: nn.Module, expected: Collection[str]) -> Callable[[str], str]:
        """What a key of the adapter is called on a model.

        Args:
            model: The base model.
            expected: The keys that the adapter needs there.
        """
        if self.patterns:
            return lambda key: _by_patterns(key, self.patterns or {})
        conversions = self.conversions or get_model_conversion_mapping(model)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        prefix = f"{getattr(model, 'base_model_prefix', '')}."

        def rename(key: str) -> str:
            if key in expected or not key.startswith(PEFT_PREFIX):  # PEFT does not rename what lacks the prefix
                return key
            name = key.removeprefix(PEFT_PREFIX)
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            # An adapter of the model without its head, or of the one with it.
            variants = [PEFT_PREFIX + variant for variant in (name, prefix + name, name.removeprefix(prefix))]
            return next((variant for variant in variants if variant in expected), key)

        return rename

    def rename_by(self, names: Mapping[str, str]) -> None:
        """Have PEFT rename keys, if the caller did not say how.

        Args:
            names: The keys on the model, by those in the file.
        """
        if self.exact_patterns is not None:
            for key, name in names.items():
                if name != key:
                    pattern = f"^{re.escape(key.removeprefix(PEFT_PREFIX))}$"
                    self.exact_patterns[pattern] = name.removeprefix(PEFT_PREFIX).replace("\\", r"\\")


NOTHING = Incoming()
INCOMING: ContextVar[Incoming] = ContextVar("INCOMING", default=NOTHING)


@contextlib.contextmanager
def loading(incoming: Incoming) -> Iterator[None]:
    """Let the tuners know what is being loaded, for the length of a block."""
    token = INCOMING.set(incoming)
    try:
        yield
    finally:
        INCOMING.reset(token)


def _by_patterns(key: str, patterns: Mapping[str, str]) -> str:
    if not key.startswith(PEFT_PREFIX):
        return key
    name = key.removeprefix(PEFT_PREFIX)
    for pattern, replacement in patterns.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return PEFT_PREFIX + renamed
    return key


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


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a model has without adapters, by the keys that they would have in an adapter's file."""
    parts = adapter_parts(model)
    return {
        PEFT_PREFIX + base_name(key): tensor for key, tensor in model.state_dict().items() if not key.startswith(parts)
    }


def check_modules_to_save(model: nn.Module, modules_to_save: Sequence[str], own: Collection[str]) -> None:
    """Check that what PEFT is going to copy are modules of the base, without any part of an adapter in them.

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

"""What is being loaded, for the tuners to know while PEFT or transformers load it, who tell them nothing of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .adapter_file import AdapterFile
from .fitting import PEFT_PREFIX


@dataclass(frozen=True)
class Incoming:
    """What a call of `from_pretrained` or `load_adapter` is going to load, and how it renames the keys.

    Attributes:
        file: The adapter's file, or
        tensors: its tensors by key, where the caller has them; neither: the file that its configuration came from.
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

"""PVM adapters as files: read and combined without a base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig

from ..adapter_file import AdapterFile, flaw_of
from ..writing import write_adapter
from .branch import WEIGHTS, weight_name
from .config import PVMConfig
from .merging import Tensors, combine


def read_adapter(path: str | os.PathLike, **kwargs: Any) -> tuple[PVMConfig, Tensors]:
    """The configuration and the tensors of a saved PVM adapter.

    Args:
        path: A folder or a Hub id.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is not a PVM adapter, or damaged, or its tensors are not those that its configuration speaks of.
        FileNotFoundError: There is no `adapter_model.safetensors`.
    """
    config = PeftConfig.from_pretrained(os.fspath(path), **kwargs)
    if not isinstance(config, PVMConfig):
        raise ValueError(f"{path} is an adapter of type {config.peft_type}, not PVM.")
    tensors = cast(AdapterFile, config._source).read()
    needed = {
        f".layers.{layer_idx}.pvm.{weight_name(name, number)}.weight"
        for number, part in enumerate(config.parts())
        for layer_idx in part.layer_indices
        for name in WEIGHTS
    }
    of_base = [key for key in tensors if ".pvm.pvm_" not in key]
    if of_base and not config.modules_to_save:
        raise ValueError(f"{path} has {len(of_base)} tensors that are not PVM's, such as {of_base[0]}.")
    found = {f".layers.{key.rpartition('.layers.')[2]}" for key in tensors if ".pvm.pvm_" in key}
    if missing := sorted(needed - found):
        raise ValueError(f"{path} lacks {len(missing)} tensors, such as {missing[0]}.")
    if extra := sorted(found - needed):
        raise ValueError(
            f"{path} has {len(extra)} tensors that its configuration knows nothing of, such as {extra[0]}."
        )
    if flaws := [f"{key} holds {flaw}" for key, tensor in tensors.items() if (flaw := flaw_of(tensor))]:
        raise ValueError(f"{path}: {flaws[0]}.")
    return config, tensors


def merge_adapters(
    adapters: Sequence[str | os.PathLike], weights: Sequence[float], out: str | os.PathLike, **options: Any
) -> Path:
    """Combine saved PVM adapters into one, as `PVMModel.add_weighted_adapter` does on a model.

    Args:
        adapters: Folders or Hub ids.
        weights: One for each.
        out: Folder of the new adapter.
        options: As `combine` takes them: `combination_type`, `density`, `majority_sign_method`, `force`.

    Returns:
        The folder.

    Raises:
        ValueError: One of them is no PVM adapter, or they cannot be combined this way.
    """
    config, tensors = combine([read_adapter(adapter) for adapter in adapters], weights, **options)
    return write_adapter(out, config, tensors)

"""PVM adapters as files: read and combined without a base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig

from ..adapter_file import AdapterFile
from ..fitting import PEFT_PREFIX, flaws
from ..text import listed, plain, quoted
from ..writing import write_adapter
from .branch import WEIGHTS, weight_name
from .config import PVMConfig
from .merging import Tensors, combine
from .shape import SIZES


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
        raise ValueError(f"{plain(path, 200)} is an adapter of type {config.peft_type}, not PVM.")
    file = cast(AdapterFile, config._source)
    problems = _problems(file.header(), config)
    tensors = {} if problems else dict(file.read())
    if problems := problems or flaws(tensors.items()):
        raise ValueError(f"{plain(path, 200)} does not hold what its configuration describes: {listed(problems)}.")
    return config, tensors


def _problems(header: Tensors, config: PVMConfig) -> list[str]:
    """What does not go together in the names and shapes of a file, as far as that is known without a base model."""
    parts = config.parts()
    needed = {
        f".layers.{layer_idx}.pvm.{weight_name(name, number)}.weight": (name, number)
        for number, part in enumerate(parts)
        for layer_idx in part.layer_indices
        for name in WEIGHTS
    }
    own = {key: key[key.rindex(".layers.") :] for key in header if ".layers." in key and ".pvm.pvm_" in key}
    prefixes = {key.removesuffix(end) for key, end in own.items()}
    problems = [f"its layers have different names, {quoted(sorted(prefixes))}"] if len(prefixes) > 1 else []
    sizes: dict[tuple[str | int, int], int] = {}
    for number, part in enumerate(parts):
        sizes |= {("r", number): part.r, (1, number): 1}
    for key, tensor in header.items():
        if key not in own:
            if not any(f"{saved}." in key.removeprefix(PEFT_PREFIX) for saved in config.modules_to_save or ()):
                problems.append(f"{key} is not PVM's, and modules_to_save does not name it")
        elif own[key] not in needed:
            problems.append(f"its configuration knows nothing of {key}")
        elif not tensor.is_floating_point():
            problems.append(f"{key} holds {tensor.dtype}, not floating-point numbers")
        else:
            name, number = needed[own[key]]
            wanted = [(size, 0 if size == "hidden" else number) for size in SIZES[name]]
            shape = [sizes.setdefault(size, length) for size, length in zip(wanted, tensor.shape)]
            if shape != list(tensor.shape) or len(wanted) != tensor.dim():
                problems.append(f"{key} has shape {tuple(tensor.shape)}, which does not go with the others")
    return problems + [f"it lacks {end}" for end in sorted(needed.keys() - own.values())]


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

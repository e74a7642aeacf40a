"""Saved PVM adapters: read, combined without a base model, and loaded in the place of one that is attached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...folders.adapter_file import open_adapter, read_tensors
from ...folders.incoming import NOTHING
from ...folders.writing import write_adapter
from ...tuners.saving import own_tensors
from ...utils.text import quoted
from .config import PVMConfig
from .layer import PVMLayer
from .merging import Tensors, check_alike, combine


def read_adapter(path: str | os.PathLike, **kwargs: Any) -> tuple[PVMConfig, Tensors]:
    """The configuration and the tensors of a saved PVM adapter.

    Args:
        path: A folder or a Hub id.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is not a PVM adapter, or damaged, or its tensors are not those that its configuration speaks of.
        FileNotFoundError: There is no `adapter_model.safetensors`.
    """
    config, file = open_adapter(path, PVMConfig, "PVM", **kwargs)
    return config, read_tensors(config, file)


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


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give an attached PVM adapter the weights of another of the same shape, in place.

    It is to PVM what `peft.utils.hotswap.hotswap_adapter` is to LoRA: nothing is added to the model or taken off it,
    so that a compiled model stays compiled. A KV cache from before keeps the keys and values that the old weights made
    of its images, as it keeps those of the base's attention: start new conversations with a new cache.

    Args:
        model: The model; wrapped by PEFT, compiled or neither.
        model_name_or_path: Folder or Hub id of the new adapter.
        adapter_name: Name of the attached adapter.
        torch_device: Without effect: the weights go where the old ones are. PEFT's function has it.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: There is no such adapter on the model, or the new one is of another shape, or its file is wrong.
            The old weights are then still there.
    """
    old = own_tensors(model, adapter_name)
    if not old:
        raise ValueError(f"The model has no PVM adapter {quoted(adapter_name)}.")
    config, file = open_adapter(model_name_or_path, PVMConfig, "PVM", **kwargs)
    layers = (module for module in model.modules() if isinstance(module, PVMLayer))
    attached = next(layer.configs[adapter_name] for layer in layers if adapter_name in layer.configs)
    check_alike([attached, config])
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    names = file.check(old, rename=NOTHING.renaming(base, old))
    with torch.no_grad():
        for key, tensor in file.read():
            old[names[key]].copy_(tensor)
    attached.lineage = config.lineage

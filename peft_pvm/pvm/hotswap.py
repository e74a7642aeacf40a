"""New weights for an attached PVM adapter, in place."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..adapter_file import AdapterFile
from ..incoming import NOTHING
from ..saving import own_tensors
from ..text import plain, quoted
from .config import PVMConfig
from .layer import PVMLayer
from .merging import check_alike


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
    config = PeftConfig.from_pretrained(os.fspath(model_name_or_path), **kwargs)
    layers = (module for module in model.modules() if isinstance(module, PVMLayer))
    attached = next(layer.configs[adapter_name] for layer in layers if adapter_name in layer.configs)
    if not isinstance(config, PVMConfig):
        raise ValueError(f"{plain(model_name_or_path, 200)} is an adapter of type {config.peft_type}, not PVM.")
    check_alike([attached, config])
    file = cast(AdapterFile, config._source)
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    names = file.check(old, rename=NOTHING.renaming(base, old))
    with torch.no_grad():
        for key, tensor in file.read():
            old[names[key]].copy_(tensor)
    attached.lineage = config.lineage

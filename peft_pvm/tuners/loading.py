"""Adapters of whatever types side by side on one model: attached, saved and loaded, through PEFT alone.

A `PeftModel` takes one type. transformers' own adapter methods take several, but transformers 5.24 refuses every PEFT
that is released with them (it wants 0.22), so nothing here uses them.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from ..folders.adapter_file import PEFT_PREFIX, AdapterFile
from ..folders.incoming import Incoming, loading
from ..folders.writing import write_adapter
from ..utils.text import listed, plain
from .active import activate
from .names import adapter_names


def add_adapters(model: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """Attach fresh adapters of any of PEFT's layer-based types to a model, in place. All of them act and learn.

    Args:
        model: A transformers model, with or without adapters. Those that it has stop acting.
        configs: Configurations by the names that the adapters get.

    Raises:
        ValueError: A configuration does not fit the model. Adapters that come before it stay attached.

    Example:
        add_adapters(model, {"pvm": PVMConfig(), "dipe": DIPEConfig(), "lora": LoraConfig(target_modules=["q_proj"])})
    """
    for name, config in configs.items():
        _inject(model, name, config)
    if configs:
        activate(model, list(configs))


def load_adapters(model: nn.Module, sources: Collection[str]) -> list[str]:
    """Attach saved adapters of any of PEFT's layer-based types to a model, in place. All of them act.

    Args:
        model: A transformers model, with or without adapters. Those that it has stop acting.
        sources: Folders or Hub ids.

    Returns:
        The adapters' names on the model, made from the names of the folders or repositories.

    Raises:
        ValueError: An adapter cannot be read, does not fit, or leaves something without weights.

    Example:
        load_adapters(model, ["runs/pvm", "someone/a-lora"])
    """
    names = adapter_names(sources, model)
    for name, source in names.items():
        _load(model, name, source)
    if names:
        activate(model, list(names), trainable=False)
        model.eval()
    return list(names)


def save_adapter(model: nn.Module, adapter_name: str, folder: str | os.PathLike) -> Path:
    """Save one of the adapters of a model as PEFT saves it, whole or not at all.

    Args:
        model: A transformers model with adapters.
        adapter_name: Which of them.
        folder: Where to.

    Returns:
        The folder, which `load_adapters` and `PeftModel.from_pretrained` take.

    Raises:
        ValueError: The model has no adapter of that name.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}. Its adapters: {sorted(configs)}.")
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return write_adapter(folder, configs[adapter_name], {f"{PEFT_PREFIX}{key}": tensors[key] for key in tensors})


def _load(model: nn.Module, name: str, source: str) -> None:
    refusal = f"The adapter {plain(source, 100)} does not fit {type(model).__name__} or cannot be read"
    try:
        config = PeftConfig.from_pretrained(source)
        config.inference_mode = True
        file = AdapterFile(source)
        exact_patterns: dict[str, str] = {}
        with loading(Incoming(file=file, exact_patterns=exact_patterns)):
            _inject(model, name, config)
        missing, strays = _set_weights(model, name, dict(file.read()), exact_patterns)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(plain(f"{refusal}: {error}", keep="\n")) from error
    # PEFT would say nothing, and run with half an adapter.
    if missing or strays:
        attached: Any = model
        delete_adapter(model, name, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
        del attached.peft_config[name]
        lacks = f"it lacks {listed(missing)}" if missing else ""
        brings = f"nothing takes its {listed(strays)}" if strays else ""
        raise ValueError(f"{refusal}: {' and '.join(filter(None, (lacks, brings)))}.")


def _inject(model: nn.Module, name: str, config: PeftConfig) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
        inject_adapter_in_model(config, model, name)
    attached: Any = model
    attached.peft_config[name].base_model_name_or_path = getattr(model, "name_or_path", None)


def _set_weights(
    model: nn.Module, name: str, tensors: dict[str, torch.Tensor], patterns: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Give an attached adapter its weights. Returns the names of weights that are missing and of stray tensors."""
    own = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PEFT_PREFIX)
        for pattern, renamed in patterns.items():
            bare = re.sub(pattern, renamed, bare)
        own[bare] = tensor
    result: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    return sorted(key for key in result.missing_keys if name in key.split(".")), sorted(result.unexpected_keys)

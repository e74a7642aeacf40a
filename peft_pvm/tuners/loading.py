"""Attaches fresh and saved adapters to a model: several at once, all of them or none.

This works only through PEFT. A `PeftModel` takes one type. transformers' own adapter methods take several, but
transformers 5.24 refuses every PEFT that is released with them (it wants 0.22).
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from ..folders.adapter_file import PEFT_PREFIX, AdapterFile
from ..folders.incoming import Incoming, loading
from ..utils.text import listed, plain
from .active import activate, forget_configs, remembered
from .companions import warn_of_missing
from .layers import VisualTunerLayer, take_off, tensors_of_others, without_hooks
from .names import adapter_names


def add_adapters(model: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """Attach fresh adapters of any of PEFT's layer-based types to a model, in place. All of them act and learn.

    Args:
        model: A transformers model, with or without adapters. Those that it has stop acting.
        configs: Configurations by the names that the adapters get.

    Raises:
        ValueError: A configuration does not fit the model, which is left as it was.

    Example:
        add_adapters(model, {"pvm": PVMConfig(), "dipe": DIPEConfig(), "lora": LoraConfig(target_modules=["q_proj"])})
    """
    with _all_or_none(model):
        for name, config in configs.items():
            _inject(model, name, config)
        if configs:
            activate(model, list(configs))


def load_adapters(model: nn.Module, sources: Collection[str]) -> list[str]:
    """Attach saved adapters of any of PEFT's layer-based types to a model, in place. All of them act.

    If one of them was trained together with an adapter that is not among them, there is a warning.

    Args:
        model: A transformers model, with or without adapters. Those that it has stop acting.
        sources: Folders or Hub ids.

    Returns:
        The adapters' names on the model, made from the names of the folders or repositories.

    Raises:
        TypeError: A single adapter is not in a list.
        ValueError: An adapter cannot be read, does not fit, or leaves something without weights. The model is left as
            it was.

    Example:
        load_adapters(model, ["runs/pvm", "someone/a-lora"])
    """
    with _all_or_none(model) as overwritten:
        return _load_all(model, sources, overwritten)


@contextlib.contextmanager
def loaded(model: nn.Module, sources: Collection[str]) -> Iterator[list[str]]:
    """`load_adapters` for the length of a block. At its end, everything that was attached in it is taken off.

    Args:
        model: As `load_adapters` takes it. It is in eval mode afterwards.
        sources: Folders or Hub ids.

    Yields:
        The adapters' names on the model.

    Raises:
        ValueError: As `load_adapters` does.
    """
    with _all_or_none(model, always_none=True) as overwritten:
        yield _load_all(model, sources, overwritten)


@contextlib.contextmanager
def _all_or_none(model: nn.Module, always_none: bool = False) -> Iterator[dict[torch.Tensor, torch.Tensor]]:
    """If a block fails, take off what it attached, and restore which adapters act.

    Args:
        model: The model.
        always_none: Whether to do so at the end of the block in any case.

    Yields:
        A dict for the old contents of tensors of the base that the block overwrites, by tensor.
    """
    attached: Any = model
    was_there = set(getattr(model, "peft_config", {}))
    children = {module: dict(module.named_children()) for module in model.modules()}
    overwritten: dict[torch.Tensor, torch.Tensor] = {}
    _, put_back = remembered(model)

    def take_all_off() -> None:
        activate(model, [], trainable=False)  # PEFT chooses a successor of an active adapter that is deleted
        with without_hooks(model):
            for module, before in children.items():  # PEFT has put layers and wrappers in the place of modules
                for name, child in before.items():
                    if getattr(module, name, None) is not child:
                        setattr(module, name, child)
        for name in set(getattr(model, "peft_config", {})) - was_there:
            delete_adapter(model, name, PEFT_TYPE_TO_PREFIX_MAPPING[attached.peft_config.pop(name).peft_type])
        layers = (layer for layer in model.modules() if isinstance(layer, VisualTunerLayer))
        take_off(model, [layer for layer in layers if not layer.configs])
        with torch.no_grad():
            for tensor, content in overwritten.items():
                tensor.copy_(content)
        put_back()
        forget_configs(model)

    try:
        yield overwritten
    except BaseException:
        take_all_off()
        raise
    if always_none:
        take_all_off()


def _load_all(model: nn.Module, sources: Collection[str], overwritten: dict[torch.Tensor, torch.Tensor]) -> list[str]:
    if isinstance(sources, (str, os.PathLike)):
        raise TypeError(f"Adapters are given as a list of folders or Hub ids, not as {sources!r} alone.")
    names = adapter_names(sources, model)
    for name, source in names.items():
        _load(model, name, source, overwritten)
    if names:
        activate(model, list(names), trainable=False)
        warn_of_missing(model, {name: AdapterFile(source) for name, source in names.items()})
        model.eval()  # last: a warning may be an error, and then the model stays as it was
    return list(names)


def _load(model: nn.Module, name: str, source: str, overwritten: dict[torch.Tensor, torch.Tensor]) -> None:
    refusal = f"The adapter {plain(source, 100)} does not fit {type(model).__name__} or cannot be read"
    try:
        config = PeftConfig.from_pretrained(source)
        config.inference_mode = True
        file = AdapterFile(source)
        exact_patterns: dict[str, str] = {}
        with loading(Incoming(file=file, exact_patterns=exact_patterns)):
            _inject(model, name, config)
        missing, strays = _set_weights(model, name, dict(file.read()), exact_patterns, overwritten)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(plain(f"{refusal}: {error}", keep="\n")) from error
    # PEFT would say nothing, and run with half an adapter.
    if missing or strays:
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
    model: nn.Module,
    name: str,
    tensors: dict[str, torch.Tensor],
    patterns: dict[str, str],
    overwritten: dict[torch.Tensor, torch.Tensor],
) -> tuple[list[str], list[str]]:
    """Give an attached adapter its weights. Returns the names of weights that are missing and of stray tensors."""
    own = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PEFT_PREFIX)
        for pattern, renamed in patterns.items():
            bare = re.sub(pattern, renamed, bare)
        own[bare] = tensor
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in own:  # of the base: a LoRA may have trained its biases
            overwritten.setdefault(tensor, tensor.detach().clone())
    result: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    missing = set(result.missing_keys) - tensors_of_others(model, name)
    return sorted(key for key in missing if name in key.split(".")), sorted(result.unexpected_keys)

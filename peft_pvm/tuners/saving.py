"""Saves the adapters of a model: each by itself, by its plain names, whole or not at all."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..folders.adapter_file import PEFT_PREFIX, SavedConfig
from ..folders.writing import note_companions, write_adapter, written_whole
from ..utils.packages import loads_adapters_itself, saved_along
from ..utils.wrapping import is_wrapped, plain_name, without_wrappers
from .active import base_of
from .companions import trained_with
from .layers import VisualTunerLayer, tensors_of_others


def is_ours(config: Any) -> bool:
    """Whether a configuration is one of this package."""
    return isinstance(config, SavedConfig)


def has_ours(model: Any) -> bool:
    """Whether adapters of this package are on a model."""
    return bool(_ours(getattr(model, "peft_config", None) or {}))


def saved_in(folder: Path) -> Iterator[tuple[PeftConfig, Path]]:
    """The configurations of the adapters in a folder and below, and where they are."""
    for file in folder.rglob(CONFIG_NAME):
        yield PeftConfig.from_pretrained(str(file.parent)), file.parent


def saving_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's or transformers' `save_pretrained`, made safe for a model with adapters of this package."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not has_ours(self) or os.path.isfile(save_directory) or not given.get("is_main_process", True):
            return original(self, save_directory, *args, **kwargs)
        options = {name: value for name, value in given.items() if name not in ("self", "save_directory")}
        adapters = _adapters_to_save(self, options.get("selected_adapters"))
        _refuse_what_cannot_be_loaded(self, adapters, options)
        state_dict = options.get("state_dict")
        if state_dict is None and (is_wrapped(self) or (adapters != [None] and len(self.peft_config) > 1)):
            state_dict = self.state_dict()  # now: some wrappers have to gather it
        with written_whole(save_directory) as folder, without_wrappers(self):
            for name in adapters:
                chosen = dict(options)
                is_of_ours = name is not None and name in _ours(self.peft_config)
                if state_dict is not None:
                    chosen["state_dict"] = of_adapter(self, name, state_dict)
                if name is not None and isinstance(self, PeftModel):
                    chosen["selected_adapters"] = [name]
                    if is_of_ours:  # else PEFT adds the base's embeddings if the vocabulary was changed
                        chosen["save_embedding_layers"] = False
                if name is None:
                    original(self, str(folder), **chosen)
                    continue
                original(_knowing_alone(self, name), str(folder), **chosen)
                place = folder if name == "default" or not isinstance(self, PeftModel) else folder / name
                if is_of_ours:
                    _check_file(self, name, place)
                note_companions(place, self.peft_config[name], trained_with(self, name, state_dict))

    return save_pretrained


def save_adapter(model: nn.Module, adapter_name: str, folder: str | os.PathLike) -> Path:
    """Save one adapter of a model in PEFT's format, whole or not at all.

    Args:
        model: A transformers model with adapters, or a PeftModel of one.
        adapter_name: The name of the adapter on the model.
        folder: Where to.

    Returns:
        The folder, which `load_adapters` and `PeftModel.from_pretrained` take.

    Raises:
        ValueError: The model has no adapter of that name, or not all of its tensors are there.
    """
    model = base_of(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}. Its adapters: {sorted(configs)}.")
    state_dict = of_adapter(model, adapter_name, model.state_dict()) if len(configs) > 1 else None
    tensors = get_peft_model_state_dict(_knowing_alone(model, adapter_name), state_dict, adapter_name)
    in_file = {f"{PEFT_PREFIX}{key}": tensors[key] for key in tensors}
    if is_ours(configs[adapter_name]):
        check_whole(model, adapter_name, in_file)
    return write_adapter(folder, configs[adapter_name], in_file, trained_with(model, adapter_name))


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of this package, not copied, by their keys in its file; without `modules_to_save`.

    Args:
        model: The model; wrapped by PEFT, by others, or not at all.
        adapter_name: The adapter's name.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, VisualTunerLayer):
            continue
        for key, tensor in layer.state_dict().items():
            weight, owner, rest = key.split(".", 2)
            if owner == adapter_name:
                found[f"{_name_in_file(name)}.{weight}.{rest}"] = tensor
    return found


def of_adapter(
    model: nn.Module, adapter_name: str | None, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A model's tensors, by plain names, without those that PEFT could mistake for an adapter's.

    Args:
        model: The model.
        adapter_name: The adapter. One of this package keeps its own tensors and modules, any other loses those of
            adapters of this package. `None`: all stay.
        state_dict: The tensors.
    """
    plain = {plain_name(key): tensor for key, tensor in state_dict.items()}
    if adapter_name is None:
        return plain
    others, attached = tensors_of_others(model, adapter_name), cast(Any, model)
    if is_ours(attached.peft_config[adapter_name]):
        layers = (name for name, layer in model.named_modules() if isinstance(layer, VisualTunerLayer))
        own = tuple(f"{plain_name(name)}." for name in (*layers, *saved_along(model, adapter_name)))
        return {key: tensor for key, tensor in plain.items() if key.startswith(own) and key not in others}
    return {key: tensor for key, tensor in plain.items() if key not in others}


def check_whole(model: nn.Module, adapter_name: str, keys: Collection[str]) -> None:
    """Check that what is about to be written is all of an adapter.

    Args:
        model: The model that it is attached to.
        adapter_name: The adapter's name.
        keys: Those of the tensors that are about to be written.

    Raises:
        ValueError: One is missing.
    """
    needed = set(own_tensors(model, adapter_name))
    for name, wrapper in saved_along(model, adapter_name).items():
        needed |= {f"{_name_in_file(name)}.{key}" for key in wrapper.adapter_state_dict_load_map(adapter_name)}
    if missing := sorted(needed.difference(keys)):
        raise ValueError(
            f"What is to be saved of adapter {adapter_name!r} lacks {len(missing)} of its {len(needed)} tensors, such "
            f"as {missing[0]}, so nothing was written. A state_dict given to save_pretrained has to hold all tensors "
            "of the model, by the names that they have there."
        )


def _name_in_file(name: str) -> str:
    return PEFT_PREFIX + plain_name(name).removeprefix(PEFT_PREFIX)


def _ours(configs: dict[str, Any]) -> set[str]:
    return {name for name, config in configs.items() if is_ours(config)}


def _adapters_to_save(model: Any, selected: Collection[str] | None) -> list[str | None]:
    """The adapters that PEFT or transformers will save; `None`: the whole model, or what PEFT will refuse."""
    if isinstance(model, PeftModel):
        names = list(model.peft_config) if selected is None else list(selected)
        # The default adapter is last: its card takes the place of the one that PEFT writes each time.
        return sorted(names, key=lambda name: name == "default") if set(names) <= set(model.peft_config) else [None]
    return [model.active_adapters()[0] if loads_adapters_itself(model) else None]


def _knowing_alone(model: Any, name: str) -> Any:
    """A model as PEFT is to see it: it takes a tensor for another's if that one's name is a part of its key.

    Its modules are those of the model, which itself does not change: other threads may choose and load adapters.
    """
    configs = dict(model.peft_config)
    ours = _ours(configs)
    others = (configs.keys() if name in ours else ours) - {name}
    seen = _shallow_copy(model)
    if isinstance(model, PeftModel):
        vars(seen)["_modules"] = {**model._modules, "base_model": _shallow_copy(model.base_model)}
        seen.active_adapter = name  # it asks for that one's configuration
    seen.peft_config = {other: config for other, config in configs.items() if other not in others}
    return seen


def _shallow_copy(model: Any) -> Any:
    """A copy of an object with the same attributes. `copy.copy` would ask its class, which FSDP 2 has changed."""
    copied = object.__new__(type(model))
    vars(copied).update(vars(model))
    return copied


def _refuse_what_cannot_be_loaded(model: Any, adapters: Collection[str | None], options: dict[str, Any]) -> None:
    ours = sorted(_ours(model.peft_config).intersection(filter(None, adapters)))
    if ours and options.get("save_embedding_layers") is True:
        raise ValueError(
            "save_embedding_layers=True would write the base's embeddings into the adapter, and no adapter loads "
            "tensors of the base. Leave it out, and name what is trained along in modules_to_save."
        )
    if ours and not options.get("safe_serialization", True):
        raise ValueError(
            f"safe_serialization=False would save {', '.join(ours)} as a pickle, and peft_pvm loads adapters from "
            "safetensors files only. Leave the argument out."
        )


def _check_file(model: Any, name: str, folder: Path) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(
            f"With these arguments an adapter is saved as {sorted(os.listdir(folder))}, from which it cannot be "
            "loaded, so nothing was written. Leave out max_shard_size and distributed_checkpoint: an adapter is one "
            "safetensors file."
        )
    with safe_open(file, framework="pt") as tensors:
        check_whole(model, name, tensors.keys())

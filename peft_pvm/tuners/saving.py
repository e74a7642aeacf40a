"""Saves and loads the adapters of a model: each by itself, by its plain names, whole or not at all.

`add_adapters`, `load_adapters` and `save_adapter` work only through PEFT. A `PeftModel` takes one type. transformers'
own adapter methods take several, but transformers 5.24 refuses every PEFT that is released with them (it wants 0.22).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..folders.adapter_file import PEFT_PREFIX, AdapterFile, SavedConfig
from ..folders.incoming import Incoming, loading
from ..folders.writing import note_companions, write_adapter, written_whole
from ..utils.packages import loads_adapters_itself, saved_along
from ..utils.text import listed, plain
from ..utils.wrapping import is_wrapped, plain_name, without_wrappers
from .active import activate, base_of, forget_configs, remembered
from .companions import trained_with, warn_of_missing
from .layers import VisualTunerLayer, take_off, tensors_of_others, without_hooks
from .names import adapter_names


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

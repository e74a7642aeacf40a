"""Teaches PEFT the names of our tuner types. PEFT has no plug-in mechanism, so its enum of types gains members."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import peft.peft_model
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, PeftType, register_peft_method, save_and_load
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from ..folders.adapter_file import SOURCE, AdapterFile
from ..folders.companions import fields_of, method_of
from ..folders.data_file import OF_ADAPTERS, read_json
from ..folders.incoming import INCOMING, NOTHING, Incoming, fitted, loading
from ..folders.replacing import settle
from ..folders.writing import write_card
from ..utils.packages import ASKS_TUNER_FOR_NAMES, adapter_layers, add_peft_type, conversion_of, held_by, hub_arguments
from ..utils.text import plain, quoted
from .base import VisualConfig, VisualTuner, refuse_taken, with_absent_fields
from .companions import warn_of_missing
from .layers import VisualTunerLayer, unwrapped_for, without_hooks
from .saving import has_ours, is_ours, saved_in, saving_whole
from .without_parameters import WithoutParameters


EXTENDED = "peft_pvm_was_here"
READ_ATTEMPTS = 5  # of a configuration that others keep replacing
MOST_FIELDS = 200  # of a configuration


def register(config_cls: type[VisualConfig], tuner_cls: type[VisualTuner] | None = None) -> None:
    """Make a method known to PEFT. Registering the same class again does nothing.

    Args:
        config_cls: Its configuration. The `peft_type` is `config_cls.method` in upper case.
        tuner_cls: Its tuner. A method without parameters needs none: it is made from the configuration.

    Raises:
        RuntimeError: PEFT, or another package, already has a method of that name.
    """
    name = config_cls.method
    if tuner_cls is None:
        tuner_cls = cast(type[WithoutParameters], config_cls).tuner()
    member_name = name.upper()
    if member_name in PeftType.__members__:
        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[member_name])
        if registered is config_cls:
            return
        raise RuntimeError(
            f"PEFT already has a method {member_name!r} ({registered}), which is not peft_pvm's. Adapters of the two "
            "cannot be told apart, so peft_pvm does not load. Please report this with your versions (python -m "
            "peft_pvm.env)."
        )
    add_peft_type(member_name)
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)


def extend_peft() -> None:
    """Change what PEFT and transformers do with saved adapters, where they have no hook. A second call does nothing.

    - A config that is loaded knows where it was loaded from. Our tuners check an adapter's file against the model
      before they touch the model. PEFT injects the layers first and reads the file later, and transformers'
      `load_adapter` calls `PeftConfig.from_pretrained` on the base class, so a subclass's own `from_pretrained` would
      not be asked.
    - What is no adapter's configuration is refused with its name and the reason.
    - Whoever loads an adapter waits for a save that is replacing it, and undoes one whose process died.
    - Our tuners know what is being loaded, and by which names, while `PeftModel` and transformers load an adapter.
    - An adapter of any type that is loaded without those that it was trained together with gives a warning.
    - Tuners of other types that copy, replace or unload modules, or delete adapters, leave our adapters on the same
      model as they are, and do not take their names.
    - An adapter has no part in tokens that another one trains, when either is saved or loaded.
    - A model with our adapters is saved by way of `saving_whole`, and not in a form that we do not load.
    - `push_to_hub` does not put an empty card in the place of ours.
    """
    if hasattr(PeftConfigMixin.from_pretrained, EXTENDED):
        return
    _replace(PeftConfigMixin, "from_pretrained", _refusing_what_is_none, _remembering_its_source)
    setattr(inspect.getattr_static(PeftConfigMixin, "from_pretrained").__func__, EXTENDED, True)
    _replace(PeftConfigMixin, "_get_peft_type", _refusing_what_is_none)
    _replace(PeftConfigMixin, "from_json_file", _refusing_what_is_no_object)
    _replace(PeftModel, "from_pretrained", _saying_what_peft_loads)
    _replace(PeftModel, "load_adapter", _saying_what_peft_loads)
    _replace(PreTrainedModel, "load_adapter", _saying_what_transformers_loads)
    if not ASKS_TUNER_FOR_NAMES:
        set_state_dict = _fitting_what_it_sets(save_and_load.set_peft_model_state_dict)
        for module in (peft, peft.peft_model, peft.utils, save_and_load):
            vars(module)["set_peft_model_state_dict"] = set_state_dict
    _replace(BaseTuner, "inject_adapter", _apart_from_ours)
    _replace(BaseTuner, "set_adapter", _own_wrappers_alone)
    _replace(BaseTuner, "delete_adapter", _not_of_ours)
    _replace(BaseTuner, "_unload_and_optionally_merge", _leaving_ours)
    for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
        _replace(TrainableTokensWrapper, name, _nothing_of_others)
    _replace(PeftModel, "save_pretrained", saving_whole)
    _replace(PreTrainedModel, "save_pretrained", saving_whole)
    _replace(PushToHubMixin, "_upload_modified_files", with_cards)


def _replace(cls: type, name: str, *wrappings: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap a method of a class, its own or inherited. The last wrapping is the outermost."""
    original = inspect.getattr_static(cls, name)
    is_of_class = isinstance(original, classmethod)
    method: Any = original.__func__ if is_of_class else original
    for wrapping in wrappings:
        method = wrapping(method)
    setattr(cls, name, classmethod(method) if is_of_class else method)


def _refusing_what_is_none(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_config(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = _read_settled(original, cls, path, *args, **kwargs)
            if not isinstance(found, PeftConfig):  # the type that PEFT is about to look up
                PEFT_TYPE_TO_CONFIG_MAPPING[found]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{CONFIG_NAME} of {plain(path, 200)} is not the configuration of a method that PEFT or peft_pvm "
                f"knows ({type(error).__name__}: {plain(error, 200)}). It may be damaged, or want another package "
                "to be imported first."
            ) from error
        except ValueError as error:
            said = plain(error, keep="\n")
            if said == str(error):
                raise
            raise ValueError(said) from error  # PEFT quotes what it was given as it is
        return found

    return read_config


def _read_settled(read: Callable[..., Any], cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a configuration, again if a save was just replacing it."""
    folder = os.path.join(path, kwargs.get("subfolder") or "")
    settle(folder, CONFIG_NAME)
    for attempts_left in reversed(range(READ_ATTEMPTS)):
        try:
            return read(cls, path, *args, **kwargs)
        except (ValueError, FileNotFoundError):
            if not settle(folder, CONFIG_NAME) or not attempts_left:
                raise


def _refusing_what_is_no_object(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_json_file(cls: Any, path_json_file: str, **kwargs: Any) -> Any:
        content = read_json(path_json_file, OF_ADAPTERS)
        if not isinstance(content, dict) or len(content) > MOST_FIELDS or len(max(content, key=len, default="")) > 100:
            raise ValueError(
                f"{plain(path_json_file, 200)} is not the configuration of a method that PEFT or peft_pvm knows: that "
                "is a JSON object with some fields. It may be damaged."
            )
        return with_absent_fields(original(cls, path_json_file, **kwargs))

    return from_json_file


def _saying_what_peft_loads(original: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.from_pretrained` and `PeftModel.load_adapter`, of which the former calls the latter."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments
        if INCOMING.get() is not NOTHING:
            return original(*args, **kwargs)
        hub_kwargs = hub_arguments(asked.get("kwargs", {}))
        file = AdapterFile(asked["model_id"], hub_kwargs.pop("subfolder", None), hub_kwargs)
        patterns = asked.get("key_mapping") or conversion_of(asked.get("model"))
        exact_patterns: dict[str, str] = {}
        if not patterns:
            asked["key_mapping"] = exact_patterns
        with loading(Incoming(file=file, patterns=patterns, exact_patterns=exact_patterns)):
            model: Any = asked.get("self")
            attached: Any = model.peft_config.get(asked["adapter_name"]) if model is not None else None
            # New weights for it. Where tuners are nested, it may be another's, who is asked when the weights are set.
            if is_ours(attached) and isinstance(model.base_model, PEFT_TYPE_TO_TUNER_MAPPING[attached.peft_type]):
                _refuse_other_settings(model.base_model, attached, file)
                model.base_model.check_file(file, attached)
            loaded = original(*call.args, **call.kwargs)
        if attached is None or attached.inference_mode:  # else a trainer puts a checkpoint back
            name = asked.get("adapter_name", "default")
            warn_of_missing(loaded if model is None else model, {name: file})
        return loaded

    return load


def _refuse_other_settings(tuner: Any, attached: VisualConfig, file: AdapterFile) -> None:
    """Raise a ValueError if a file's weights are for other settings than those that an adapter was attached with."""
    if os.path.isdir(file.folder) and not os.path.isfile(os.path.join(file.folder, CONFIG_NAME)):
        return
    saved = PeftConfig.from_pretrained(file.path, subfolder=file.subfolder, **file.hub_kwargs)
    if method_of(saved) != method_of(attached):
        raise ValueError(
            f"{plain(file.path, 200)} is an adapter of type {method_of(saved)}, but the name stands for one of type "
            f"{method_of(attached)}. Load it under another name."
        )
    own, other = fields_of(attached), fields_of(tuner.resolve(cast(VisualConfig, saved)))
    for name in own:
        if own[name] != other[name]:
            raise ValueError(
                f"{plain(file.path, 200)} was saved with {name} = {quoted(other[name])}, but the adapter of that name "
                f"has {quoted(own[name])}. Loading would take only the weights. Load it under another name, or "
                "delete the adapter first."
            )


def _saying_what_transformers_loads(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        settings = asked.get("load_config")
        path = asked.get("peft_model_id") or getattr(settings, "pretrained_model_name_or_path", None)
        if path is not None:
            settle(path, CONFIG_NAME)  # before transformers looks whether there is a configuration
        file = None
        if path is not None and asked.get("peft_config") is not None:  # else the file that the configuration is from
            hub_kwargs = dict(getattr(settings, "download_kwargs", None) or {})
            file = AdapterFile(path, hub_kwargs.pop("subfolder", None), hub_kwargs)
        conversions = asked.get("kwargs", {}).get("weight_mapping") or getattr(settings, "weight_mapping", None)
        tensors = asked.get("adapter_state_dict")
        with loading(Incoming(file=file, tensors=tensors, conversions=conversions, by_transformers=True)):
            loaded = original(*args, **kwargs)
        model: Any = asked["self"]
        name = asked.get("adapter_name") or "default"
        source = file or vars(model.peft_config[name]).get(SOURCE)
        if source is not None and tensors is None:
            warn_of_missing(model, {name: source})
        return loaded

    return load_adapter


def _apart_from_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT copies what `modules_to_save` names, with the hooks that are on it, and takes names that we have."""

    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, VisualTuner):
            original(self, model, adapter_name, *args, **kwargs)
            return
        refuse_taken(self, adapter_name)
        saved = tuple(getattr(self.peft_config[adapter_name], "modules_to_save", None) or ())
        for name, module in self.model.named_modules():
            if name.endswith(saved) and any(isinstance(child, VisualTunerLayer) for child in module.modules()):
                del self.peft_config[adapter_name]
                raise ValueError(
                    f"modules_to_save names {name}, which has another adapter inside, so that a copy of it would have "
                    "that adapter too. Name modules without adapters, or attach this adapter first."
                )
        with without_hooks(self.model):
            original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _own_wrappers_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT turns off what other tuners' adapters have trained along (`modules_to_save`), but not those adapters."""

    @functools.wraps(original)
    def set_adapter(self: BaseTuner, *args: Any, **kwargs: Any) -> None:
        layers = adapter_layers(self.model)
        others: list[tuple[Any, list[str], dict[nn.Parameter, bool]]] = []
        if any(isinstance(layer, VisualTunerLayer) for layer in layers):
            own = {name for layer in layers if isinstance(layer, self.tuner_layer_cls) for name in held_by(layer)}
            others = [
                (layer, list(layer.active_adapters), {tensor: tensor.requires_grad for tensor in layer.parameters()})
                for layer in layers
                if isinstance(layer, AuxiliaryTrainingWrapper) and held_by(layer).isdisjoint(own)
            ]
        original(self, *args, **kwargs)
        for layer, active, trainable in others:
            layer.set_adapter(active)
            for tensor, requires_grad in trainable.items():
                tensor.requires_grad = requires_grad

    return set_adapter


def _not_of_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT deletes whatever the table names, and of an adapter that another tuner has, only that."""

    @functools.wraps(original)
    def delete_adapter(self: BaseTuner, adapter_name: str) -> None:
        if not isinstance(self, VisualTuner) and is_ours(self.peft_config.get(adapter_name)):
            raise ValueError(
                f"{quoted(adapter_name)} is an adapter of another type. Delete it with the PeftModel of that type."
            )
        original(self, adapter_name)

    return delete_adapter


def _leaving_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT takes all wrappers off a model, and the table of its adapters."""

    @functools.wraps(original)
    def unload(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        configs = getattr(model, "peft_config", {})
        ours = {name for name, config in configs.items() if is_ours(config)}
        if isinstance(self, VisualTuner) or not ours:
            return original(self, *args, **kwargs)
        with without_hooks(model), unwrapped_for(model, ours, set(configs) - ours):
            unloaded = original(self, *args, **kwargs)
        for name in set(configs) - ours:
            del configs[name]
        model.peft_config = configs
        return unloaded

    return unload


def _nothing_of_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT asks every wrapper of tokens for every adapter, and this one would not ask whether it holds it."""

    @functools.wraps(original)
    def tensors_of(self: TrainableTokensWrapper, adapter_name: str, *args: Any) -> dict[str, Any]:
        return original(self, adapter_name, *args) if adapter_name in held_by(self) else {}

    return tensors_of


def _fitting_what_it_sets(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if is_ours(model.peft_config[adapter_name]):
            peft_model_state_dict = fitted(model, adapter_name, peft_model_state_dict)
        return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _remembering_its_source(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if is_ours(config):
            config.set_source(pretrained_model_name_or_path, subfolder=subfolder, **hub_arguments(kwargs))
        else:
            vars(config)[SOURCE] = AdapterFile(pretrained_model_name_or_path, subfolder, hub_arguments(kwargs))
        return config

    return from_pretrained


def with_cards(original: Callable[..., Any]) -> Callable[..., Any]:
    """`push_to_hub`'s upload of a folder, which first gets back the cards of the adapters of this package in it."""

    @functools.wraps(original)
    def _upload_modified_files(self: Any, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if has_ours(self):
            for config, adapter in saved_in(Path(working_dir)):
                write_card(config, adapter)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files

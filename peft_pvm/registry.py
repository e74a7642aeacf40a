"""Teaches PEFT the names of our tuner types. PEFT has no plug-in mechanism, so its enum of types gains members."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType, register_peft_method
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from .adapter_file import written_whole
from .cards import write_card
from .tuner import check_whole, of_adapter
from .wrappers import is_wrapped, without_wrappers


EXTENDED = "peft_pvm_was_here"


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make `config_cls` and `model_cls` a PEFT method. Registering the same classes again does nothing.

    Args:
        name: The method's name in lower case; the `peft_type` is its upper case, the parameter prefix `name_`.

    Raises:
        RuntimeError: PEFT, or another package, already has a method of that name.
    """
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
    member = str.__new__(PeftType, member_name)
    member._name_ = member._value_ = member_name
    PeftType._member_map_[member_name] = member
    PeftType._value2member_map_[member_name] = member
    PeftType._member_names_.append(member_name)
    type.__setattr__(PeftType, member_name, member)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def extend_peft() -> None:
    """Change what PEFT and transformers do with saved adapters, where no hook of theirs lets us. Again: nothing.

    - A config that is loaded knows where it was loaded from, if it has a method `set_source` to be told. Our tuners
      check an adapter's file against the model before they touch the model. PEFT injects the layers first and reads
      the file later, and transformers' `load_adapter` calls `PeftConfig.from_pretrained` on the base class, so a
      subclass's own `from_pretrained` would not be asked.
    - What is no adapter's configuration is refused with its name and the reason.
    - A model with our adapters is saved by way of `written_whole`.
    - `push_to_hub` does not put an empty card in the place of ours.
    """
    original = PeftConfigMixin.__dict__["from_pretrained"].__func__
    if hasattr(original, EXTENDED):
        return
    from_pretrained = _remembering_its_source(_refusing_what_is_none(original))
    setattr(from_pretrained, EXTENDED, True)
    type_of = _refusing_what_is_none(PeftConfigMixin.__dict__["_get_peft_type"].__func__)
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    PeftConfigMixin._get_peft_type = classmethod(type_of)  # type: ignore[method-assign, assignment]
    for cls in (PeftModel, PreTrainedModel):
        cls.save_pretrained = _saving_whole(cls.save_pretrained)  # type: ignore[method-assign]
    PushToHubMixin._upload_modified_files = _with_cards(PushToHubMixin._upload_modified_files)


def _refusing_what_is_none(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_config(cls, path, *args, **kwargs):
        try:
            found = original(cls, path, *args, **kwargs)
            if not isinstance(found, PeftConfig):  # the type that PEFT is about to look up
                PEFT_TYPE_TO_CONFIG_MAPPING[found]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{CONFIG_NAME} of {path} is not the configuration of a method that PEFT or peft_pvm knows "
                f"({type(error).__name__}: {error}). It may be damaged, or want another package to be imported first."
            ) from error
        return found

    return read_config


def _remembering_its_source(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if hasattr(config, "set_source"):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            config.set_source(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        return config

    return from_pretrained


def _has_ours(model: Any) -> bool:
    configs = getattr(model, "peft_config", None) or {}
    return any(hasattr(config, "set_source") for config in configs.values())


def _saving_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        if not _has_ours(self) or os.path.isfile(save_directory) or not kwargs.get("is_main_process", True):
            return original(self, save_directory, *args, **kwargs)
        state_dict = kwargs.get("state_dict")
        if state_dict is None and (is_wrapped(self) or len(self.peft_config) > 1):
            state_dict = self.state_dict()  # now: some wrappers have to gather it
        with written_whole(save_directory) as folder, without_wrappers(self):
            for name, choice in _one_by_one(self, kwargs.get("selected_adapters")):
                if state_dict is not None:
                    choice["state_dict"] = of_adapter(self, name, state_dict)
                with _alone(self, name):
                    original(self, str(folder), *args, **{**kwargs, **choice})
            _check_whole(self, folder)

    return save_pretrained


def _one_by_one(model: Any, selected: Collection[str] | None) -> list[tuple[str | None, dict[str, Any]]]:
    """The adapters that are to be saved, each with what save_pretrained is told for it; `None`: the whole model."""
    if isinstance(model, PeftModel):
        names = list(model.peft_config) if selected is None else list(selected)
        if not set(names) <= set(model.peft_config):
            return [(None, {})]  # PEFT refuses
        # The default adapter is last: its card takes the place of the one that PEFT writes each time.
        return [(name, {"selected_adapters": [name]}) for name in sorted(names, key=lambda name: name == "default")]
    return [(model.active_adapters()[0] if getattr(model, "_hf_peft_config_loaded", False) else None, {})]


@contextlib.contextmanager
def _alone(model: Any, name: str | None) -> Iterator[None]:
    """Let PEFT know of one adapter only: it takes what has another one's name in its own for a part of that."""
    configs = model.peft_config
    table = dict(configs)
    if name is None:
        yield
        return
    ours = {other for other, config in table.items() if hasattr(config, "set_source")}
    for other in table if name in ours else ours:
        if other != name:
            del configs[other]
    active = vars(model).get("active_adapter")
    if isinstance(model, PeftModel):  # it asks for the active adapter's configuration
        model.active_adapter = name
    try:
        yield
    finally:
        if isinstance(model, PeftModel):
            model.active_adapter = active
        configs.clear()
        configs.update(table)


def _check_whole(model: Any, folder: Path) -> None:
    """Compare what is written with what the adapters have."""
    if isinstance(model, PeftModel):
        folders = {name: folder if name == "default" else folder / name for name in model.peft_config}
    elif getattr(model, "_hf_peft_config_loaded", False):
        folders = dict.fromkeys(model.active_adapters()[:1], folder)
    else:  # adapters that were injected: transformers saves the whole model
        return
    for name, place in folders.items():
        if hasattr(model.peft_config[name], "set_source") and (place / SAFETENSORS_WEIGHTS_NAME).is_file():
            with safe_open(place / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
                check_whole(model, name, tensors.keys())


def _with_cards(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        for file in Path(working_dir).rglob(CONFIG_NAME) if _has_ours(self) else ():
            config = PeftConfig.from_pretrained(str(file.parent))
            if hasattr(config, "set_source"):
                write_card(config, file.parent)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files

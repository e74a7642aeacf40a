"""Teaches PEFT the names of our tuner types. PEFT has no plug-in mechanism, so its enum of types gains members."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, PeftType, register_peft_method
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from .cards import write_card
from .replacing import settle
from .saving import has_ours, is_ours, ours_in, saving_whole


EXTENDED = "peft_pvm_was_here"
READ_ATTEMPTS = 5  # of a configuration that others keep replacing


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
    - Who loads an adapter waits for a save that is replacing it; one that died at this is undone.
    - A model with our adapters is saved by way of `saving_whole`, and not in a form that we do not load.
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
        cls.save_pretrained = saving_whole(cls.save_pretrained)  # type: ignore[method-assign]
    PreTrainedModel.load_adapter = _settling(PreTrainedModel.load_adapter)
    PushToHubMixin._upload_modified_files = _with_cards(PushToHubMixin._upload_modified_files)


def _refusing_what_is_none(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_config(cls, path, *args, **kwargs):
        try:
            found = _read_settled(original, cls, path, *args, **kwargs)
            if not isinstance(found, PeftConfig):  # the type that PEFT is about to look up
                PEFT_TYPE_TO_CONFIG_MAPPING[found]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{CONFIG_NAME} of {path} is not the configuration of a method that PEFT or peft_pvm knows "
                f"({type(error).__name__}: {error}). It may be damaged, or want another package to be imported first."
            ) from error
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


def _settling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        if peft_model_id is not None:
            settle(peft_model_id, CONFIG_NAME)  # before transformers looks whether there is a configuration
        return original(self, peft_model_id, *args, **kwargs)

    return load_adapter


def _remembering_its_source(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if is_ours(config):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            config.set_source(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        return config

    return from_pretrained


def _with_cards(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        if has_ours(self):
            for config, adapter in ours_in(Path(working_dir)):
                write_card(config, adapter)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files

"""Teaches PEFT the names of our tuner types. PEFT has no plug-in mechanism, so its enum of types gains members."""

from __future__ import annotations

import functools
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
from .saving import has_ours, saving_whole


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
    - A model with our adapters is saved by way of `saving_whole`.
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


def _with_cards(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        for file in Path(working_dir).rglob(CONFIG_NAME) if has_ours(self) else ():
            config = PeftConfig.from_pretrained(str(file.parent))
            if hasattr(config, "set_source"):
                write_card(config, file.parent)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files

"""Teaches PEFT the names of our tuner types. PEFT has no plug-in mechanism, so its enum of types gains members."""

from __future__ import annotations

import functools

from peft import PeftConfig
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


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


def remember_adapter_sources() -> None:
    """Let every config that is loaded know where it was loaded from, if it has a method `set_source` to be told.

    Our tuners check an adapter's file against the model before they touch the model. PEFT injects the layers first and
    reads the file later, and transformers' `load_adapter` calls `PeftConfig.from_pretrained` on the base class, so a
    subclass's own `from_pretrained` would not be asked.
    """
    original = PeftConfigMixin.__dict__["from_pretrained"].__func__
    if hasattr(original, "remembers_adapter_sources"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if hasattr(config, "set_source"):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            config.set_source(pretrained_model_name_or_path, subfolder=subfolder, **hub_kwargs)
        return config

    from_pretrained.remembers_adapter_sources = True  # type: ignore[attr-defined]
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]

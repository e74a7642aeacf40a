"""Every private name of PEFT, transformers and accelerate that is read, called or set, each in a function of its own.

A new version of these packages may change any of them, and this is then the place to mend. Methods of PEFT's base
classes that our tuners and layers override are not here: overriding is what PEFT offers. What is replaced in PEFT and
transformers for good is in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import ModelOutput


# Whether PEFT asks a tuner for the names of the tensors that it is going to load, as it does since 0.21. Before, the
# only way is to wrap `set_peft_model_state_dict`.
ASKS_TUNER_FOR_NAMES = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")


def add_peft_type(name: str) -> PeftType:
    """Give PEFT's enum of types one more member. PEFT has no plug-ins, and an enum cannot be extended in public.

    Args:
        name: The member's name and value.
    """
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that PEFT hands to the Hub. PEFT has no public list of them."""
    return PeftConfig._split_kwargs(dict(kwargs))[0]


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules that hold adapters of any type, also copies of a base module (`modules_to_save`).

    PEFT offers the classes: `AuxiliaryTrainingWrapper` is public, but not exported by `peft.utils`.
    """
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def held_by(layer: Any) -> set[str]:
    """The names of the adapters that a layer holds. In public PEFT says only which are active.

    Args:
        layer: A tuner layer, or PEFT's wrapper of a module that is saved along.
    """
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return set(layer._get_available_adapters())
    return set(layer._all_available_adapter_names())


def saved_along(model: nn.Module, adapter_name: str) -> dict[str, AuxiliaryTrainingWrapper]:
    """By name, PEFT's wrappers of the modules that are trained and saved along with an adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in held_by(module)
    }


def is_tuner_child(module: nn.Module) -> bool:
    """Whether a tuner (of this package or another) put a module beside the base's modules, and not around one.

    PEFT has no name for this. A layer around a module keeps it as `base_layer`.
    """
    return isinstance(module, BaseTunerLayer) and not hasattr(module, "base_layer")


def adapter_parts(model: nn.Module) -> tuple[str, ...]:
    """The names of all modules of a model that adapters brought, each with a dot at its end.

    PEFT tells them apart by their parameters' names, type by type. The base's own modules keep the same names in all
    types: `base_layer` in a tuner layer, `original_module` in a wrapper.
    """
    parts = []
    for name, module in model.named_modules():
        if is_tuner_child(module):
            parts.append(f"{name}.")
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            children: Iterable[str] = vars(module)["_modules"]
            parts += [f"{name}.{child}." for child in children if child not in ("base_layer", "original_module")]
    return tuple(parts)


def base_name(key: str) -> str:
    """The name that a tensor of the base has without the tuner layers and wrappers around its module."""
    return key.replace(".original_module.", ".").replace(".base_layer.", ".")


def loads_adapters_itself(model: Any) -> bool:
    """Whether transformers counts a model as one with adapters of its own (`add_adapter`, `load_adapter`).

    In public transformers only raises an error where it does not.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def forget_adapters(model: Any) -> None:
    """Have transformers count a model as one without adapters. It has no way back from `add_adapter` itself."""
    model._hf_peft_config_loaded = False


def conversion_of(model: Any) -> Mapping[str, str] | None:
    """The patterns by which PEFT renames the keys of an adapter for a model, where the model's class has some.

    transformers offers `get_model_conversion_mapping` for those that are not attributes of a class.
    """
    return getattr(model, "_checkpoint_conversion_mapping", None)


def attn_implementation(config: Any) -> str:
    """The name of the attention kernel that a model runs with. transformers offers only a way to set it."""
    return config._attn_implementation


def check_model_kwargs(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse keyword arguments as `generate` does, which has no public list of those that it knows.

    Args:
        model: A transformers model.
        model_kwargs: The arguments.
    """
    type(model)._validate_model_kwargs(model, model_kwargs)


def next_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What `generate` makes of the inputs other than `input_ids` when one token is added. It has no public step."""
    return model._update_model_kwargs_for_generation(ModelOutput(), inputs, num_new_tokens=1)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere. It notes this on the module alone."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)

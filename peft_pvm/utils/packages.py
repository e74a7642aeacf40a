"""What this package needs to know of other packages: supported versions, optional packages, and private names.

Every name that differs between versions is here, and every private name of PEFT, transformers and accelerate that is
read, called or set, each in a function of its own. A new version may change any of them. This is then the place to
repair. Methods of PEFT's base classes that our tuners and layers override are not here: overriding is what PEFT
offers. What is replaced in PEFT and transformers for good is in `tuners/registry.py`, and a model's methods are named
where a `Shadow` takes their place.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput


# The oldest and the newest minor version that the tests run on. pyproject.toml and README.md say the same.
SUPPORTED = {"transformers": ("5.16", "5.24"), "peft": ("0.20", "0.21")}

# The argument that takes a KV cache, and the field of an output that holds it. Renamed in transformers 5.24, which
# also takes the old name of the argument.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)

# By modality, the keywords of a multimodal forward that bring its features. `generate` encodes them beforehand and
# hands over a dict by modality; Idefics3 and its kin also take a tensor of image features, under either name. In
# older transformers, Video-LLaVA and Fuyu have their own names for pixels.
FEATURE_KEYWORDS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches", "image_hidden_states"),
    "video": ("pixel_values_videos",),
}
ENCODED_FEATURES = "mm_encoder_outputs"

# Older ones warn that the tensors of `modules_to_save` are unexpected, and run without them.
LOADS_MODULES_TO_SAVE = "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter)
# Whether PEFT asks a tuner for the names of the tensors that it is going to load, as it does since 0.21. Before, the
# only way is to wrap `set_peft_model_state_dict`.
ASKS_TUNER_FOR_NAMES = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")


def supported_ranges() -> str:
    """The supported versions in words.

    Example:
        >>> supported_ranges()
        'transformers 5.16 to 5.24 and peft 0.20 to 0.21'
    """
    return " and ".join(f"{package} {oldest} to {newest}" for package, (oldest, newest) in SUPPORTED.items())


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Refuse versions that are too old, and warn of those that nobody has tested.

    Args:
        installed: Versions by package; `None`: those that are installed.

    Raises:
        ImportError: A package is older than the oldest supported version.
    """
    if installed is None:
        installed = {package: importlib.metadata.version(package) for package in SUPPORTED}
    untested = []
    for package, (oldest, newest) in SUPPORTED.items():
        found = f"{package} {installed[package]}"
        if _minor(installed[package]) < _minor(oldest):
            raise ImportError(f"peft_pvm supports {supported_ranges()}, but {found} is installed. Upgrade {package}.")
        if _minor(installed[package]) > _minor(newest):
            untested.append(found)
    if untested:
        warnings.warn(
            f"peft_pvm is tested with {supported_ranges()}, but {' and '.join(untested)} is installed. It may work: "
            "compare its outputs with those on a tested version.",
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def cache_in(inputs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the inputs of a forward, by whatever name it was given."""
    return next((inputs[name] for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)), None)


def caches_in(output: Any) -> list[Cache]:
    """The KV caches in what a text model returned."""
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Cache)]


def paged_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """The inputs of a forward that several conversations share one row of: a paged cache, and the tables for it."""
    paged = [name for name in CACHE_NAMES if isinstance(inputs.get(name), PagedAttentionCache)]
    return paged + [name for name in ("cu_seq_lens_q", "block_table") if inputs.get(name) is not None]


def modalities_in(inputs: Mapping[str, Any]) -> list[str]:
    """The modalities that bring features to a multimodal forward, encoded beforehand or not."""
    encoded = inputs.get(ENCODED_FEATURES)
    if encoded is not None and not isinstance(encoded, Mapping):
        encoded = {"image": encoded}
    return [
        modality
        for modality, keywords in FEATURE_KEYWORDS.items()
        if (encoded or {}).get(modality) is not None or any(inputs.get(keyword) is not None for keyword in keywords)
    ]


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
    """The arguments of a `from_pretrained` that PEFT passes to the Hub. PEFT has no public list of them."""
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


def block_mask(rule: Callable[..., torch.Tensor], batch: int, num_queries: int, key: torch.Tensor) -> BlockMask:
    """A mask of flex attention, made as transformers makes its own: compiled, without a whole matrix.

    Args:
        rule: Gives whether a query sees a key, from indices of the batch, the head, the query and the key.
        batch: How many rows the batch has.
        num_queries: How many queries there are.
        key: The keys, `(batch, kv_heads, num_keys, head_dim)`.
    """
    return create_block_mask(rule, batch, None, num_queries, key.shape[2], device=key.device, _compile=True)


def flex_attention_with_sums(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flex attention as transformers runs it, and the logarithm of each row's sum. torch 2.9 asks for it in a new way.

    Args:
        query: `(batch, heads, num_queries, head_dim)`.
        key: `(batch, kv_heads, num_keys, head_dim)`.
        value: `(batch, kv_heads, num_keys, value_dim)`.
        mask: Which pairs count.
        scaling: What products are multiplied by.

    Returns:
        `(batch, heads, num_queries, value_dim)` and `(batch, heads, num_queries)`.
    """
    heads = query.shape[1]
    if heads & (heads - 1):  # not a power of two
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    output, sums = compile_friendly_flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
        **get_flex_attention_lse_kwargs(True),
    )
    return output, getattr(sums, "lse", sums)


def next_inputs(model: Any, inputs: dict[str, Any], output: Any = None) -> dict[str, Any]:
    """What `generate` makes of the inputs other than `input_ids` when one token is added. It has no public step.

    Args:
        model: A transformers model.
        inputs: The inputs.
        output: What the model returned for them, which may hold the cache.
    """
    output = ModelOutput() if output is None else output
    return model._update_model_kwargs_for_generation(output, inputs, num_new_tokens=1)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere. It notes this only on the module."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


@functools.cache
def caps_paligemma() -> bool:
    """Whether PaliGemma caps its logits as the Gemma 2 in it does. Older transformers leave that out."""
    from transformers.models.paligemma import modeling_paligemma  # loaded where such a model is at hand

    return "final_logit_softcapping" in inspect.getsource(modeling_paligemma)

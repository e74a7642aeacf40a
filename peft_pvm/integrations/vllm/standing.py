"""What our classes use of vLLM's internals, checked at start: a difference is refused, and the error names it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from inspect import Parameter
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models import supports_lora
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

from .families import Family


VERSIONS = ("0.32.", "0.33.")  # of vLLM, which the tests were run with

# What our classes override, call or read: parameters, in this order unless they are named, and attributes.
MODEL_FORWARD = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")
POSITIONS_OF_PROMPT = ("input_tokens", "mm_features")
LAYER_FORWARD = ("positions", "hidden_states", "residual")
SELF_ATTENTION_FORWARD = ("positions", "hidden_states")
SELF_ATTENTION = ("attn", "rotary_emb", "head_dim", "num_heads", "num_kv_heads", "scaling")
ATTENTION = ("layer_name", "head_size", "sliding_window", "attn_backend")
CALLED: dict[Callable, tuple[str, ...]] = {
    Attention.__init__: (
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "cache_config",
        "per_layer_sliding_window",
        "prefix",
    ),
    Attention.forward: ("query", "key", "value"),
    ReplicatedLinear.__init__: ("input_size", "output_size", "bias", "prefix"),
}
READ: dict[Callable, tuple[str, ...]] = {
    PlaceholderRange: ("offset", "length", "is_embed"),
    MultiModalFeatureSpec: ("mm_position",),
}


def warn_of_other_version() -> None:
    """Warn of a version of vLLM in which what is checked here was not read as well."""
    if not vllm.__version__.startswith(VERSIONS):
        warnings.warn(
            f"Our adapters were tested with vLLM {' and '.join(VERSIONS)}, but this is {vllm.__version__}. Names and "
            "parameters are checked, but nobody has read the code. Compare some answers with those of transformers.",
            stacklevel=2,
        )


def refuse_what_breaks(vllm_config: VllmConfig, has_anchors: bool) -> None:
    """Raise NotImplementedError for a configuration that is known to break."""
    config = vllm_config.parallel_config
    sizes = config.pipeline_parallel_size, config.decode_context_parallel_size, config.prefill_context_parallel_size
    if max(sizes) > 1:
        raise NotImplementedError("Our adapters in vLLM know tensor parallelism only: neither pipeline nor context.")
    if vllm_config.speculative_config is not None:
        raise NotImplementedError("Our adapters in vLLM do not work with speculative decoding: leave it out.")
    if vllm_config.model_config.get_multimodal_config().is_multimodal_pruning_enabled():
        raise NotImplementedError("Our adapters in vLLM do not work with the pruning of videos: leave it out.")
    if has_anchors and vllm_config.use_v2_model_runner:
        raise NotImplementedError(
            "DIPE and Log-bias need 64 bits for a position, and vLLM's second model runner has 32. "
            "Set VLLM_USE_V2_MODEL_RUNNER=0 in the environment."
        )


def refuse_other_lora(vllm_config: VllmConfig, native: Any, switch: str | None, choices: Mapping[str, bool]) -> None:
    """Raise NotImplementedError where vLLM's LoRA is off or other than choices, or vLLM's class of a model, want it.

    Args:
        vllm_config: vLLM's.
        native: vLLM's class.
        switch: The name of the layer that choices are LoRAs of; `None` without choices.
        choices: The names that requests choose by, and whether each holds a LoRA of the base's layers. With none, the
            adapters are on in every request.
    """
    config = vllm_config.lora_config
    if config is None:
        if choices:
            raise NotImplementedError(
                f"Requests choose between {', '.join(choices)} as between LoRAs of vLLM's: start it with "
                "--enable-lora and --lora-modules NAME=FOLDER for each."
            )
        return
    if not supports_lora(native) and not (choices and config.target_modules == [switch]):
        raise NotImplementedError(
            f"vLLM has no LoRA for {native.__name__}. Its requests can choose between adapters without one: "
            "export them so, and start it with the command that is printed."
        )
    if choices and config.target_modules is not None and switch not in config.target_modules:
        raise NotImplementedError(f"Requests choose by the layer {switch}: add it to --lora-target-modules.")
    if config.target_modules is not None and (with_lora := [name for name in choices if choices[name]]):
        raise NotImplementedError(
            f"{', '.join(with_lora)} hold a LoRA, of which vLLM would leave out what is not among "
            "--lora-target-modules: start it without."
        )
    least = max(len(choices), 1) + 1
    if current_platform.is_cpu() and config.max_loras < least:
        raise NotImplementedError(
            "On a CPU, vLLM runs requests without a LoRA with the last place for one, which has to stay empty: start "
            f"it with --max-loras {least} or more."
        )
    if choices:
        _tells_loras_apart(kv_cache_utils._gen_lora_extra_hash_keys)


def refuse_other_model(native: Any, family: Family) -> None:
    """Raise NotImplementedError if vLLM's class of a model, or what we call for each, differs from what we rely on."""
    for function, names in CALLED.items():
        _takes(function, names, alone=True)
    for function, names in READ.items():
        _takes(function, names)
    _takes(native.forward, MODEL_FORWARD)
    if family.makes_positions != getattr(native, "supports_mrope", False):
        raise _differs(native, "makes the positions of a prompt" if family.makes_positions else "counts tokens")
    if family.makes_positions:
        _takes(native.get_mrope_input_positions, POSITIONS_OF_PROMPT, alone=True)


def refuse_other_text_model(model: Any, text_model: type) -> None:
    """Raise NotImplementedError if a model was built without the text model that our class put in its place."""
    _has(model, ("language_model",))
    _has(model.language_model, ("model",))
    _has(model.language_model.model, ("embed_input_ids",))
    if type(model.language_model.model) is not text_model:
        raise _differs(type(model), f"builds its text model as {text_model.__mro__[1].__name__}")


def refuse_other_layer(layer: Any, attends: bool) -> None:
    """Raise NotImplementedError if a decoder layer, with attention or without, differs from what we rely on."""
    _takes(type(layer).forward, LAYER_FORWARD, by_name=True)
    if not attends:
        return
    _has(layer, ("self_attn",))
    _takes(type(layer.self_attn).forward, SELF_ATTENTION_FORWARD)
    _has(layer.self_attn, SELF_ATTENTION)
    if type(layer.self_attn.attn) is not Attention:
        raise _differs(type(layer.self_attn), f"attends by {Attention.__name__}")
    _has(layer.self_attn.attn, ATTENTION)
    _has(layer.self_attn.attn.attn_backend, ("supports_head_size",))


def _tells_loras_apart(make_keys: Callable) -> None:
    """Check that vLLM tells LoRAs apart, by what it adds to the key of a cached block."""
    _takes(make_keys, ("request",))
    asked = None, LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b")
    keys = [make_keys(SimpleNamespace(lora_request=lora)) for lora in asked]
    if any(keys.count(key) > 1 for key in keys):
        raise _differs(make_keys, "makes other keys for other LoRAs")


def _takes(function: Callable, names: tuple[str, ...], by_name: bool = False, alone: bool = False) -> None:
    """Check that a function has some parameters.

    With `by_name`, their order does not count. With `alone`, nothing else has to be given.
    """
    parameters = inspect.signature(function).parameters
    found = tuple(name for name in parameters if name in names)
    if found != names and not (by_name and set(found) == set(names)):
        raise _differs(function, f"takes {', '.join(names)}")
    any_number = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    required = [name for name, p in parameters.items() if p.default is Parameter.empty and p.kind not in any_number]
    if alone and not {"self", *names}.issuperset(required):
        raise _differs(function, f"takes {', '.join(names)} and wants nothing else")


def _has(owner: object, names: tuple[str, ...]) -> None:
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise _differs(type(owner), f"has {', '.join(missing)}")


def _differs(what: Any, expected: str) -> NotImplementedError:
    return NotImplementedError(
        f"Our adapters build on internal classes of vLLM {' and '.join(VERSIONS)}, where {what.__module__}."
        f"{what.__qualname__} {expected}. In this one, {vllm.__version__}, it does not: install one of those."
    )

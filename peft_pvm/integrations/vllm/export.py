"""A folder that vLLM serves, made of a base model and adapters, and what its config says of the adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import AutoConfig

from ...folders.adapter_file import PEFT_PREFIX, SavedConfig, open_adapter, read_config
from ...folders.base_checkpoint import BaseCheckpoint
from ...methods.dipe import DIPEConfig
from ...methods.log_bias import LogBiasConfig
from ...methods.pvm import PVMConfig
from ...methods.pvm.checkpoints import check_shapes, read_adapter
from ...methods.pvm.merging import Tensors
from ...methods.vaf import VAFConfig
from ...tokens.families import WITHOUT_SCORES
from ...tuners.base import with_absent_fields
from ...tuners.names import TOGETHER, adapter_names, separate
from ...utils.text import quoted
from .choices import IN_CHECKPOINT, Choice, name_of_switch, refuse_others, switch_weight, write_choices
from .families import FAMILIES, TEXT_MODELS


FIELD = "peft_pvm"  # the field of the text config that holds the adapters and choices
# A model whose config has this field makes the positions of a prompt itself, which is where labels are attached. The
# field belongs to mRoPE; vLLM takes it for that beside a text model without mRoPE as well, which ignores it.
MAKES_POSITIONS = "mrope_section"
LEFT_OUT = ("base_model_name_or_path", "revision")  # where an adapter was trained may be a private path
STEERING = (DIPEConfig, VAFConfig, LogBiasConfig)  # methods without parameters that vLLM's kernels can do
# Fields of LoRA that vLLM refuses when it loads one, or passes over: it scales all layers alike.
NOT_OF_VLLM = (
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start a LoRA


def export_vllm(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    accept_causal: bool = False,
    by_request: bool = False,
) -> Path:
    """Make a folder that `vllm serve` takes, where this package is installed beside vLLM.

    It holds a copy of the base's weights, one more file with the weights of the adapters, and a config that names our
    class. A single adapter is on in every request. With several, a request chooses one by its name, or none, as it
    would choose a LoRA: for each, the sub-folder `choices` holds a folder for `--lora-modules`.

    Args:
        base: Folder or Hub id of a model of one of the `FAMILIES`.
        adapters: Folders or Hub ids, or several with `+` between, which are on at once: one of each method at most.
        output_dir: The folder.
        accept_causal: Accept an adapter with `memory_visibility="sample"` as well. In vLLM, a token sees only the
            images before it. This makes no difference if all images come before the text.
        by_request: Also let requests choose if there is a single adapter: between it and none.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The base has no safetensors checkpoint.
        NotImplementedError: Another base or method, or an adapter that asks for what vLLM cannot do.
        ValueError: Two adapters of one method at once, one that does not fit the base, or a folder with other choices.
    """
    checkpoint = BaseCheckpoint(base)
    content = checkpoint.config
    base_config = _base_config(base, content)
    family = FAMILIES[base_config.model_type]
    combinations = [separate(adapter) for adapter in dict.fromkeys(adapters)]
    sources = list(dict.fromkeys(chain(*combinations)))
    if not sources:
        raise ValueError("No adapter is given. To serve only the base, give it to vLLM as it is.")
    configs = {source: _config(source, base, base_config) for source in sources}
    by_request = by_request or len(combinations) > 1
    for combination in combinations:
        _check_together({source: configs[source] for source in combination}, by_request)
    ours = [source for source in sources if not isinstance(configs[source], LoraConfig)]
    further: Tensors = {}
    for number, source in enumerate(ours):
        if isinstance(configs[source], PVMConfig):
            further |= _pvm_weights(source, checkpoint, number, accept_causal)
    choices = _choices(combinations, ours) if by_request else []
    names = {choice.name: choice.lora is not None for choice in choices}
    refuse_others(Path(output_dir), names)
    fields = [_fields(configs[source]) for source in ours]
    switch = name_of_switch(fields, further, choices)
    if choices:
        further |= switch_weight(switch, len(ours))
    content["architectures"] = [family.architecture]
    if not family.makes_positions:
        content[MAKES_POSITIONS] = []
    content["text_config"][FIELD] = {"adapters": fields, "choices": names, "switch": switch if choices else None}
    return checkpoint.copy(
        output_dir, content, further, lambda folder: write_choices(folder, choices, switch, len(ours))
    )


def _base_config(base: str | os.PathLike, content: dict[str, Any]) -> Any:
    """The base's, as transformers reads it, if vLLM serves such a model with our adapters."""
    found = content.get("model_type")
    if found not in FAMILIES:
        raise NotImplementedError(f"{base} is of type {quoted(found)}. For vLLM there are {', '.join(FAMILIES)}.")
    config = AutoConfig.for_model(**content)
    if (text_type := config.get_text_config().model_type) not in TEXT_MODELS:
        raise NotImplementedError(
            f"The text model of {base} is of type {quoted(text_type)}. For vLLM there are {', '.join(TEXT_MODELS)}."
        )
    return config


def _config(adapter: str, base: str | os.PathLike, base_config: Any) -> PeftConfig:
    """An adapter's configuration, if vLLM serves such a one with our classes, or LoRA's beside them."""
    if isinstance(lora := PeftConfig.from_pretrained(adapter), LoraConfig):
        return lora
    config = read_config(adapter)
    if isinstance(config, PVMConfig):
        return config
    if not isinstance(config, STEERING):
        methods = ", ".join(known.method for known in (PVMConfig, *STEERING))
        raise NotImplementedError(
            f"{adapter} is an adapter of {config.method}, which needs more than vLLM's kernels show or do. For vLLM "
            f"there are {methods}."
        )
    if isinstance(config, DIPEConfig):
        for name, known in (("anchor", "run"), ("axes", "all")):
            if (value := getattr(config, name)) != known:
                raise NotImplementedError(
                    f"{adapter} has {name}={quoted(value)}. In vLLM, DIPE knows {name}={known!r} only."
                )
    text_config = base_config.get_text_config()
    layers = attending_layers(text_config)
    if wrong := [layer_idx for layer_idx in layers_of(config, text_config) if layer_idx not in layers]:
        raise ValueError(
            f"{adapter} acts on layers {quoted(wrong)}, but {base} has attention in {quoted(layers)} only."
        )
    return config


def _check_together(configs: dict[str, PeftConfig], by_request: bool) -> None:
    """Raise a ValueError for adapters, by what they are read from, that cannot be on at once."""
    by_method: dict[str, str] = {}
    for source, config in configs.items():
        method = config.method if isinstance(config, SavedConfig) else "LoRA"
        if method in by_method:
            raise ValueError(
                f"{by_method[method]} and {source} are both adapters of {method}, of which one can be on at once. To "
                f"let requests choose between them, give them apart, without {TOGETHER!r}."
            )
        by_method[method] = source
    if "LoRA" in by_method and (len(by_method) == 1 or not by_request):
        raise ValueError(
            f"{by_method['LoRA']} is LoRA, which vLLM serves itself: leave it out here, and give it to vLLM with "
            "--lora-modules. Beside other adapters it can be part of what a request chooses (by_request)."
        )


def _choices(combinations: Sequence[Sequence[str]], ours: Sequence[str]) -> list[Choice]:
    """What requests choose between, with names from those of folders."""
    names = {source: name for name, source in adapter_names(dict.fromkeys(chain(*combinations))).items()}
    return [
        Choice(
            TOGETHER.join(names[source] for source in combination),
            [ours.index(source) for source in combination if source in ours],
            next((_lora(source) for source in combination if source not in ours), None),
        )
        for combination in combinations
    ]


def _lora(adapter: str) -> tuple[LoraConfig, Tensors]:
    """A LoRA that is part of a choice, if vLLM computes it as PEFT does."""
    config, file = open_adapter(adapter, LoraConfig, "LoRA")
    if asked := [name for name in NOT_OF_VLLM if getattr(config, name, None) not in (None, False, "none", [], {})]:
        raise NotImplementedError(
            f"{adapter} is a LoRA with {', '.join(asked)}, which vLLM does not take or would pass over. Merge it into "
            "the base, and export that."
        )
    if str(config.init_lora_weights).partition("_niter")[0] in CHANGE_THE_BASE:
        raise NotImplementedError(
            f"{adapter} was trained on a base that {config.init_lora_weights} had changed, but it is served with the "
            "base as it is. Convert it first: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    tensors = dict(file.read())
    if outside := sorted(key for key in tensors if not key.startswith(f"{PEFT_PREFIX}{IN_CHECKPOINT}.")):
        raise NotImplementedError(
            f"{adapter} is a LoRA outside the text model too ({len(outside)} tensors, such as {quoted(outside[0])}), "
            "which vLLM would leave out. Merge it into the base, and export that, or train one of the text model."
        )
    config.base_model_name_or_path = config.revision = None
    return config, tensors


def _pvm_weights(adapter: str, base: BaseCheckpoint, number: int, accept_causal: bool) -> Tensors:
    """The tensors of an adapter by their names in the model, where the adapter has this number."""
    config, tensors = read_adapter(adapter)
    if config.modules_to_save:
        raise NotImplementedError(
            f"{adapter} brings modules of the base, {quoted(config.modules_to_save)}. First save the base with them, "
            "and the adapter without."
        )
    if not accept_causal and any(part.memory_visibility == "sample" for part in config.parts()):
        raise ValueError(
            f"{adapter} lets a token see all images of its sample, also later ones. In vLLM it sees those before it, "
            "which is the same if images come before the text. If yours do, pass --accept-causal."
        )
    check_shapes(adapter, tensors, [], config, base.config)
    return {
        key.removeprefix(PEFT_PREFIX).replace(".pvm.", f".pvm.{number}."): tensor for key, tensor in tensors.items()
    }


def _fields(config: PeftConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if value is not None and name not in LEFT_OUT}


def serve_environment(folder: str | os.PathLike) -> dict[str, str]:
    """What `vllm serve` wants in its environment, for a folder of `export_vllm`."""
    text_config = AutoConfig.from_pretrained(folder).get_text_config()
    return {"VLLM_USE_V2_MODEL_RUNNER": "0"} if needs_first_runner(text_config) else {}


def adapters_of(text_config: Any) -> list[Any]:
    """The adapters' configurations, as `export_vllm` wrote them into a text config.

    Raises:
        ValueError: An earlier version wrote them.
    """
    found = getattr(text_config, FIELD)
    if "switch" not in found:
        raise ValueError("An earlier version of peft_pvm made this folder. Make it again: peft-pvm export-vllm.")
    return [PeftConfig.from_peft_type(**with_absent_fields(fields)) for fields in found["adapters"]]


def choices_of(text_config: Any) -> dict[str, bool]:
    """The names that requests choose by, and which of these choices hold a LoRA of the base's layers.

    With none, the adapters are on in every request.
    """
    return getattr(text_config, FIELD)["choices"]


def switch_of(text_config: Any) -> str | None:
    """The name of the layer that choices are LoRAs of, if requests choose."""
    return getattr(text_config, FIELD)["switch"]


def needs_first_runner(text_config: Any) -> bool:
    """Whether an adapter needs 64 bits for a position, which vLLM's second model runner has not."""
    return any(isinstance(config, (DIPEConfig, LogBiasConfig)) for config in adapters_of(text_config))


def attending_layers(text_config: Any) -> list[int]:
    """The decoder layers with attention that has scores, which methods without parameters act on."""
    layer_types = getattr(text_config, "layer_types", None) or [""] * text_config.num_hidden_layers
    return [layer_idx for layer_idx, layer_type in enumerate(layer_types) if layer_type not in WITHOUT_SCORES]


def layers_of(config: Any, text_config: Any) -> list[int]:
    """The decoder layers that an adapter acts on."""
    if isinstance(config, PVMConfig):
        return config.layer_indices
    return config.layers_among(attending_layers(text_config))

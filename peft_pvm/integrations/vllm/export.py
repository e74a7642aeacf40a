"""A folder that vLLM serves, made of a base model and adapters, and what its config says of the adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ...folders.adapter_file import PEFT_PREFIX, read_config
from ...folders.base_checkpoint import BaseCheckpoint
from ...methods.dipe import DIPEConfig
from ...methods.pvm import PVMConfig
from ...methods.pvm.checkpoints import check_shapes
from ...methods.pvm.files import read_adapter
from ...methods.pvm.merging import Tensors
from ...utils.checks import layer_list
from ...utils.text import quoted


BASES = ("qwen3_vl",)  # by `model_type`
ARCHITECTURE = "PeftPVMQwen3VLForConditionalGeneration"
FIELD = "peft_pvm"  # of the text config, where the adapters stand by method
LEFT_OUT = ("base_model_name_or_path", "revision")  # where an adapter was trained may be a private path


def export_vllm(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    accept_causal: bool = False,
) -> Path:
    """Make a folder that `vllm serve` takes, where this package is installed beside vLLM.

    It holds a copy of the base's weights as they are, one more file with PVM's, and a config that names our class.

    Args:
        base: Folder or Hub id of a Qwen3-VL.
        adapters: Folders or Hub ids, at most one of PVM and one of DIPE.
        output_dir: The folder.
        accept_causal: Take an adapter with `memory_visibility="sample"` as well. In vLLM a token sees the images
            before it, which is the same for images in front of the text.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The base has no safetensors checkpoint.
        NotImplementedError: Another base or method, or an adapter that brings modules of the base.
        ValueError: Not our adapters, two of one method, or one that does not fit the base.
    """
    checkpoint = BaseCheckpoint(base)
    if (found := checkpoint.config.get("model_type")) not in BASES:
        raise NotImplementedError(f"{base} is of type {quoted(found)}. For vLLM there is {', '.join(BASES)}.")
    by_method: dict[str, dict[str, Any]] = {}
    branch: Tensors = {}
    for adapter in adapters:
        config = read_config(adapter)
        if config.method in by_method:
            raise ValueError(f"{adapter} is a second adapter of {config.method}, but one model is served with one.")
        if isinstance(config, PVMConfig):
            branch = _pvm_weights(adapter, checkpoint, accept_causal)
        elif isinstance(config, DIPEConfig):
            num_layers = checkpoint.config["text_config"]["num_hidden_layers"]
            chosen = [] if config.layers_to_transform is None else layer_list(config, "None")
            if beyond := [index for index in chosen if index >= num_layers]:
                raise ValueError(f"{adapter} acts on layers {quoted(beyond)}, but {base} has {num_layers} layers.")
        else:
            raise NotImplementedError(f"{adapter} is an adapter of {config.method}. For vLLM there are PVM and DIPE.")
        by_method[config.method] = {
            name: value for name, value in config.to_dict().items() if value is not None and name not in LEFT_OUT
        }
    if not by_method:
        raise ValueError("No adapter is given. To serve the base alone, vLLM takes it as it is.")
    content = checkpoint.config
    content["architectures"] = [ARCHITECTURE]
    content["text_config"][FIELD] = by_method
    return checkpoint.copy(output_dir, content, branch)


def _pvm_weights(adapter: str | os.PathLike, base: BaseCheckpoint, accept_causal: bool) -> Tensors:
    """By their names in the model."""
    config, tensors = read_adapter(adapter)
    if config.modules_to_save:
        raise NotImplementedError(
            f"{adapter} brings modules of the base, {quoted(config.modules_to_save)}. First save the base with them, "
            "and the adapter without."
        )
    if not accept_causal and any(part.memory_visibility == "sample" for part in config.parts()):
        raise ValueError(
            f"{adapter} lets a token see all images of its sample, also later ones. In vLLM it sees those before it, "
            "which is the same where images stand in front of the text. If yours do: --accept-causal."
        )
    check_shapes(adapter, tensors, [], config, base.config)
    return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def configs_of(text_config: Any) -> tuple[PVMConfig | None, DIPEConfig | None]:
    """The adapters' configurations, as `export_vllm` wrote them into a text config."""
    by_method = getattr(text_config, FIELD)
    found = [PeftConfig.from_peft_type(**by_method[name]) if name in by_method else None for name in ("pvm", "dipe")]
    return found[0], found[1]


def acts_on(dipe: DIPEConfig, layer_idx: int) -> bool:
    """Whether DIPE acts on a decoder layer of Qwen3-VL, which all rotate queries and keys."""
    return dipe.layers_to_transform is None or layer_idx in layer_list(dipe, "None")

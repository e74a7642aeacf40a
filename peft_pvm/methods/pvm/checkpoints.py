"""PVM adapters and checkpoints as files, without a model: read, combined, converted.

The checkpoints of the authors' own code hold the whole model, with the branch's weights under
`model.language_model.layers.N.pvm_block.` and two fields in the text config, `pvm_hidden_size` and `pvm_layers`. They
are read shard by shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...folders.adapter_file import PEFT_PREFIX, open_adapter, read_tensors
from ...folders.base_checkpoint import BaseCheckpoint, opened
from ...folders.companions import NOTED
from ...folders.incoming import NOTHING
from ...folders.writing import write_adapter, written_whole
from ...tuners.saving import own_tensors
from ...utils.text import listed, plain, quoted
from .config import BranchShape, PVMConfig, weight_name
from .layer import PVMLayer
from .merging import Tensors, check_alike, combine


BRANCH = ".pvm_block."  # in the name of every weight of the branch
FIELDS = ("pvm_hidden_size", "pvm_layers")
AUTHORS_NAMES = {
    "gate": "gate_alpha",
    "text_reducer": "text_reducer.weight",
    "vision_reducer": "vision_reducer.weight",
    "output_expander": "output_expander.weight",
    "input_norm": "input_norm.weight",
    "post_attn_norm": "post_attn_norm.weight",
    **{name: f"cross_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
}
AUTHORS_KEY = re.compile(r"(?P<layer>model\.language_model\.layers\.(?P<layer_idx>\d+))\.pvm_block\.(?P<name>.+)")


def convert_reference_checkpoint(
    source: str | os.PathLike, output_dir: str | os.PathLike, base_dir: str | os.PathLike | None = None
) -> Path:
    """Convert a checkpoint of the PVM authors' code to an adapter.

    The adapter has `memory_visibility="sample"`, as in their code. Its tensors keep their dtype. In their second
    stage, the language model was trained along with PVM, so an adapter from that stage needs the base of the same
    checkpoint. `base_dir` writes this base.

    Args:
        source: Folder or Hub id of the checkpoint, sharded or not.
        output_dir: Folder for the adapter.
        base_dir: Folder for the model without the branch; `None`: not written.

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: There is no safetensors checkpoint.
        ValueError: It holds no PVM branch, or a branch that does not match its config.
    """
    checkpoint = BaseCheckpoint(source)
    content = checkpoint.config
    text = content["text_config"]
    if missing := [name for name in FIELDS if name not in text]:
        raise ValueError(f"The text_config of {source} has no {', '.join(missing)}: it is no checkpoint of PVM.")
    config = PVMConfig(r=text["pvm_hidden_size"], layers_to_transform=text["pvm_layers"], memory_visibility="sample")
    config.base_model_name_or_path = str(content.get("_name_or_path") or "") or None
    tensors: Tensors = {}
    stray = []
    for shard in checkpoint.shards:
        with opened(shard) as file:
            for key in file.keys():  # noqa: SIM118
                if BRANCH not in key:
                    continue
                match = AUTHORS_KEY.fullmatch(key)
                names = [name for name, theirs in AUTHORS_NAMES.items() if match and theirs == match["name"]]
                if match is None or not names:
                    stray.append(key)
                else:
                    tensors[f"{PEFT_PREFIX}{match['layer']}.pvm.pvm_{names[0]}.weight"] = file.get_tensor(key)
    config.mlp_ratio = _mlp_ratio(tensors, config.r, text)
    check_shapes(source, tensors, stray, config, content)
    with written_whole(output_dir) as staged:
        write_adapter(staged, config, tensors)
        if base_dir is not None:
            checkpoint.copy_without(base_dir, {**content, "text_config": _without(text, FIELDS)}, BRANCH)
    return Path(output_dir)


def export_reference_checkpoint(
    adapter: str | os.PathLike, base: str | os.PathLike, output_dir: str | os.PathLike
) -> Path:
    """Export an adapter and its base model as a checkpoint for the PVM authors' code.

    In their code, every token of a sample sees every image of that sample. An adapter with
    `memory_visibility="causal"` gives the same results there if one image comes before the text, and other results
    if images come later.

    Args:
        adapter: Folder or Hub id of the adapter.
        base: Folder or Hub id of the base model.
        output_dir: Folder for the checkpoint: the base's shards as they are, one more for the branch.

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: The base has no safetensors checkpoint.
        ValueError: Not a PVM adapter, one that their code does not know, or one that does not fit the base.
    """
    config, tensors = read_adapter(adapter)
    other = {
        "branches": config.branches is not None,
        "memory_source": config.memory_source != "embeddings",
        "modules_to_save": bool(config.modules_to_save),
    }
    if any(other.values()):
        raise ValueError(f"The authors' code knows nothing like the adapter's {[k for k in other if other[k]]}.")
    checkpoint = BaseCheckpoint(base)
    content = checkpoint.config
    if config.mlp_ratio is not None and _mlp_ratio(tensors, config.r, content["text_config"]) is not None:
        raise ValueError(
            f"The authors' code takes the base's ratio, not the adapter's mlp_ratio of {config.mlp_ratio}."
        )
    check_shapes(adapter, tensors, [], config, content)
    content["text_config"].update(pvm_hidden_size=config.r, pvm_layers=config.layer_indices)
    branch = {}
    for key, tensor in tensors.items():
        layer, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".pvm.pvm_")
        branch[f"{layer}.pvm_block.{AUTHORS_NAMES[name.removesuffix('.weight')]}"] = tensor
    return checkpoint.copy(output_dir, content, branch)


def _mlp_ratio(tensors: Tensors, r: int, text: dict[str, Any]) -> float | None:
    """The ratio of the branch's MLP, where it is not the base's."""
    widths = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".pvm_up_proj.weight")}
    base_ratio = text["intermediate_size"] / text["hidden_size"]
    return None if len(widths) != 1 or widths == {int(r * base_ratio)} else widths.pop() / r


def check_shapes(
    source: str | os.PathLike, tensors: Tensors, stray: list[str], config: PVMConfig, content: dict[str, Any]
) -> None:
    """Compare the tensors of an adapter with what its configuration means on a base model.

    Args:
        source: Where they are from, for the message.
        tensors: By their keys in the adapter's file.
        stray: Other things that were found there.
        config: The adapter's configuration.
        content: What the base's `config.json` holds.

    Raises:
        ValueError: They are not the same.
    """
    text_config = _text_config(content)
    problems = [f"{key} is none of the branch's weights" for key in stray]
    if max(config.layer_indices) >= text_config.num_hidden_layers:
        problems.append(f"layers {config.layer_indices} are named, but there are only {text_config.num_hidden_layers}")
    needed = {}
    for number, part in enumerate(config.parts()):
        for name, shape in BranchShape.of(part, text_config).weights().items():
            needed.update(
                {(layer_idx, f"{weight_name(name, number)}.weight"): shape for layer_idx in part.layer_indices}
            )
    found = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".pvm.")
        found[int(layer.rpartition(".")[2]), name] = tuple(tensor.shape)
    for (layer_idx, name), shape in needed.items():
        if found.get((layer_idx, name)) != shape:
            had = found.get((layer_idx, name), "missing")
            problems.append(f"{name} of layer {layer_idx} is {had}, but must be of shape {shape}")
    problems += [f"layer {layer_idx} has {name}, but no branch" for layer_idx, name in found.keys() - needed.keys()]
    if problems:
        raise ValueError(f"{plain(source, 200)} does not hold the PVM branch that it speaks of: {listed(problems)}")


def _text_config(content: dict[str, Any]) -> Any:
    other = _without(content, ("model_type", "text_config"))
    text = _without(content["text_config"], FIELDS)
    return AutoConfig.for_model(content["model_type"], **other, text_config=text).get_text_config()


def _without(content: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in fields}


def read_adapter(path: str | os.PathLike, **kwargs: Any) -> tuple[PVMConfig, Tensors]:
    """The configuration and the tensors of a saved PVM adapter.

    Args:
        path: A folder or a Hub id.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is not a PVM adapter, or damaged, or its tensors are not those that its configuration speaks of.
        FileNotFoundError: There is no `adapter_model.safetensors`.
    """
    config, file = open_adapter(path, PVMConfig, "PVM", **kwargs)
    tensors = read_tensors(config, file)
    setattr(config, NOTED, file.companions())
    return config, tensors


def merge_adapters(
    adapters: Sequence[str | os.PathLike], weights: Sequence[float], out: str | os.PathLike, **options: Any
) -> Path:
    """Combine saved PVM adapters into one, as `PVMModel.add_weighted_adapter` does on a model.

    Args:
        adapters: Folders or Hub ids.
        weights: One for each.
        out: Folder of the new adapter.
        options: As `combine` takes them: `combination_type`, `density`, `majority_sign_method`, `force`.

    Returns:
        The folder.

    Raises:
        ValueError: One of them is no PVM adapter, or they cannot be combined this way.
    """
    config, tensors = combine([read_adapter(adapter) for adapter in adapters], weights, **options)
    return write_adapter(out, config, tensors, vars(config)[NOTED])


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give an attached PVM adapter the weights of another of the same shape, in place.

    It does for PVM what `peft.utils.hotswap.hotswap_adapter` does for LoRA: no module is added or removed, so a
    compiled model stays compiled. An existing KV cache still holds what the old weights computed for its images, so
    start new conversations with a new cache.

    Args:
        model: The model; wrapped by PEFT, compiled or neither.
        model_name_or_path: Folder or Hub id of the new adapter.
        adapter_name: Name of the attached adapter.
        torch_device: Without effect: the weights go where the old ones are. PEFT's function has it.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: There is no such adapter on the model, or the new one is of another shape, or its file is wrong.
            The old weights are then still there.
    """
    old = own_tensors(model, adapter_name)
    if not old:
        raise ValueError(f"The model has no PVM adapter {quoted(adapter_name)}.")
    config, file = open_adapter(model_name_or_path, PVMConfig, "PVM", **kwargs)
    layers = (module for module in model.modules() if isinstance(module, PVMLayer))
    attached = next(layer.configs[adapter_name] for layer in layers if adapter_name in layer.configs)
    check_alike([attached, config])
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    companions = file.companions()
    names = file.check(old, rename=NOTHING.renaming(base, old))
    with torch.no_grad():
        for key, tensor in file.read():
            old[names[key]].copy_(tensor)
    attached.lineage = config.lineage
    setattr(attached, NOTED, companions)

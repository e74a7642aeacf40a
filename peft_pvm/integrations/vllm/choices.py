"""Lets each request choose its adapters: vLLM's LoRA requests carry the choice, and a LoRA switches adapters on.

The text model has a linear layer whose input is the number 1 and whose output is one number for each adapter. Its
weight is 0. A choice is a folder with a LoRA of only this layer, which adds 1 for the adapters that it switches on.
vLLM does the rest as for any LoRA: it names the choices to its clients, knows the choice of each token in a batch, and
keeps cached prefixes apart.

The layer has another name in each export. So vLLM refuses choices of one export beside the adapters of another, where
the same numbers would mean other adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...folders.adapter_file import PEFT_PREFIX
from ...folders.companions import fields_of, hash_of
from ...folders.replacing import AREA
from ...methods.pvm.merging import Tensors
from ...utils.text import listed


SWITCH = "peft_pvm_switch"  # what the linear layer's name begins with, an attribute of the text model (`model.py`)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes places for
FOLDER = "choices"  # in the exported folder
IN_CHECKPOINT = "model.language_model"  # the text model


class Choice(NamedTuple):
    """What a request can choose.

    Attributes:
        name: What it is called by.
        adapters: The numbers of the adapters that are on.
        lora: A LoRA that is on as well, with its weights; the choice's folder holds them too.
    """

    name: str
    adapters: list[int]
    lora: tuple[LoraConfig, Tensors] | None = None


def name_of_switch(adapters: Any, tensors: Mapping[str, torch.Tensor], choices: Sequence[Choice]) -> str:
    """The linear layer's name in an export.

    Args:
        adapters: The adapters' configurations, as JSON holds them.
        tensors: Their weights.
        choices: What requests choose between.
    """
    found = [adapters, hash_of(tensors)]
    for choice in choices:
        lora = choice.lora and (fields_of(choice.lora[0]), hash_of(choice.lora[1]))
        found += [choice.name, choice.adapters, lora]
    return f"{SWITCH}_{hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()[:8]}"


def switch_weight(switch: str, num_adapters: int) -> Tensors:
    """The weight of the linear layer, by its name in a checkpoint: no adapter is on."""
    return {f"{IN_CHECKPOINT}.{switch}.weight": torch.zeros(num_adapters, 1)}


def refuse_others(folder: Path, names: Collection[str]) -> None:
    """Raise a ValueError if a folder holds choices of another export, which count other adapters."""
    if others := [path.name for path in _choices_in(folder) if path.name not in names]:
        raise ValueError(
            f"{folder / FOLDER} holds {listed(others)}, of another export. What they switch on is not the same here: "
            "name another folder, or remove them."
        )


def write_choices(folder: Path, choices: Sequence[Choice], switch: str, num_adapters: int) -> None:
    """Write the LoRA of each choice.

    Args:
        folder: Which the sub-folder for choices is made in.
        choices: What requests choose between.
        switch: The linear layer's name.
        num_adapters: How many adapters there are.
    """
    for choice in choices:
        config, tensors = choice.lora or (LoraConfig(r=1, lora_alpha=1, target_modules=[switch]), Tensors())
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        down, up = torch.zeros(config.r, 1), torch.zeros(num_adapters, config.r)
        down[0] = 1
        up[choice.adapters, 0] = 1 / scaling
        layer = f"{PEFT_PREFIX}{IN_CHECKPOINT}.{switch}"
        tensors = {**tensors, f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        config.save_pretrained(str(folder / FOLDER / choice.name))
        save_file(tensors, folder / FOLDER / choice.name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def serve_arguments(folder: str | os.PathLike) -> list[str]:
    """The arguments of `vllm serve` for a folder of `export_vllm`. Without choices, this is only the folder.

    They give vLLM a LoRA slot for each choice and an empty one, which it needs on a CPU. If no choice holds a LoRA of
    the base's layers, vLLM prepares only the linear layer that switches adapters on for LoRA.
    """
    choices = _choices_in(Path(folder))
    arguments = [os.fspath(folder)]
    if not choices:
        return arguments
    configs = [LoraConfig.from_pretrained(str(path)) for path in choices]
    rank = next((rank for rank in RANKS if rank >= max(config.r for config in configs)), RANKS[-1])
    arguments += ["--enable-lora", "--max-loras", str(len(choices) + 1), "--max-lora-rank", str(rank)]
    targets = [config.target_modules for config in configs]
    if all(isinstance(names, set) and len(names) == 1 and min(names).startswith(SWITCH) for names in targets):
        arguments += ["--lora-target-modules", *targets[0]]
    return [*arguments, "--lora-modules", *(f"{path.name}={path}" for path in choices)]


def _choices_in(folder: Path) -> list[Path]:
    """The folders of choices, in order, without what a dead process has left."""
    return sorted(path for path in (folder / FOLDER).glob("*") if path.is_dir() and path.name != AREA)

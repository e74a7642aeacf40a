"""Adapters by choice of a request: vLLM's LoRA requests carry the choice, and a LoRA says which adapters are on.

The text model has a linear layer from the number 1 to one number for each adapter, whose weight is 0. A choice is a
folder with a LoRA of this layer alone, which adds 1 for the adapters that it switches on. So vLLM does the rest as for
any LoRA: it names the choices to its clients, knows each token's in a batch, and keeps their cached prefixes apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...folders.adapter_file import PEFT_PREFIX, open_adapter
from ...methods.pvm.merging import Tensors
from ...utils.text import listed


SWITCH = "peft_pvm_switch"  # the linear layer, an attribute of the text model (`model.py`)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes places for
FOLDER = "choices"  # in the exported folder
IN_CHECKPOINT = f"model.language_model.{SWITCH}"


class Choice(NamedTuple):
    """What a request can choose.

    Attributes:
        name: What it is called by.
        adapters: The numbers of the adapters that are on.
        lora: Folder or Hub id of a LoRA that is on as well; the choice's folder holds its weights.
    """

    name: str
    adapters: list[int]
    lora: str | None = None


def switch_weight(num_adapters: int) -> Tensors:
    """The weight of the linear layer, by its name in a checkpoint: no adapter is on."""
    return {f"{IN_CHECKPOINT}.weight": torch.zeros(num_adapters, 1)}


def refuse_others(folder: Path, names: Collection[str]) -> None:
    """Raise a ValueError if a folder holds choices of another export, which count other adapters."""
    if others := sorted(path.name for path in (folder / FOLDER).glob("*") if path.name not in names):
        raise ValueError(
            f"{folder / FOLDER} holds {listed(others)}, of another export. What they switch on is not the same here: "
            "name another folder, or remove them."
        )


def write_choices(folder: Path, choices: Sequence[Choice], num_adapters: int) -> None:
    """Write the LoRA of each choice.

    Args:
        folder: Which the sub-folder for choices is made in.
        choices: What requests choose between.
        num_adapters: How many adapters there are.
    """
    for choice in choices:
        config, tensors = LoraConfig(r=1, lora_alpha=1, target_modules=[SWITCH]), Tensors()
        if choice.lora is not None:
            config, file = open_adapter(choice.lora, LoraConfig, "LoRA")
            config.base_model_name_or_path = config.revision = None
            tensors = dict(file.read())
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        down, up = torch.zeros(config.r, 1), torch.zeros(num_adapters, config.r)
        down[0] = 1
        up[choice.adapters, 0] = 1 / scaling
        tensors |= {
            f"{PEFT_PREFIX}{IN_CHECKPOINT}.lora_{part}.weight": weight for part, weight in (("A", down), ("B", up))
        }
        config.save_pretrained(str(folder / FOLDER / choice.name))
        save_file(tensors, folder / FOLDER / choice.name / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def serve_arguments(folder: str | os.PathLike) -> list[str]:
    """What `vllm serve` wants for a folder of `export_vllm`: for one without choices, the folder alone.

    It makes a place for each choice and an empty one, which vLLM needs on a CPU. Where no choice holds a LoRA of the
    base's layers, only the switch is made ready for one.
    """
    choices = sorted(path for path in Path(folder, FOLDER).glob("*") if path.is_dir())
    arguments = [os.fspath(folder)]
    if not choices:
        return arguments
    configs = [LoraConfig.from_pretrained(str(path)) for path in choices]
    rank = next((rank for rank in RANKS if rank >= max(config.r for config in configs)), RANKS[-1])
    arguments += ["--enable-lora", "--max-loras", str(len(choices) + 1), "--max-lora-rank", str(rank)]
    if all(config.target_modules == {SWITCH} for config in configs):
        arguments += ["--lora-target-modules", SWITCH]
    return [*arguments, "--lora-modules", *(f"{path.name}={path}" for path in choices)]

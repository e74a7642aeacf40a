"""The training scripts as functions, and what they train on: the lab's tiny model and small data sets of chats."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fresh
import pytest
import torch
from safetensors.torch import load_file


for package in ("trl", "datasets", "sklearn"):
    pytest.importorskip(package, reason="training needs the extras `train` and `lab`")

from peft_pvm.demo.for_trainers import (  # noqa: E402
    make_chats,
    save_as_folder,
    write_chats,
)
from peft_pvm.demo.tiny_vlm import load_tiny_vlm  # noqa: E402


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {"sft": "train_sft", "grpo": "train_grpo", "dipe": "adapt_dipe"}
CONFIGS = {"sft": "sft_tiny", "grpo": "grpo_tiny", "dipe": "adapt_dipe_tiny"}
# What differs from the configurations for the tiny model, to be done in seconds.
SHORT = {
    "sft": {
        "r": 32,
        "max_text": 64,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
    },
    "dipe": {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 4,
    },
    "grpo": {"learning_rate": 1e-3, "temperature": 4.0},  # the tiny model is sure of itself, right or wrong
}


def make_material(folder: Path) -> SimpleNamespace:
    """Folders: the model, chats of the two forms, chats of which every other batch of four has no image."""
    save_as_folder(load_tiny_vlm(), folder / "model")
    chats = make_chats("messages", 8, 250)
    write_chats(chats, folder / "messages")
    without = chats.map(lambda row, index: {"images": row["images"] if index // 4 % 2 == 0 else []}, with_indices=True)
    write_chats(without, folder / "mixed")
    write_chats(make_chats("prompts", 16, 200), folder / "prompts")
    return SimpleNamespace(**{path.name: path for path in folder.iterdir()})


def arguments(stage: str, material: SimpleNamespace, **options) -> list[str]:
    """The command line of a training script."""
    data = material.prompts if stage == "grpo" else material.messages
    chosen = {
        "model_name_or_path": material.model,
        "dataset_name": data,
        "save_strategy": "no",
        "logging_steps": 1,
        **SHORT[stage],
        **options,
    }
    line = ["--config", str(EXAMPLES / f"{CONFIGS[stage]}.yaml")]
    for name, value in chosen.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def script(stage: str) -> ModuleType:
    """A training script as a module."""
    name = SCRIPTS[stage]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where its dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def run(stage: str, material: SimpleNamespace, **options):
    """Run a training script here and now; its trainer."""
    return script(stage).main(arguments(stage, material, **options))


KILLED = """
import os, runpy, signal, sys
from transformers import Trainer

save_checkpoint = Trainer._save_checkpoint

def save_and_die(*args, **kwargs):
    save_checkpoint(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

Trainer._save_checkpoint = save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_killed(stage: str, material: SimpleNamespace, **options) -> fresh.Program:
    """Run a training script in a process of its own, which is killed as soon as its first checkpoint is written."""
    killed = fresh.start(KILLED, EXAMPLES / f"{SCRIPTS[stage]}.py", *arguments(stage, material, **options))
    killed.process.join()
    return killed


def by_rank(probabilities: torch.Tensor, num_samples: int, **kwargs) -> torch.Tensor:
    """In place of `torch.multinomial`: of every eight rows the first gets the likeliest token, the next the second.

    One process and two then sample the same.
    """
    ranks = torch.arange(len(probabilities)) % 8
    return probabilities.sort(dim=-1, descending=True, stable=True).indices.gather(1, ranks[:, None])


def adapter_weights(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")

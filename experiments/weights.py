"""What a training made, as a folder: the weights, and how they came about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_pvm.env import environment
from peft_pvm.folders.data_file import holding, read_json, write_json
from peft_pvm.folders.replacing import replacing

from .methods import trained_parameters


RUN = "run.json"
WEIGHTS = "weights.safetensors"


def save_run(folder: str | os.PathLike, model: nn.Module, run: Mapping[str, Any]) -> None:
    """Write what was trained on a model.

    Args:
        folder: The folder.
        model: What requires gradients was trained.
        run: How, with the base's fingerprint as "base". Versions and machine are added.
    """
    weights = {key: parameter.detach().contiguous() for key, parameter in trained_parameters(model).items()}
    with replacing(folder, entry=RUN) as staged:
        save_file(weights, staged / WEIGHTS, metadata={"format": "pt"})
        write_json(staged / RUN, {**run, "environment": environment()})


def put_weights(model: nn.Module, folder: str | os.PathLike, base: str, command: str) -> dict[str, Any]:
    """Put the weights of a training into a model on which the same method is fresh.

    Args:
        model: What requires gradients is overwritten.
        folder: What `save_run` wrote.
        base: The fingerprint of the model's base.
        command: Of `python -m experiments`, that makes the folder.

    Returns:
        How they were trained.

    Raises:
        FileNotFoundError: It was not trained yet.
        ValueError: The weights do not fit, or were trained on another base.
    """
    path, run_file = Path(folder, WEIGHTS), Path(folder, RUN)
    if not run_file.is_file():
        raise FileNotFoundError(f"There is no {run_file}. Train first: python -m experiments {command}")
    run = read_json(run_file)
    written = f"what python -m experiments {command.split()[0]} writes"
    with holding(run_file, written):
        trained_on = run["base"]
    if trained_on != base:
        raise ValueError(f"{path} was trained on base {trained_on}, but this one is {base}. Remove {folder}.")
    with holding(path, written):
        weights = load_file(path)
    parameters = trained_parameters(model)
    shapes = {key: parameter.shape for key, parameter in parameters.items()}
    if {key: weight.shape for key, weight in weights.items()} != shapes:
        raise ValueError(f"{path} does not hold the weights of this method. Remove {folder}.")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    return run

"""Trainings go on to the same weights after an interruption, and are not repeated once they are done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from peft_pvm.folders.data_file import holding, read_json
from peft_pvm.folders.replacing import write_file

from .weights import RUN


class CheckpointFile:
    """A safetensors file with the state of a training: parameters, what AdamW keeps of them, step and time.

    Args:
        path: The file.
        training: What decides the training: recipe, base, configurations. The state of another is refused.
    """

    def __init__(self, path: str | os.PathLike, training: Mapping[str, Any]):
        self.path = path
        # As it comes back from the file: JSON has neither tuples nor sets.
        self.training = json.loads(json.dumps(training, default=sorted))
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the training has taken, with what came before an interruption and was kept."""
        return time.perf_counter() - self._start

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps. The file before it stays whole until then."""
        tensors = {}
        for index, parameter in enumerate(self._parameters(optimizer)):
            tensors[f"{index}.parameter"] = parameter.detach()
            tensors.update({f"{index}.{name}": tensor for name, tensor in optimizer.state[parameter].items()})
        metadata = {"step": str(step), "seconds": str(self.seconds), "training": json.dumps(self.training)}
        write_file(self.path, save(tensors, metadata=metadata))

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Put the state back into parameters and optimizer.

        Returns:
            The steps done; 0 where there is no file.

        Raises:
            ValueError: The file is of another training.
        """
        if not os.path.isfile(self.path):
            return 0
        with holding(self.path, "the checkpoint of a training"):
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(self.path)
            found = json.loads(metadata.get("training", "{}"))
        parameters = self._parameters(optimizer)
        shapes = [
            tuple(tensors[key].shape) for key in map("{}.parameter".format, range(len(tensors))) if key in tensors
        ]
        differing = [key for key, value in self.training.items() if found.get(key) != value]
        if shapes != [tuple(parameter.shape) for parameter in parameters]:
            differing.append("shapes")
        if differing:
            raise ValueError(
                f"{self.path} is the checkpoint of another training: {', '.join(differing)} differ. "
                "Remove it to start anew."
            )
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{index}.parameter"])
                names = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {name: tensors[f"{index}.{name}"] for name in names}
        self._start = time.perf_counter() - float(metadata["seconds"])
        return int(metadata["step"])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if os.path.isfile(self.path):
            os.remove(self.path)

    @staticmethod
    def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_finished(folder: Path, recipe: Any, base: str) -> bool:
    """Whether a folder holds the weights of a training.

    Args:
        folder: What `save_run` writes.
        recipe: How the training is to be, a dataclass. Fields that are newer than the run count as their defaults.
        base: The fingerprint of the base.

    Raises:
        ValueError: The folder holds the weights of another training.
    """
    if not (folder / RUN).is_file():
        return False
    run = read_json(folder / RUN)
    with holding(folder / RUN, "how a method was trained"):
        trained_by, trained_on = type(recipe)(**run["recipe"]), run["base"]
    if (trained_by, trained_on) != (recipe, base):
        raise ValueError(
            f"{folder} holds a training by {trained_by!r} on base {trained_on}, but it is to be by {recipe!r} on base "
            f"{base}. Remove {folder} to train anew."
        )
    return True

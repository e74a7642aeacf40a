"""The state of an interrupted training as a file, from which it goes on to the same weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from peft_pvm.folders.data_file import holding
from peft_pvm.folders.replacing import write_file


class CheckpointFile:
    """A safetensors file with the state of a training: parameters, what AdamW keeps of them, and the step.

    Args:
        path: The file.
        recipe: Of the training, a dataclass. The state of a training by another recipe is refused.
    """

    def __init__(self, path: str | os.PathLike, recipe: Any):
        self.path = path
        self.recipe = json.dumps(asdict(recipe))

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps. The file before it stays whole until then."""
        tensors = {}
        for index, parameter in enumerate(self._parameters(optimizer)):
            tensors[f"{index}.parameter"] = parameter.detach()
            tensors.update({f"{index}.{name}": tensor for name, tensor in optimizer.state[parameter].items()})
        write_file(self.path, save(tensors, metadata={"step": str(step), "recipe": self.recipe}))

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
        parameters = self._parameters(optimizer)
        shapes = [
            tuple(tensors[key].shape) for key in map("{}.parameter".format, range(len(tensors))) if key in tensors
        ]
        recipe = metadata.get("recipe")
        if recipe != self.recipe or shapes != [tuple(parameter.shape) for parameter in parameters]:
            raise ValueError(f"{self.path} is the checkpoint of another training: {recipe}. Remove it to start anew.")
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{index}.parameter"])
                names = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {name: tensors[f"{index}.{name}"] for name in names}
        return int(metadata["step"])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if os.path.isfile(self.path):
            os.remove(self.path)

    @staticmethod
    def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

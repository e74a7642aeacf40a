"""A learning rate of their own for PVM's gates.

A fresh gate is 0, and Adam moves a number by at most the learning rate a step, whatever its gradient. A matrix is soon
as far from where it began as it needs to be, while a gate has to grow to the size of the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..methods.pvm.branch import Gate


FASTER = 10.0  # the gates' learning rate over that of the rest


def gates_of(model: nn.Module) -> list[nn.Parameter]:
    """The gates of PVM's branches that are trained."""
    gates = (module.weight for module in model.modules() if isinstance(module, Gate))
    return [gate for gate in gates if gate.requires_grad]


def parameter_groups(model: nn.Module, learning_rate: float, faster: float = FASTER) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer, without weight decay, in which gates learn faster than the rest.

    Args:
        model: The model. Only parameters that require gradients are in the groups.
        learning_rate: The learning rate of everything but the gates.
        faster: The learning rate of the gates, as a multiple of `learning_rate`.

    Returns:
        The groups that have a parameter: the rest, then the gates.

    Example:
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    """
    gates = gates_of(model)
    others = _without(gates, [parameter for parameter in model.parameters() if parameter.requires_grad])
    groups = [
        {"params": others, "lr": learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": faster * learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def speed_up_gates(trainer: Trainer, faster: float = FASTER) -> None:
    """Make a trainer use parameter groups in which gates learn faster. Call it before training.

    Weight decay, schedule and everything else stay the trainer's. A trainer that was given an optimizer keeps its
    groups.

    Args:
        trainer: The trainer.
        faster: The gates' learning rate over that of the rest. 1: nothing changes.

    Raises:
        ValueError: `faster` is not positive.
    """
    if faster <= 0:
        raise ValueError(f"faster is {faster!r}, but must be positive.")
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_given = trainer.optimizer is not None
        optimizer = create(*args, **kwargs)
        if faster != 1 and not is_given:
            _split(optimizer, gates_of(trainer.model), faster)
        return optimizer

    trainer.create_optimizer = create_optimizer


def _split(optimizer: torch.optim.Optimizer, gates: list[nn.Parameter], faster: float) -> None:
    """Move the gates of each of an optimizer's groups into a group of their own."""
    for group in list(optimizer.param_groups):
        others = _without(gates, group["params"])
        own = _without(others, group["params"])
        if own:
            group["params"] = others
            optimizer.add_param_group({**group, "params": own, "lr": faster * group["lr"]})


def _without(these: list[nn.Parameter], parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    known = set(map(id, these))
    return [parameter for parameter in parameters if id(parameter) not in known]

"""What is measured: the base, each remedy, some together, and each as one would write it at first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..families import find_vlm
from ..loading import add_adapters
from ..methods.dipe import DIPEConfig
from ..methods.tdrs import TDRSConfig
from ..pvm import PVMConfig
from .naive import make_naive


PAPER_SHARE = 3 / 36  # of the decoder layers have a branch
PAPER_WIDTH = 512 / 4096  # of a branch, in hidden sizes


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: What the table says.
        adapters: Each makes a configuration, given the model.
        is_naive: Whether the adapters work as one would write them at first.
        whole_matrices: How many matrices of scores of all heads, in fp32, it holds at once.
    """

    title: str
    adapters: tuple[Callable[[nn.Module], Any], ...] = ()
    is_naive: bool = False
    whole_matrices: int = 0

    def attach(self, model: nn.Module) -> None:
        """Put it on a model from transformers, active."""
        add_adapters(model, {f"adapter_{number}": make(model) for number, make in enumerate(self.adapters)})
        if self.is_naive:
            make_naive(model)


def pvm_config(model: nn.Module) -> PVMConfig:
    """PVM of the paper's proportions: one branch for twelve layers, an eighth as wide as the model."""
    vlm = find_vlm(model)
    depth, hidden_size = len(vlm.layers), vlm.text_config.hidden_size
    head_dim = getattr(vlm.text_config, "head_dim", None) or hidden_size // vlm.text_config.num_attention_heads
    branches = max(1, round(PAPER_SHARE * depth))
    layers = [round((number + 0.5) * depth / branches - 0.5) for number in range(branches)]
    return PVMConfig(r=max(1, round(PAPER_WIDTH * hidden_size / head_dim)) * head_dim, layers_to_transform=layers)


def _dipe(model: nn.Module) -> DIPEConfig:
    return DIPEConfig()


def _tdrs(model: nn.Module) -> TDRSConfig:
    return TDRSConfig()


METHODS = {
    "base": Method("base"),
    "pvm": Method("PVM", (pvm_config,)),
    "pvm-naive": Method("PVM, naive", (pvm_config,), is_naive=True),
    "dipe": Method("DIPE", (_dipe,)),
    "dipe-naive": Method("DIPE, naive", (_dipe,), is_naive=True, whole_matrices=4),
    "t-drs": Method("T-DRS", (_tdrs,)),
    "t-drs-naive": Method("T-DRS, naive", (_tdrs,), is_naive=True, whole_matrices=9),
    "pvm+dipe": Method("PVM + DIPE", (pvm_config, _dipe)),
    "pvm+dipe+t-drs": Method("PVM + DIPE + T-DRS", (pvm_config, _dipe, _tdrs)),
}

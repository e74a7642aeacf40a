"""What the experiment compares: the tiny model with each remedy, its controls and their combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.methods.pvm import PVMConfig
from peft_pvm.methods.tdrs import TDRSConfig
from peft_pvm.tuners.loading import add_adapters

from .controls import add_mlp_branches


PVM_PARAMETERS = 221_763  # of PVMConfig(r=64) on the tiny model; the controls come as near as they can
STRIDED = [1, 3, 4]  # what "strided" means for six layers
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"

Configs = dict[str, Any]  # by adapter name


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Attributes:
        title: What the tables say.
        adapters: Makes the configurations of its adapters, by adapter name.
        weights_of: The method whose training it uses; `None`: its own.
        add_branches: Puts the MLP control beside the FFNs of a model.
    """

    title: str
    adapters: Callable[[], Configs] = dict
    weights_of: str | None = None
    add_branches: Callable[[nn.Module], None] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it has a training of its own."""
        has_weights = any(getattr(config, "has_parameters", True) for config in self.adapters().values())
        return self.weights_of is None and (has_weights or self.add_branches is not None)


def _pvm(**fields: Any) -> Callable[[], Configs]:
    return lambda: {"pvm": PVMConfig(**{"r": 64, **fields})}


def _tdrs(**fields: Any) -> Callable[[], Configs]:
    return lambda: {"tdrs": TDRSConfig(**fields)}


def _add_mlp_branches(model: nn.Module) -> None:
    add_mlp_branches(model, STRIDED, r=64, num_parameters=PVM_PARAMETERS)


def _lora() -> LoraConfig:
    return LoraConfig(r=15, lora_alpha=30, target_modules=rf".*language_model.*\.({LINEARS})")


METHODS: dict[str, Method] = {
    "base": Method("base"),
    "lora": Method("LoRA", lambda: {"lora": _lora()}),
    "mlp": Method("MLP branch", add_branches=_add_mlp_branches),
    "pvm": Method("PVM", _pvm()),
    "pvm-hidden-states": Method("PVM, memory of hidden states", _pvm(memory_source="hidden_states")),
    "pvm-r32": Method("PVM, r = 32", _pvm(r=32)),
    "pvm-r128": Method("PVM, r = 128", _pvm(r=128)),
    "pvm-adjacent": Method("PVM, adjacent layers 2, 3, 4", _pvm(layers_to_transform=[2, 3, 4])),
    "pvm-late": Method("PVM, late layers 3, 4, 5", _pvm(layers_to_transform=[3, 4, 5])),
    "dipe": Method("DIPE", lambda: {"dipe": DIPEConfig(max_distance=0)}),
    "t-drs": Method("T-DRS", _tdrs()),
    "t-drs-sd": Method("T-DRS, SD alone", _tdrs(dc_strength=0.0, re_strength=0.0)),
    "t-drs-dc": Method("T-DRS, DC alone", _tdrs(sd_strength=0.0, re_strength=0.0)),
    "t-drs-re": Method("T-DRS, re alone", _tdrs(sd_strength=0.0, dc_strength=0.0)),
    "pvm+dipe": Method("PVM + DIPE", lambda: {**_pvm()(), "dipe": DIPEConfig(max_distance=0)}, weights_of="pvm"),
    "pvm+dipe+t-drs": Method(
        "PVM + DIPE + T-DRS", lambda: {**_pvm()(), "dipe": DIPEConfig(max_distance=0), **_tdrs()()}, weights_of="pvm"
    ),
    "lora+pvm": Method("LoRA + PVM", lambda: {"lora": _lora(), **_pvm()()}),
}


def attach(model: nn.Module, method: Method, seed: int = 0) -> None:
    """Put a method on a base, which is frozen: what the method trains is fresh and requires gradients.

    Args:
        model: The base, without adapters.
        method: The method.
        seed: Decides the initial weights; torch's own generator is left as it was.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method.add_branches is not None:
            method.add_branches(model)
        add_adapters(model, method.adapters())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

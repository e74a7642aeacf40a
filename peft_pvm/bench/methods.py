"""What is measured: the base, each remedy, some together, and each as one would write it at first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from .. import methods
from ..attention.reference import ReferenceStages
from ..methods.pvm import PVMConfig
from ..methods.pvm.layer import PVMLayer
from ..methods.pvm.reference import PlainBranch
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import find_vlm
from ..tuners.loading import add_adapters


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


def _config(method: methods.Method) -> Callable[[nn.Module], Any]:
    """Makes a method's configuration, given the model: the default one, and of PVM that of the paper's proportions."""
    return pvm_config if method.config is PVMConfig else lambda model: method.config()


def _rows() -> Iterator[tuple[str, Method]]:
    yield "base", Method("base")
    for method in methods.METHODS:
        name, adapters = method.name, (_config(method),)
        yield name.lower(), Method(name, adapters)
        plain = Method(f"{name}, naive", adapters, is_naive=True, whole_matrices=method.plain_matrices)
        yield f"{name.lower()}-naive", plain
    configs = {method.name: _config(method) for method in methods.METHODS}
    for names in (("PVM", "DIPE"), ("PVM", "DIPE", "T-DRS")):
        yield "+".join(names).lower(), Method(" + ".join(names), tuple(configs[name] for name in names))


METHODS = dict(_rows())


def make_naive(model: nn.Module) -> None:
    """Have the adapters on a model work naively, for good."""
    for layer in model.modules():
        if isinstance(layer, PVMLayer):
            for name, branches in layer.pvm_branches.items():
                layer.pvm_branches[name] = [PlainBranch(**vars(branch)) for branch in branches]

    def replace_stages(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        for layer_idx, stages in context.stages.items():
            context.stages[layer_idx] = ReferenceStages(stages.stages, stages.adapters)

    find_vlm(model).text_model.register_forward_pre_hook(replace_stages, with_kwargs=True)

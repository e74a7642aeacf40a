"""The remedies as one would write them at first, straight from the maths: what ours is compared with.

They compute the same numbers. PVM projects its memory at every step, for visual tokens as well, in eager attention;
methods that change attention hold whole matrices of scores.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..attention.reference import ReferenceStages
from ..context import CONTEXT, VisualContext
from ..families import find_vlm
from ..pvm.layer import PVMLayer
from ..pvm.reference import PlainBranch


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

"""DIPE as published in some heads of the real base and not in others: which of them does it hurt?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch

from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.stages import Stage
from peft_pvm.demo.mosaic import Split
from peft_pvm.demo.train import target_logits
from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.methods.dipe.method import AnchoredPositions
from peft_pvm.tuners.active import attached
from peft_pvm.tuners.attention_method import SteeredLayer

from .looking import BASE, graded
from .study import Cell, Study


ALL, ONE, WORST, ALL_BUT, RANDOM = (
    "all heads",
    "one head alone",
    "only the worst",
    "all but the worst",
    "only random ones",
)
SHARES = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65)  # of all heads
LENGTHS = (0, 1024)  # tokens of text between image and question
Head = tuple[int, int]  # decoder layer, and number in it


@dataclass(frozen=True)
class AnchoredHeads(AnchoredPositions):
    """Anchored positions in some heads of a layer; the others keep their own.

    Args:
        heads: Their numbers.
    """

    heads: tuple[int, ...] = ()

    def anchored_queries(self, call: AttentionCall) -> list[torch.Tensor]:
        acting = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        acting[list(self.heads)] = True
        return [torch.where(acting[:, None, None], query, call.query) for query in super().anchored_queries(call)]


@dataclass
class DIPEInHeads(DIPEConfig):
    """DIPE as published, in some heads only, in forwards of more than one token.

    Args:
        heads: Their numbers, by decoder layer.
    """

    heads: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.max_distance, self.layers_to_transform = 0, sorted(self.heads)
        super().__post_init__()

    def stages(self, layer: SteeredLayer) -> Stage:
        return AnchoredHeads(**vars(super().stages(layer)), heads=tuple(self.heads[layer.layer_idx]))


def dipe_heads(study: Study) -> None:
    """DIPE in each head alone, on the validation split; then in those that it hurt most there, and in all others.

    Raises:
        ValueError: The study is about the validation split.
    """
    if study.split == "validation":
        raise ValueError("dipe-heads ranks heads by the validation split, so it needs --split test.")
    text = study.model.config.get_text_config()
    heads = [(layer, head) for layer in range(text.num_hidden_layers) for head in range(text.num_attention_heads)]
    _measure(study, BASE, "validation", [], 0, "validation")
    for layer, head in heads:
        _measure(study, ONE, f"{layer}.{head}", [(layer, head)], 0, "validation")
    worst = worst_first(study.cells[ONE])
    chance = torch.randperm(len(heads), generator=torch.Generator().manual_seed(study.seed)).tolist()
    for length in LENGTHS:
        _measure(study, BASE, length, [], length)
        _measure(study, ALL, length, heads, length)
        for share in SHARES:
            count = round(share * len(heads))
            for case, acting in {
                WORST: worst[:count],
                RANDOM: [heads[number] for number in chance[:count]],
                ALL_BUT: worst[count:],
            }.items():
                _measure(study, f"{case}, {length}", count, acting, length)


def worst_first(alone: Mapping[str, Cell]) -> list[Head]:
    """Heads, those first in which DIPE alone raises the loss most.

    Args:
        alone: What was measured of each, by `layer.head`.
    """
    named = sorted(alone, key=lambda name: -fmean(alone[name]["loss by row"]))
    return [(int(layer), int(head)) for layer, head in (name.split(".") for name in named)]


def _measure(
    study: Study, case: str, condition: object, heads: Sequence[Head], length: int, split: Split | None = None
) -> None:
    by_layer = {layer: [head for other, head in heads if other == layer] for layer, _ in heads}
    with attached(study.model, *([DIPEInHeads(heads=by_layer)] if heads else [])):
        study.measured(case, condition, partial(_answers, study, length, split))


@torch.no_grad()
def _answers(study: Study, length: int, split: Split | None) -> Cell:
    batches = [study.draw(row, length, split) for row in range(study.rows)]
    return graded([(target_logits(study.model, batch)[0], batch.targets[0]) for batch in batches])

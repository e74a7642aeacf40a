"""Where the real base looks when it is about to write a digit, what DIPE changes about it, and what comes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from peft_pvm.demo.train import target_logits
from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.probe.calibrate import calibrate
from peft_pvm.probe.measures import rounded
from peft_pvm.probe.observers import AttentionObserver, observed
from peft_pvm.probe.rows import read_chats
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.active import attached
from peft_pvm.tuners.base import VisualConfig

from ..chats import make_real_chats
from ..methods import METHODS
from .study import Cell, Study


LENGTHS = (0, 64, 256, 1024, 2048, 4096, 7500)  # tokens of text between image and question
GROUP = 5  # decoder layers that have DIPE together
GROUP_LENGTHS = (0, 1024)
LIMITS = (0, 16, 32, 64, 128, 256, 512)
LIMIT_LENGTHS = (1024, 4096)
CALIBRATED = None  # tokens of text: as the command has them by default
BASE = "base"  # the case without DIPE
LOOKERS = (BASE, "dipe", "dipe-128")  # of the real base's methods
ALL_LAYERS, LIMITED = "all layers", "all layers, limit 128"  # cases of DIPE, and the beginnings of others
LAYERS, ALONE, OTHERS = "layers ", " alone", "all but layers "


def attention(study: Study) -> None:
    """Attention on the image after ever more text, and the answers that come of it: base, DIPE, DIPE with a limit."""
    for name in LOOKERS:
        _look_at(study, name, METHODS[name].adapters().values(), LENGTHS)


def dipe_layers(study: Study) -> None:
    """DIPE as published, only in one group of decoder layers, and in all others."""
    depth = len(find_vlm(study.model).layers)
    _look_at(study, BASE, [], GROUP_LENGTHS)
    _look_at(study, ALL_LAYERS, [DIPEConfig(max_distance=0)], GROUP_LENGTHS)
    _look_at(study, LIMITED, [DIPEConfig(max_distance=128)], GROUP_LENGTHS)
    for first in range(0, depth, GROUP):
        group = range(first, min(first + GROUP, depth))
        named = f"{group[0]} to {group[-1]}"
        others = [layer_idx for layer_idx in range(depth) if layer_idx not in group]
        for case, layers in {LAYERS + named + ALONE: list(group), OTHERS + named: others}.items():
            if layers:
                _look_at(study, case, [DIPEConfig(max_distance=0, layers_to_transform=layers)], GROUP_LENGTHS)


def limit(study: Study) -> None:
    """Each limit of DIPE: where the model looks under it, as far from the image, and what comes of it."""
    _look_at(study, BASE, [], (0, *LIMIT_LENGTHS))
    for distance in LIMITS:
        _look_at(study, str(distance), [DIPEConfig(max_distance=distance)], LIMIT_LENGTHS)


def calibration(study: Study) -> None:
    """What `peft-pvm calibrate` proposes on chats of the validation split, with texts of its own lengths."""
    from transformers import AutoProcessor

    def propose() -> Cell:
        chats = read_chats(make_real_chats(study.questions, study.rows, 64, "validation", study.seed), study.rows)
        found = calibrate(study.model, AutoProcessor.from_pretrained(study.base), chats, CALIBRATED, seed=study.seed)
        losses = {
            BASE if distance is None else str(distance): {str(n): rounded(seen.loss) for n, seen in by_length.items()}
            for distance, by_length in found.answers.items()
        }
        return {"max_distance": found.max_distance, "reason": found.reason, "loss": losses}

    study.measured("calibrate", "chats of the validation split", propose)


def _look_at(study: Study, case: str, configs: Collection[VisualConfig], lengths: Sequence[int]) -> None:
    with attached(study.model, *configs):
        for length in lengths:
            study.measured(case, length, partial(look, study, length))


@torch.no_grad()
def look(study: Study, text_tokens: int) -> Cell:
    """Where the model looks from the tokens that predict the nine digits, and whether these are right.

    Args:
        study: Its model has whatever adapters are attached.
        text_tokens: Tokens of text between image and question.

    Returns:
        By layer: the attention on the image, of each head, and on the asked cell, mean over heads. Tokens in sight
        that are not visual, mean over digits. By row: how many of nine digits are right, and their mean -log p.
    """
    vlm = find_vlm(study.model)
    on_image, on_cell, in_sight = [], [], []
    answers = []
    for row in range(study.rows):
        batch = study.draw(row, text_tokens)
        asked, cells = batch.inputs["logits_to_keep"], study.cells_of(batch)
        observer = AttentionObserver(batch.inputs["input_ids"].shape[1] - int(asked[0]))
        with observed(vlm, observer):
            logits = target_logits(study.model, batch)[0]
        masses = [seen for _, seen in sorted(observer.masses.items())]
        queries = asked - asked[0]
        on_image.append(torch.stack([seen.visual[queries].double().mean(0) for seen in masses]))
        on_cell.append(torch.stack([seen.per_token[queries, cells].double().mean() for seen in masses]))
        in_sight.append(masses[0].text_tokens[queries].double().mean())
        answers.append((logits, batch.targets[0]))
    return {
        "visual mass by layer": [_spaced(layer) for layer in torch.stack(on_image).mean(0).tolist()],  # head by head
        "mass on the asked cell by layer": _spaced(torch.stack(on_cell).mean(0).tolist()),
        "text tokens in sight": rounded(torch.stack(in_sight).mean().item()),
        **graded(answers),
    }


def graded(answers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Cell:
    """By row: how many of nine digits are right, and their mean -log p in nats.

    Args:
        answers: Of each row, the logits of its digits, `(9, vocab_size)`, and the digits, `(9,)`.
    """
    right = [int((logits.argmax(-1) == digits).sum()) for logits, digits in answers]
    losses = [rounded(F.cross_entropy(logits, digits).item()) for logits, digits in answers]
    return {"right of nine": "".join(map(str, right)), "loss by row": losses}


def _spaced(values: Sequence[float]) -> str:
    """Numbers on one line of the file."""
    return " ".join(f"{value:.4g}" for value in values)

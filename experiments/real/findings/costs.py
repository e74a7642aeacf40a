"""What each method costs on the real base: the time of the same rows of questions, one after the other."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn

from peft_pvm.demo.train import target_logits

from ..methods import UNTRAINED
from ..runs import with_method
from .study import Cell, Study


LENGTHS = (0, 1024, 4096)  # tokens of text between image and question
TIMED = (  # with fresh weights, on which the time does not depend
    "base",
    "dipe-128",
    "dipe-128-image",
    *UNTRAINED,
    "log-bias",
    "lora",
    "mlp",
    "pvm",
    "pvm-hidden-states",
    "pvm+dipe-128",
    "dipe+lora",
)


def costs(study: Study) -> None:
    """The CPU seconds of rows, read at once and without a cache. All anew if any is missing: machines differ."""
    if all(str(length) in study.cells.get(name, {}) for name in TIMED for length in LENGTHS):
        return
    study.clear()
    for name in TIMED:
        model = with_method(name, 0, study.base).requires_grad_(False).eval()
        for length in LENGTHS:
            study.measured(name, length, partial(_seconds, model, study, length))


@torch.no_grad()
def _seconds(model: nn.Module, study: Study, length: int) -> Cell:
    seconds = []
    for row in (0, *range(study.rows)):  # the first warms up
        batch = study.draw(row, length)
        start = time.process_time()
        target_logits(model, batch)
        seconds.append(round(time.process_time() - start, 3))
    return {"seconds by row": seconds[1:]}

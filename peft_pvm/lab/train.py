"""Training and testing on the mosaic task. Everything is decided by the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from .mosaic import Batch, make_batch


@dataclass(frozen=True)
class Accuracy:
    """Share of questions that were answered right.

    Attributes:
        value: From 0 to 1.
        questions: Number of questions asked.
    """

    value: float
    questions: int

    @property
    def standard_error(self) -> float:
        """Of `value`, for independent questions."""
        return math.sqrt(self.value * (1 - self.value) / self.questions)


def progress_bar() -> Progress:
    """A bar with count, time spent and time left; it leaves the screen when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
    )


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a model says at the query tokens, `(rows, questions, vocab_size)`."""
    return model(**batch.inputs, use_cache=False).logits


def train_base(model: nn.Module, steps: int = 1500, learning_rate: float = 2e-3, seed: int = 0) -> None:
    """Teach all of a fresh tiny model the task, with questions soon after the mosaic.

    Args:
        model: The model; it is trained in place and left in eval mode.
        steps: Optimizer steps.
        learning_rate: Its peak.
        seed: Decides the questions.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        length = int(torch.randint(25, (), generator=generator))
        return make_batch("train", rows=32, distractor_length=length, questions=6, generator=generator)

    _fit(model, list(model.parameters()), draw, steps, learning_rate, 0.05, "Training the base")


def _fit(
    model: nn.Module,
    parameters: list[nn.Parameter],
    draw: Callable[[], Batch],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    title: str,
) -> None:
    """AdamW with a linear warm-up over a tenth of the steps, then half a cosine down to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    with progress_bar() as bar:
        for _ in bar.track(range(steps), description=title):
            batch = draw()
            loss = F.cross_entropy(answer_logits(model, batch).flatten(0, 1), batch.answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, distractor_length: int, questions: int = 200, seed: int = 0) -> Accuracy:
    """Test a model on digits and text that no training saw. One question a mosaic.

    Args:
        model: The tiny model, with or without an adapter.
        distractor_length: Bytes of text between the mosaic and the question.
        questions: How many.
        seed: Decides the questions: two models tested with the same one are asked the same.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, min(64, 16384 // (distractor_length + 1)))
    right = 0
    for start in range(0, questions, rows):
        batch = make_batch("test", min(rows, questions - start), distractor_length, 1, generator)
        right += int((answer_logits(model, batch).argmax(-1) == batch.answers).sum())
    return Accuracy(right / questions, questions)

"""Training and testing on the mosaic task. Everything is decided by the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from .mosaic import IMAGE, NUM_CELLS, PREFIX_LENGTH, Batch, make_batch


TOKENS_PER_STEP = 2048  # larger steps are no faster per token on a CPU, whose cache they leave


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
        console=Console(stderr=True),
        transient=True,
    )


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a model says at the query tokens, `(rows, questions, vocab_size)`."""
    return model(**batch.inputs, use_cache=False).logits


def train_base(model: nn.Module, steps: int = 1000, learning_rate: float = 2e-3, seed: int = 0) -> None:
    """Teach all of a fresh tiny model the task, with at most 24 bytes of text between mosaic and questions.

    Args:
        model: The model; it is trained in place and left in eval mode.
        steps: Optimizer steps.
        learning_rate: Its peak.
        seed: Decides the questions.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Batch:
        length = int(torch.randint(25, (), generator=generator))
        return make_batch("train", rows=32, distractor_length=length, questions=6, generator=generator)

    groups = [{"params": list(model.parameters()), "lr": learning_rate, "weight_decay": 0.05}]
    _fit(model, groups, draw, steps, "Training the base")


def train_adapter(
    model: PeftModel,
    steps: int = 800,
    max_distractor_length: int = 2048,
    hidden_share: float = 0.5,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Train the adapter of a model whose base is frozen, first with the image hidden, then with long distractors.

    Where the base still answers right, an adapter has nothing to learn, and where it does not, rows are long and give
    few answers for their cost. So the first steps go to the limit of fading itself: no token can attend to the image,
    and a few bytes of distractor are enough to leave everything to the adapter. The other steps are as in testing, on
    distractors of all lengths. This is a recipe of this lab, not of a paper.

    Args:
        model: The model; it is trained in place and left in eval mode. Only parameters that require gradients change.
        steps: Optimizer steps.
        max_distractor_length: The longest distractor. Lengths are drawn log-uniformly, from 64 on.
        hidden_share: Share of the steps with the image hidden, from 0 to 1.
        learning_rate: Its peak; scalars, such as the gate of PVM, learn ten times as fast.
        seed: Decides the questions.

    Raises:
        ValueError: A number out of its range, or nothing to train.
    """
    if max_distractor_length < 64:
        raise ValueError(f"max_distractor_length is {max_distractor_length}, but must be at least 64.")
    if not 0 <= hidden_share <= 1:
        raise ValueError(f"hidden_share is {hidden_share}, but must be from 0 to 1.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "No parameter of the model requires gradients. Was the adapter loaded with is_trainable=True?"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Batch:
        hidden = step < hidden_share * steps
        low, high = (4, 64) if hidden else (64, max_distractor_length)
        exponent = torch.empty(()).uniform_(math.log(low), math.log(high), generator=generator)
        length = round(math.exp(float(exponent)))
        rows = max(1, min(64, TOKENS_PER_STEP // (length + PREFIX_LENGTH + 2 * NUM_CELLS)))
        batch = make_batch("train", rows, length, NUM_CELLS, generator)
        return hide_image(model, batch) if hidden else batch

    # A fresh gate is 0, while the residual stream of the tiny model has a root mean square of 5 to 8.
    gates = [parameter for parameter in trained if parameter.numel() == 1]
    others = [parameter for parameter in trained if parameter.numel() > 1]
    groups = [
        {"params": others, "lr": learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": 10 * learning_rate, "weight_decay": 0.0},
    ]
    _fit(model, groups, draw, steps, "Training the adapter")


def hide_image(model: PeftModel, batch: Batch) -> Batch:
    """The batch with the image masked out of self-attention; every token keeps its position."""
    inputs = dict(batch.inputs)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    # Made beforehand, since the model would take masked tokens for padding and give them no position.
    base: Qwen3VLForConditionalGeneration = model.get_base_model()
    inputs["position_ids"], _ = base.model.get_rope_index(**{name: inputs[name] for name in names})
    inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
    return Batch(inputs, batch.answers, batch.cells)


def _fit(
    model: nn.Module, groups: list[dict[str, Any]], draw: Callable[[int], Batch], steps: int, description: str
) -> None:
    """AdamW on parameter groups: a linear warm-up over a tenth of the steps, then half a cosine down to zero."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1.")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    with progress_bar() as bar:
        for step in bar.track(range(steps), description=description):
            batch = draw(step)
            loss = F.cross_entropy(answer_logits(model, batch).flatten(0, 1), batch.answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(
    model: nn.Module, distractor_length: int, questions: int = 200, seed: int = 0, description: str = "Testing"
) -> Accuracy:
    """Test a model on digits and text that no training saw, one question a mosaic.

    An answer counts if it has the highest logit of the whole vocabulary.

    Args:
        model: The tiny model, with or without an adapter, in eval mode.
        distractor_length: Bytes of text between the mosaic and the question.
        questions: How many.
        seed: Decides the questions: two models tested with the same one are asked the same.
        description: What the progress bar says.

    Raises:
        ValueError: A number out of its range.
    """
    if questions < 1:
        raise ValueError(f"questions is {questions}, but must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, min(64, TOKENS_PER_STEP // (distractor_length + PREFIX_LENGTH + 1)))
    right = 0
    with progress_bar() as bar:
        for start in bar.track(range(0, questions, rows), description=f"{description}, {distractor_length} bytes"):
            batch = make_batch("test", min(rows, questions - start), distractor_length, 1, generator)
            right += int((answer_logits(model, batch).argmax(-1) == batch.answers).sum())
    return Accuracy(right / questions, questions)

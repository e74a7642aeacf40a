"""Training an adapter of the tiny model on the mosaic task. Everything is decided by the seed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from ..tokens.families import find_vlm
from ..training.gates import parameter_groups
from ..training.hidden import images_hidden
from ..tuners.active import base_of
from ..utils.terminal import Bars
from .mosaic import IMAGE_LENGTH, NUM_CELLS, Batch, make_questions, make_transcriptions


TOKENS_PER_STEP = 2048  # larger steps are no faster per token on a CPU, whose cache they leave
TOKENS_PER_BACKWARD = 2560  # what is kept for the gradients of more may not fit into memory
TOKENS_PER_HIDDEN_STEP = 640  # short rows give as many answers
LONGEST_WHEN_HIDDEN = 64  # bytes of distractor
SHORTEST = 4  # bytes of distractor
CHECKPOINT_EVERY = 20  # steps

Lengths = Literal["log-uniform", "uniform"]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Where the base still answers right, an adapter has nothing to learn. Where it does not, rows are long and give few
    answers for their cost. So a recipe may begin with steps that go to the limit of fading itself: no token can
    attend to the image, and a few bytes of distractor are enough to leave everything to the adapter. The other steps
    are as in testing, on distractors of all lengths. Hiding the image is a recipe of this lab, not of a paper.

    Attributes:
        steps: Optimizer steps with the image in sight, of some 2,048 tokens.
        hidden_steps: Steps before these with the image hidden from self-attention, of some 640 tokens and with
            distractors of at most 64 bytes.
        max_distractor_length: The longest distractor in bytes, and the longest transcription in tokens (of at least
            nine cells). The shortest is 4.
        lengths: How lengths are drawn. "log-uniform": as many from 4 to 64 as from 64 to 1,024. "uniform": mostly
            long ones, where the base is lost. With the image hidden they are always drawn log-uniformly.
        learning_rate: Its peak; gates learn ten times as fast.
        seed: Decides the questions.

    Raises:
        ValueError: A number out of its range.
    """

    steps: int = 400
    hidden_steps: int = 2000
    max_distractor_length: int = 1024
    lengths: Lengths = "log-uniform"
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, accepted in (
            ("steps", self.steps >= 0, "at least 0"),
            ("hidden_steps", self.hidden_steps >= 0, "at least 0"),
            ("max_distractor_length", self.max_distractor_length >= SHORTEST, f"at least {SHORTEST}"),
            ("lengths", self.lengths in get_args(Lengths), f"one of {get_args(Lengths)}"),
            ("learning_rate", self.learning_rate > 0, "positive"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be {accepted}.")

    def __str__(self) -> str:
        said = f"{self.steps:,} steps with up to {self.max_distractor_length:,} bytes of text in between"
        if self.hidden_steps:
            said = f"{self.hidden_steps:,} steps with the image hidden from self-attention, then {said}"
        return f"{said}, mostly long" if self.lengths == "uniform" else said


class Checkpoint(Protocol):
    """Keeps the state of a training, so that it resumes after an interruption: see `experiments/checkpoint.py`."""

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Restore parameters and optimizer, and return the number of steps done."""

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after `step` steps."""


def target_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits that a model computes for the targets, `(rows, targets, vocab_size)`, in fp32."""
    return model(**batch.inputs, use_cache=False).logits.float()


def train_adapter(model: PeftModel, recipe: Recipe, checkpoint: Checkpoint | None = None) -> None:
    """Train the adapter of a model whose base is frozen.

    Args:
        model: The model; it is trained in place and left in eval mode. Only parameters that require gradients change.
        recipe: How to train.
        checkpoint: Keeps the state every 20 steps, so that an interrupted training goes on to the same weights. It is
            left for the caller to remove once these are saved.

    Raises:
        ValueError: No parameter requires gradients, or the checkpoint is of another model or recipe.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model requires gradients. Was the adapter loaded with is_trainable=True?"
        )

    def draw(step: int) -> Batch:
        generator = step_generator(recipe.seed, step)
        hidden = step < recipe.hidden_steps
        longest = LONGEST_WHEN_HIDDEN if hidden else recipe.max_distractor_length
        if hidden or recipe.lengths == "log-uniform":
            exponent = torch.empty(()).uniform_(math.log(SHORTEST), math.log(longest), generator=generator)
            length = round(math.exp(float(exponent)))
        else:
            length = int(torch.randint(SHORTEST, longest + 1, (), generator=generator))
        if hidden:
            return draw_step(step, length, generator, TOKENS_PER_HIDDEN_STEP)
        return draw_step(step, length, generator, long_transcriptions=True)

    groups = parameter_groups(model, recipe.learning_rate)
    steps = recipe.hidden_steps + recipe.steps
    fit(model, groups, draw, steps, "Training", checkpoint, lambda step: step < recipe.hidden_steps)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator that a step draws from. Each step has its own, so that a training can go on from any of them."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def draw_step(
    step: int,
    length: int,
    generator: torch.Generator,
    tokens: int = TOKENS_PER_STEP,
    long_transcriptions: bool = False,
) -> Batch:
    """Draw the batch of a step. Of four, two ask about one mosaic, one about two or three, one has one transcribed.

    Args:
        step: Its number.
        length: Bytes of the distractor.
        generator: What is drawn from.
        tokens: The size of the batch, at most.
        long_transcriptions: Transcriptions have no distractor and are themselves of this length in tokens.
    """
    images = int(torch.randint(2, 4, (), generator=generator)) if step % 4 == 1 else 1
    rows = max(1, min(64, tokens // (images * IMAGE_LENGTH + length + 2 * NUM_CELLS)))
    if step % 4 != 3:
        return make_questions("train", rows, length, NUM_CELLS, generator, images)
    if long_transcriptions:
        return make_transcriptions("train", rows, 0, max(NUM_CELLS, length // 2), generator)
    return make_transcriptions("train", rows, length, NUM_CELLS, generator)


def learning_rate_factor(step: int, steps: int) -> float:
    """The learning rate of a step over its peak: a linear warm-up over a tenth of the steps, then half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    draw: Callable[[int], Batch],
    steps: int,
    description: str,
    checkpoint: Checkpoint | None = None,
    is_hidden: Callable[[int], bool] = lambda step: False,
) -> None:
    """Train with AdamW, by the schedule of `learning_rate_factor`.

    Args:
        model: The model; it is left in eval mode.
        groups: Parameter groups, each with its peak learning rate.
        draw: Makes the batch of a step, on the model's device.
        steps: Optimizer steps.
        description: What the progress bar says.
        checkpoint: Keeps the state every 20 steps. It is left for the caller to remove once the weights are saved.
        is_hidden: Whether no text token can attend to an image in a step. Models without PVM are not refused: they are
            what it is compared with.

    Raises:
        ValueError: There are no steps, or the checkpoint is of another training.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1.")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    done = 0 if checkpoint is None else checkpoint.load(optimizer)
    vlm = find_vlm(base_of(model))
    model.train()
    with Bars() as bar:
        for step in bar.track(range(done, steps), description=description, total=steps, completed=done):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = learning_rate_factor(step, steps) * peak
            batch = draw(step)
            optimizer.zero_grad()
            with images_hidden(vlm) if is_hidden(step) else contextlib.nullcontext():
                for part in batch.parts(TOKENS_PER_BACKWARD):
                    loss = F.cross_entropy(target_logits(model, part).flatten(0, 1), part.targets.flatten())
                    (loss * (len(part.targets) / len(batch.targets))).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                checkpoint.save(step + 1, optimizer)
    model.eval()

"""Training on the mosaic task. Everything is decided by the seed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..data_file import holding
from ..replacing import write_file
from ..terminal import progress_bar
from .mosaic import IMAGE, IMAGE_LENGTH, NUM_CELLS, Batch, make_questions, make_transcriptions


TOKENS_PER_STEP = 2048  # larger steps are no faster per token on a CPU, whose cache they leave
TOKENS_PER_HIDDEN_STEP = 640  # short rows give as many answers
LONGEST_WHEN_HIDDEN = 64  # bytes of distractor
SHORTEST = 4  # bytes of distractor
CHECKPOINT_EVERY = 100  # steps

Lengths = Literal["log-uniform", "uniform"]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained.

    Where the base still answers right, an adapter has nothing to learn, and where it does not, rows are long and give
    few answers for their cost. So a recipe may begin with steps that go to the limit of fading itself: no token can
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
        learning_rate: Its peak; scalars, such as the gate of PVM, learn ten times as fast.
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

    def __post_init__(self):
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
        hidden = f"{self.hidden_steps:,} steps with the image hidden from self-attention, then " * bool(
            self.hidden_steps
        )
        much = ", mostly long" * (self.lengths == "uniform")
        return f"{hidden}{self.steps:,} steps with up to {self.max_distractor_length:,} bytes of text in between{much}"


def target_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a model says where a target is to be told, `(rows, targets, vocab_size)`."""
    return model(**batch.inputs, use_cache=False).logits


def train_base(model: nn.Module, steps: int = 2000, learning_rate: float = 2e-3, seed: int = 0) -> None:
    """Teach all of a fresh tiny model the task, with at most 24 bytes of text between the mosaics and the dialogue.

    Args:
        model: The model; it is trained in place and left in eval mode.
        steps: Optimizer steps.
        learning_rate: Its peak.
        seed: Decides the questions.
    """

    def draw(step: int) -> Batch:
        generator = _generator(seed, step)
        return _draw_step(step, int(torch.randint(25, (), generator=generator)), generator)

    groups = [{"params": list(model.parameters()), "lr": learning_rate, "weight_decay": 0.05}]
    _fit(model, groups, draw, steps, "Training the base")


def train_adapter(model: PeftModel, recipe: Recipe, checkpoint: str | os.PathLike | None = None) -> None:
    """Train the adapter of a model whose base is frozen.

    Args:
        model: The model; it is trained in place and left in eval mode. Only parameters that require gradients change.
        recipe: How.
        checkpoint: A file where a training that was interrupted goes on, to the same weights; it is written every 100
            steps and removed at the end.

    Raises:
        ValueError: Nothing to train, or a checkpoint of another model or recipe.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "No parameter of the model requires gradients. Was the adapter loaded with is_trainable=True?"
        )

    def draw(step: int) -> Batch:
        generator = _generator(recipe.seed, step)
        hidden = step < recipe.hidden_steps
        longest = LONGEST_WHEN_HIDDEN if hidden else recipe.max_distractor_length
        if hidden or recipe.lengths == "log-uniform":
            exponent = torch.empty(()).uniform_(math.log(SHORTEST), math.log(longest), generator=generator)
            length = round(math.exp(float(exponent)))
        else:
            length = int(torch.randint(SHORTEST, longest + 1, (), generator=generator))
        if hidden:
            return hide_image(model, _draw_step(step, length, generator, TOKENS_PER_HIDDEN_STEP))
        return _draw_step(step, length, generator, long_transcriptions=True)

    # A fresh gate is 0, while the residual stream of the tiny model has a root mean square of 5 to 8.
    gates = [parameter for parameter in trained if parameter.numel() == 1]
    others = [parameter for parameter in trained if parameter.numel() > 1]
    groups = [
        {"params": others, "lr": recipe.learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": 10 * recipe.learning_rate, "weight_decay": 0.0},
    ]
    file = None if checkpoint is None else Checkpoint(checkpoint, json.dumps(asdict(recipe)))
    _fit(
        model,
        [group for group in groups if group["params"]],
        draw,
        recipe.hidden_steps + recipe.steps,
        "Training",
        file,
    )


def hide_image(model: Any, batch: Batch) -> Batch:
    """The batch with the image masked out of self-attention; every token keeps its position."""
    inputs = dict(batch.inputs)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    # Made beforehand, since the model would take masked tokens for padding and give them no position.
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs["position_ids"], _ = base.model.get_rope_index(**{name: inputs[name] for name in names})
    inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
    return Batch(inputs, batch.targets)


class Checkpoint:
    """Where a training stands, in a safetensors file: parameters, what AdamW keeps of them, and the step.

    Args:
        path: The file.
        recipe: Text that names the training; one of another name is not gone on with.
    """

    def __init__(self, path: str | os.PathLike, recipe: str):
        self.path = path
        self.recipe = recipe

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after `step` steps; the file before stays whole until then."""
        tensors = {}
        for index, parameter in enumerate(self._parameters(optimizer)):
            tensors[f"{index}.parameter"] = parameter.detach()
            tensors.update({f"{index}.{name}": tensor for name, tensor in optimizer.state[parameter].items()})
        write_file(self.path, save(tensors, metadata={"step": str(step), "recipe": self.recipe}))

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Put the state back into parameters and optimizer.

        Returns:
            The steps done; 0 where there is no file.

        Raises:
            ValueError: The file is of another training.
        """
        if not os.path.isfile(self.path):
            return 0
        with holding(self.path, "the checkpoint of a training"):
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(self.path)
        parameters = self._parameters(optimizer)
        shapes = [
            tuple(tensors[key].shape) for key in map("{}.parameter".format, range(len(tensors))) if key in tensors
        ]
        recipe = metadata.get("recipe")
        if recipe != self.recipe or shapes != [tuple(parameter.shape) for parameter in parameters]:
            raise ValueError(f"{self.path} is the checkpoint of another training: {recipe}. Remove it to start anew.")
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{index}.parameter"])
                names = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {name: tensors[f"{index}.{name}"] for name in names}
        return int(metadata["step"])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if os.path.isfile(self.path):
            os.remove(self.path)

    @staticmethod
    def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _generator(seed: int, step: int) -> torch.Generator:
    """What a step draws from: its own, so that a training can go on anywhere."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def _draw_step(
    step: int,
    length: int,
    generator: torch.Generator,
    tokens: int = TOKENS_PER_STEP,
    long_transcriptions: bool = False,
) -> Batch:
    """Of four steps, two ask about one mosaic, one asks about two or three, and one has a mosaic transcribed.

    The length is that of the distractor, or of the transcription itself, which then has none.
    """
    images = int(torch.randint(2, 4, (), generator=generator)) if step % 4 == 1 else 1
    rows = max(1, min(64, tokens // (images * IMAGE_LENGTH + length + 2 * NUM_CELLS)))
    if step % 4 != 3:
        return make_questions("train", rows, length, NUM_CELLS, generator, images)
    if long_transcriptions:
        return make_transcriptions("train", rows, 0, max(NUM_CELLS, length // 2), generator)
    return make_transcriptions("train", rows, length, NUM_CELLS, generator)


def _fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    draw: Callable[[int], Batch],
    steps: int,
    description: str,
    checkpoint: Checkpoint | None = None,
) -> None:
    """AdamW on parameter groups: a linear warm-up over a tenth of the steps, then half a cosine down to zero."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1.")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    warmup = max(1, steps // 10)
    done = 0 if checkpoint is None else checkpoint.load(optimizer)
    model.train()
    with progress_bar() as bar:
        for step in bar.track(range(done, steps), description=description, total=steps, completed=done):
            factor = (step + 1) / warmup
            if step >= warmup:
                factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = factor * peak
            batch = draw(step)
            loss = F.cross_entropy(target_logits(model, batch).flatten(0, 1), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                checkpoint.save(step + 1, optimizer)
    model.eval()
    if checkpoint is not None:
        checkpoint.remove()

"""Training methods on the real base, and the trained model. A finished training is not repeated."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from peft_pvm.cli.refusals import reading
from peft_pvm.demo.mosaic import Batch
from peft_pvm.demo.questions import Questions
from peft_pvm.demo.train import fit
from peft_pvm.folders.base_checkpoint import SINGLE
from peft_pvm.training.gates import parameter_groups
from peft_pvm.tuners.saving import save_adapter

from ..base import fingerprint
from ..checkpoint import CheckpointFile, is_finished
from ..methods import attach, trained_parameters
from ..weights import put_weights, save_run
from .arithmetic import bf16, one_thread
from .methods import METHODS


def load_base(base: str | os.PathLike) -> LlavaForConditionalGeneration:
    """The real base, in eval mode.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It cannot be read.
    """
    with reading("the real base", base):
        return LlavaForConditionalGeneration.from_pretrained(base).eval()


def load_questions(base: str | os.PathLike) -> Questions:
    """The task as the real base writes it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It cannot be read, or is another model.
    """
    with reading("the real base", base):
        return Questions.of(base)


def run_folder(runs: str | os.PathLike, name: str, seed: int) -> Path:
    """The folder of one training. Its name has no `+`, which would part two adapters."""
    return Path(runs, f"{name.replace('+', '-')}.seed{seed}")


def train_method(name: str, seed: int, base: str | os.PathLike, runs: str | os.PathLike, device: str = "cpu") -> Path:
    """Train one method. On a CPU its state is kept every 20 steps, from which it goes on to the same weights.

    Args:
        name: A key of `METHODS` with a training.
        seed: Decides initial weights and questions.
        base: Folder of the real base.
        runs: Folder for everything that is trained.
        device: Where.

    Returns:
        The run's folder: the weights, and how they were made; and the adapters, each as a folder of its own.

    Raises:
        FileNotFoundError: There is no base.
        ValueError: The method has no training of its own, or the folder holds another training.
    """
    training = METHODS[name].training
    if training is None:
        trained = ", ".join(key for key, method in METHODS.items() if method.training)
        raise ValueError(f"{name} has no training of its own; there are {trained}.")
    folder = run_folder(runs, name, seed)
    with reading("the real base", base):
        trained_on = fingerprint(Path(base, SINGLE))
    if is_finished(folder, training, trained_on):
        return folder
    questions, model = load_questions(base), with_method(name, seed, base).to(device)
    folder.mkdir(parents=True, exist_ok=True)

    def draw(step: int) -> Batch:
        return training.draw(questions, seed, step).to(model.device)

    about = {"recipe": asdict(training), "seed": seed, "base": trained_on}
    adapters = {key: config.to_dict() for key, config in METHODS[name].adapters().items()}
    checkpoint = CheckpointFile(folder / "checkpoint.safetensors", {**about, "adapters": adapters})
    kept = checkpoint if device == "cpu" else None
    groups = parameter_groups(model, training.learning_rate, training.faster_gates)
    with one_thread():
        fit(model, groups, draw, training.steps, folder.name, kept, lambda step: step < training.hidden_steps)
    seconds = checkpoint.seconds
    run = {
        **about,
        "parameters": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        # Counted afterwards, so that those before an interruption are among them.
        "tokens": sum(draw(step).inputs["input_ids"].numel() for step in range(training.steps)),
        "seconds": round(seconds),
        **bf16(),
    }
    for adapter in METHODS[name].adapters():
        save_adapter(model, adapter, folder / adapter)
    save_run(folder, model, run)
    checkpoint.remove()
    return folder


def load_method(
    name: str, seed: int | None, base: str | os.PathLike, runs: str | os.PathLike
) -> tuple[LlavaForConditionalGeneration, dict[str, Any] | None]:
    """The real base with a method on it, in eval mode, and how it was trained.

    Args:
        name: A key of `METHODS`.
        seed: Of its training; `None` for a method without.
        base: Folder of the real base.
        runs: Folder of the trainings.

    Raises:
        FileNotFoundError: There is no base, or it was not trained yet.
        ValueError: The weights do not fit, or were trained on another base.
    """
    model, run = with_method(name, seed or 0, base), None
    if seed is not None:
        source = METHODS[name].weights_of or name
        folder = run_folder(runs, source, seed)
        run = put_weights(model, folder, fingerprint(Path(base, SINGLE)), f"real-train --method {source}")
    return model.requires_grad_(False).eval(), run


def with_method(name: str, seed: int, base: str | os.PathLike) -> LlavaForConditionalGeneration:
    """The base with a fresh method; what it trains is in fp32, as PEFT has it.

    Args:
        name: A key of `METHODS`.
        seed: Decides initial weights.
        base: Folder of the real base.

    Raises:
        FileNotFoundError: There is no base.
        ValueError: It cannot be read.
    """
    model = load_base(base)
    attach(model, METHODS[name], seed)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()
    return model

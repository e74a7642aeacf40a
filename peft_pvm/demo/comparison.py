"""Models compared by length of text, and the demo: what each method does about a model that forgets its image."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.table import Table
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from ..methods import METHODS, PVMConfig
from ..tuners.active import attached
from ..utils.terminal import Terminal
from .mosaic import NUM_CELLS
from .recall import Accuracy, recall
from .tiny_vlm import load_tiny_vlm
from .train import Recipe, train_adapter


LENGTHS = (0, 64, 128, 256, 512, 1024, 2048)


def run_demo(out: str | os.PathLike | None = None, steps: int = 1000, rows: int = 16, seed: int = 0) -> None:
    """Train a PVM adapter on the shipped tiny model, save it, load it back; print accuracy by distractor length.

    Beside the base and PVM it tests the methods that need no training, with their default settings.

    Args:
        out: Folder for the adapter; by default a temporary one, which is deleted at the end.
        steps: Steps of the adapter's training.
        rows: Rows of nine questions for every length, the same in every column.
        seed: Decides initialisation, training questions and test questions.
    """
    if out is not None:
        return _run(os.fspath(out), steps, rows, seed)
    with tempfile.TemporaryDirectory() as folder:
        return _run(folder, steps, rows, seed)


def _run(folder: str, steps: int, rows: int, seed: int) -> None:
    start = time.perf_counter()
    console = Terminal()
    recipe = Recipe(steps=steps // 5, hidden_steps=steps - steps // 5, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64, layers_to_transform="strided"))
    trained, total = model.get_nb_trainable_parameters()
    layers = model.peft_config["default"].layers_to_transform
    console.print(f"PVM at layers {layers} of 6: training {trained:,} of {total:,} parameters; the base is frozen.")
    console.print(f"{recipe}.")
    train_adapter(model, recipe)
    model.save_pretrained(folder)
    size = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
    training_seconds = time.perf_counter() - start
    console.print(
        f"Trained in {training_seconds:.0f} s. Saved to {folder}: {size / 1e6:.2f} MB, loaded back from there."
    )

    pvm_model, model = PeftModel.from_pretrained(load_tiny_vlm(), folder).eval(), load_tiny_vlm()
    results: dict[str, dict[int, Accuracy]] = {}
    for name, tested, configs in (
        ("base", model, []),
        ("PVM", pvm_model, []),
        *((method.name, model, [method.config()]) for method in METHODS if not method.needs_training),
    ):
        with attached(tested, *configs):
            results[name] = {length: recall(tested, length, rows, seed=seed, description=name) for length in LENGTHS}
    console.print(accuracy_table(results))
    seconds = time.perf_counter() - start
    console.print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {seconds:.0f} s."
    )


def load_models(adapters: Sequence[str | os.PathLike], base: str | os.PathLike | None = None) -> dict[str, nn.Module]:
    """The tiny model without adapters, and with each of some.

    Args:
        adapters: Folders or Hub ids.
        base: Folder of a tiny model that was trained further; `None`: the shipped one.

    Returns:
        Models in eval mode, by "base" or the adapter.
    """

    def load() -> Any:
        return load_tiny_vlm() if base is None else Qwen3VLForConditionalGeneration.from_pretrained(base).eval()

    adapted = {os.fspath(name): PeftModel.from_pretrained(load(), name).eval() for name in adapters}
    return {"base": load(), **adapted}


def compare(models: Mapping[str, nn.Module], rows: int, seed: int) -> None:
    """Print the accuracy of models side by side, by length of distractor.

    Args:
        models: Tiny models, by the heading of their column.
        rows: Rows of nine questions for every length, the same in every column.
        seed: Decides the questions.
    """
    results = {
        name: {length: recall(model, length, rows, seed=seed, description=name) for length in LENGTHS}
        for name, model in models.items()
    }
    Terminal().print(accuracy_table(results))


def accuracy_table(results: dict[str, dict[int, Accuracy]]) -> Table:
    """Results side by side, one column for each name, one row for each distractor length."""
    shown = {len(result.right) for column in results.values() for result in column.values()}
    rows = ", ".join(map(str, shown))
    title = f"Which digit was in that cell? {rows} x {NUM_CELLS} held-out questions, ± standard error"
    table = Table("bytes of text between", *results, title=title)
    for column in table.columns:
        column.justify = "right"
    for length in next(iter(results.values())):
        each = (column[length] for column in results.values())
        table.add_row(str(length), *(f"{result.value:.3f} ± {result.standard_error:.3f}" for result in each))
    return table

"""The demo: a frozen tiny model forgets its image as text accumulates; what each method does about that."""

from __future__ import annotations

import os
import tempfile
import time

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table

from ..dipe import DIPEConfig
from ..pvm import PVMConfig
from ..tdrs import TDRSConfig
from ..trial import attached
from .tiny_vlm import load_tiny_vlm
from .train import Accuracy, accuracy, train_adapter


LENGTHS = (0, 64, 128, 256, 512, 1024, 2048)


def run_demo(
    out: str | os.PathLike | None = None,
    steps: int = 800,
    hidden_share: float = 0.5,
    questions: int = 100,
    seed: int = 0,
) -> None:
    """Train a PVM adapter on the shipped tiny model, save it, load it back; print accuracy by distractor length.

    Beside the base and PVM it tests DIPE and T-DRS with their default settings, which need no training.

    Args:
        out: Folder for the adapter; by default a temporary one, which is deleted at the end.
        steps: Steps of the adapter's training.
        hidden_share: Share of them with the image hidden from self-attention, see `train_adapter`.
        questions: Test questions for every length, the same in every column.
        seed: Decides initialisation, training questions and test questions.
    """
    if out is not None:
        return _run(os.fspath(out), steps, hidden_share, questions, seed)
    with tempfile.TemporaryDirectory() as folder:
        return _run(folder, steps, hidden_share, questions, seed)


def _run(folder: str, steps: int, hidden_share: float, questions: int, seed: int) -> None:
    start = time.perf_counter()
    console = Console()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64, layers_to_transform="strided"))
    trained, total = model.get_nb_trainable_parameters()
    layers = model.peft_config["default"].layers_to_transform
    console.print(f"PVM at layers {layers} of 6: training {trained:,} of {total:,} parameters; the base is frozen.")
    console.print(
        f"{hidden_share:.0%} of its steps hide the image from self-attention, the others are as in the test."
    )
    train_adapter(model, steps=steps, hidden_share=hidden_share, seed=seed)
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
        ("DIPE", model, [DIPEConfig()]),
        ("T-DRS", model, [TDRSConfig()]),
    ):
        with attached(tested, *configs):
            results[name] = {length: accuracy(tested, length, questions, seed, name) for length in LENGTHS}
    console.print(accuracy_table(results))
    seconds = time.perf_counter() - start
    console.print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {seconds:.0f} s."
    )


def accuracy_table(results: dict[str, dict[int, Accuracy]]) -> Table:
    """Results side by side, one column for each name, one row for each distractor length."""
    questions = {result.questions for column in results.values() for result in column.values()}
    title = (
        f"Which digit was in that cell? {', '.join(map(str, questions))} held-out questions a row, ± standard error"
    )
    table = Table("bytes of text between", *results, title=title)
    for column in table.columns:
        column.justify = "right"
    for length in next(iter(results.values())):
        each = (column[length] for column in results.values())
        table.add_row(str(length), *(f"{result.value:.3f} ± {result.standard_error:.3f}" for result in each))
    return table

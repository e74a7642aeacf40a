"""Testing the real base, bare and with adapters: accuracy after ever more text. Every row is kept at once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import LlavaForConditionalGeneration

from peft_pvm.cli.refusals import reading
from peft_pvm.demo.mosaic import NUM_CELLS, Split
from peft_pvm.demo.recall import Accuracy
from peft_pvm.demo.train import step_generator, target_logits
from peft_pvm.env import environment
from peft_pvm.folders.base_checkpoint import SINGLE
from peft_pvm.folders.data_file import holding, read_json, write_json
from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.methods.tdrs import TDRSConfig
from peft_pvm.tuners.active import attached
from peft_pvm.tuners.base import VisualConfig
from peft_pvm.tuners.saving import load_adapters
from peft_pvm.utils.terminal import progress_bar

from ..base import fingerprint
from .questions import Questions, Turn
from .training import one_thread


METHODS: dict[str, VisualConfig | None] = {
    "base": None,
    "dipe": DIPEConfig(max_distance=0),  # the paper's
    **{f"dipe-{distance}": DIPEConfig(max_distance=distance) for distance in (16, 32, 64, 128, 256, 512)},
    "dipe-128-image": DIPEConfig(max_distance=128, anchor="image"),
    "t-drs": TDRSConfig(),
}
TASKS: dict[str, Callable[[int], list[Turn]]] = {  # by tokens of text in all turns together; nine digits in each
    "look-up": lambda text: [Turn(text_tokens=text)],
    "interfering": lambda text: [Turn(text_tokens=text, interfering=True)],
    "two-pictures": lambda text: [Turn(2, text)],
    "three-pictures": lambda text: [Turn(3, text)],
    "three-turns": lambda text: [Turn(1, (text + rest) // 3, cells=3) for rest in range(3)],
}
LENGTHS = (0, 256, 1024, 2048, 4096)  # tokens of text between image and question


@dataclass
class Results:
    """The results of one method as a JSON file, which grows row by row.

    Args:
        path: The file, read if it is there.
        about: What is tested and with which questions; results about anything else are refused.

    Attributes:
        right: By tokens of text, how many of its nine digits each row has right.
        seconds: By tokens of text, the CPU time of all rows.

    Raises:
        ValueError: The file is damaged, or about something else.
    """

    path: Path
    about: Mapping[str, Any]
    right: dict[int, list[int]] = field(init=False, default_factory=dict)
    seconds: dict[int, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            return
        content = read_json(self.path)
        with holding(self.path, "what python -m experiments real-eval writes"):
            cells = content["by tokens of text"].items()
            self.right = {int(length): list(map(int, cell["right of nine"])) for length, cell in cells}
            self.seconds = {int(length): float(cell["CPU seconds"]) for length, cell in cells}
            found = {name: content[name] for name in self.about}
        for name, wanted in self.about.items():
            if found[name] != wanted:
                raise ValueError(
                    f"{self.path} has results with {name} {found[name]!r}, but these would be with {wanted!r}. Write "
                    "to another folder with --results, or remove the file."
                )

    def add(self, length: int, right: int, seconds: float) -> None:
        """Note one more row, and write the file."""
        self.right.setdefault(length, []).append(right)
        self.seconds[length] = self.seconds.get(length, 0.0) + seconds
        cells = {str(length): self._cell(length) for length in sorted(self.right)}
        write_json(self.path, {**self.about, "by tokens of text": cells, "environment": environment()})

    def accuracy(self, length: int, rows: int) -> Accuracy:
        """Of the first rows."""
        return Accuracy(tuple(self.right[length][:rows]), NUM_CELLS)

    def _cell(self, length: int) -> dict[str, Any]:
        accuracy = self.accuracy(length, len(self.right[length]))
        return {
            "accuracy": round(accuracy.value, 4),
            "standard error": round(accuracy.standard_error, 4) if len(accuracy.right) > 1 else None,
            "right of nine": "".join(map(str, accuracy.right)),  # one digit a row
            "CPU seconds": round(self.seconds[length], 1),
        }


@dataclass(frozen=True)
class EvalPlan:
    """Which questions are asked: row by row the same of all that is tested, and of all lengths about the same mosaics.

    Attributes:
        task: A key of `TASKS`.
        lengths: Tokens of text after images, in all turns together.
        rows: Rows of nine questions at every length.
        split: Where digits and text come from.
        seed: Decides them.
    """

    task: str = "look-up"
    lengths: tuple[int, ...] = LENGTHS
    rows: int = 40
    split: Split = "test"
    seed: int = 0


def evaluate(
    base: str | os.PathLike, methods: Sequence[str], adapters: Sequence[str], plan: EvalPlan, out: str | os.PathLike
) -> dict[str, Results]:
    """Test the base with each method and with each saved adapter. Rows that were tested before are not repeated.

    Args:
        base: Folder of the real base.
        methods: Keys of `METHODS`.
        adapters: Folders, or several with `+` between, which act together.
        plan: The questions.
        out: Folder of the results. Each task has a folder there, with one JSON file for each method and adapter.

    Returns:
        The results, by method or adapter.

    Raises:
        FileNotFoundError: There is no such base or adapter.
        ValueError: Something cannot be read, or the results that are there are about something else.
    """
    questions = Questions.of(base)
    shared = {"task": plan.task, "base": fingerprint(Path(base, SINGLE)), "split": plan.split, "seed": plan.seed}
    tested = {}
    for name in [*methods, *adapters]:
        folders = [] if name in METHODS else name.split("+")
        short = "+".join(Path(part).name for part in folders) or name
        about = {"method": short, "adapters": [_hash_of_folder(folder) for folder in folders], **shared}
        tested[name] = Results(Path(out, plan.task, f"{short}.json"), about)
    with one_thread():
        if methods:
            model = _load(base)
        for name in methods:
            config = METHODS[name]
            with attached(model, *([] if config is None else [config])):
                _ask(model, questions, plan, tested[name])
        for name in adapters:
            model = _load(base)
            load_adapters(model, name.split("+"))
            _ask(model, questions, plan, tested[name])
    return tested


def _load(base: str | os.PathLike) -> LlavaForConditionalGeneration:
    with reading("the real base", base):
        return LlavaForConditionalGeneration.from_pretrained(base).eval()


@torch.no_grad()
def _ask(model: nn.Module, questions: Questions, plan: EvalPlan, results: Results) -> None:
    with progress_bar() as bar:
        for length in plan.lengths:
            done = len(results.right.get(length, []))
            description = f"{results.about['method']}, {length} tokens"
            for row in bar.track(range(done, plan.rows), description=description, total=plan.rows, completed=done):
                start = time.process_time()
                drawn = questions.draw(plan.split, 1, TASKS[plan.task](length), step_generator(plan.seed, row))
                batch = questions.only_digits(drawn)
                right = int((target_logits(model, batch).argmax(-1) == batch.targets).sum())
                results.add(length, right, time.process_time() - start)


def _hash_of_folder(folder: str) -> str:
    """Of an adapter's configuration and weights."""
    files = [Path(folder, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table_of(results: Mapping[str, Results], plan: EvalPlan) -> Table:
    """Accuracies side by side, one column for each length."""
    title = f"{plan.task}, {plan.rows} x {NUM_CELLS} questions ({plan.split}), ± standard error by row"
    table = Table("tokens of text between", *map(str, plan.lengths), title=title)
    for name, result in results.items():
        cells = [result.accuracy(length, plan.rows) for length in plan.lengths]
        table.add_row(name, *(f"{cell.value:.3f} ± {cell.standard_error:.3f}" for cell in cells))
    return table

"""Testing the real base, bare and with adapters: accuracy after ever more text. Every row is kept at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from peft_pvm.demo.mosaic import NUM_CELLS, Batch, Split
from peft_pvm.demo.questions import Questions, Turn
from peft_pvm.demo.recall import Accuracy
from peft_pvm.demo.train import step_generator, target_logits
from peft_pvm.env import environment
from peft_pvm.folders.base_checkpoint import SINGLE
from peft_pvm.folders.data_file import holding, read_json, write_json
from peft_pvm.tuners.loading import load_adapters
from peft_pvm.tuners.names import separate
from peft_pvm.utils.terminal import Bars

from ..base import fingerprint
from .arithmetic import bf16, one_thread
from .methods import METHODS
from .runs import load_base, load_method, load_questions
from .writing import transcribe


TASKS: dict[str, Callable[[int], list[Turn]]] = {  # by tokens of text in all turns together; nine digits in each
    "look-up": lambda text: [Turn(text_tokens=text)],
    "interfering": lambda text: [Turn(text_tokens=text, interfering=True)],
    "two-pictures": lambda text: [Turn(2, text)],
    "three-pictures": lambda text: [Turn(3, text)],
    "in-words": lambda text: [Turn(text_tokens=text, in_words=True)],
    "three-turns": lambda text: [Turn(1, (text + rest) // 3, cells=3) for rest in range(3)],
}
WRITING = "transcription"  # the task in which the model writes on and on
TOKENS_PER_FORWARD = 16_384  # on a GPU; a CPU is no faster with several rows
LENGTHS = (0, 256, 1024, 2048, 4096)  # tokens of text between image and question


@dataclass
class Results:
    """The results of one method as a JSON file, which grows row by row.

    Args:
        path: The file, read if it is there.
        about: What is tested and with which questions; results about anything else are refused.

    Attributes:
        right: By tokens of text, how many of its nine digits each row has right.

    Raises:
        ValueError: The file is damaged, or about something else.
    """

    path: Path
    about: Mapping[str, Any]
    right: dict[int, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._read()

    def _read(self) -> None:
        """Take up the rows in the file. Another process may have added some since; rows have the same order in all."""
        if not self.path.is_file():
            return
        content = read_json(self.path)
        with holding(self.path, "what python -m experiments real-eval writes"):
            recorded = {
                int(n): list(map(int, cell["right of nine"])) for n, cell in content["by tokens of text"].items()
            }
            self.right |= {n: right for n, right in recorded.items() if len(right) > len(self.right.get(n, []))}
            found = {name: content[name] for name in self.about}
        for name, wanted in self.about.items():
            if found[name] != wanted:
                raise ValueError(
                    f"{self.path} has results with {name} {found[name]!r}, but these would be with {wanted!r}. Write "
                    "to another folder with --results, or remove the file."
                )

    def note(self, length: int, first: int, right: Sequence[int]) -> None:
        """Take up rows of a length, of which `first` is the number of the first."""
        self.right.setdefault(length, [])[first : first + len(right)] = right

    def write(self) -> None:
        """Write the file, which keeps what another process has added to it."""
        self._read()
        cells = {str(length): self._cell(length) for length in sorted(self.right)}
        write_json(self.path, {**self.about, "by tokens of text": cells, "environment": {**environment(), **bf16()}})

    def accuracy(self, length: int, rows: int) -> Accuracy:
        """The accuracy over the first rows."""
        return Accuracy(tuple(self.right[length][:rows]), NUM_CELLS)

    def _cell(self, length: int) -> dict[str, Any]:
        accuracy = self.accuracy(length, len(self.right[length]))
        return {
            "accuracy": round(accuracy.value, 4),
            "standard error": round(accuracy.standard_error, 4) if len(accuracy.right) > 1 else None,
            "right of nine": "".join(map(str, accuracy.right)),  # one digit a row
        }


@dataclass(frozen=True)
class EvalPlan:
    """Which questions are asked: row by row the same of all that is tested, and of all lengths about the same mosaics.

    Attributes:
        task: A key of `TASKS`, or `WRITING`.
        lengths: Tokens of text after images, in all turns together; in `WRITING` the model writes up to the longest.
        rows: Rows of nine questions at every length.
        split: Where digits and text come from.
        seed: Decides them.
    """

    task: str = "look-up"
    lengths: tuple[int, ...] = LENGTHS
    rows: int = 40
    split: Split = "test"
    seed: int = 0


class Run(NamedTuple):
    """What is tested.

    Attributes:
        method: A key of `METHODS`.
        seed: Of its training; `None` for a method without.
    """

    method: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method}.seed{self.seed}"


def planned(methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of some methods: those with weights once for each seed of training."""
    with_weights = [name for name in methods if METHODS[name].training or METHODS[name].weights_of]
    return [Run(name, seed) for name in methods for seed in (seeds if name in with_weights else [None])]


@dataclass(frozen=True)
class Place:
    """Where things are, and where they are computed.

    Attributes:
        base: Folder of the real base.
        runs: Folder of what was trained on it.
        device: Such as cpu or cuda.
    """

    base: str | os.PathLike
    runs: str | os.PathLike = "runs/real"
    device: str = "cpu"


def evaluate(
    place: Place, runs: Sequence[Run], adapters: Sequence[str], plan: EvalPlan, out: str | os.PathLike
) -> dict[str, Results]:
    """Test the base with each method and with each saved adapter. Rows that were tested before are not repeated.

    Args:
        place: The base, and where to compute.
        runs: Methods, and their trainings.
        adapters: Folders, or several with `+` between, which act together.
        plan: The questions.
        out: Folder of the results. Each task has a folder there, with one JSON file for each run and adapter.

    Returns:
        The results, by run or adapter.

    Raises:
        FileNotFoundError: There is no such base, training or adapter.
        ValueError: Something cannot be read, or the results that are there are about something else.
    """
    questions = load_questions(place.base)
    shared = {"task": plan.task, "base": fingerprint(Path(place.base, SINGLE)), "split": plan.split, "seed": plan.seed}
    tested = {}

    def ask(name: str, file: str, model: nn.Module, **about: Any) -> None:
        results = tested[name] = Results(Path(out, plan.task, f"{file}.json"), {**about, **shared})
        model.to(place.device)
        if plan.task == WRITING:
            _watch(model, questions, plan, results)
        else:
            _ask(model, questions, plan, results)

    with one_thread():
        for run in runs:
            model, training = load_method(run.method, run.seed, place.base, place.runs)
            ask(str(run), str(run), model, method=run.method, adapters=[], training=training)
        for name in adapters:
            folders = separate(name)
            hashes = [hash_of_folder(folder) for folder in folders]
            model = load_base(place.base)
            load_adapters(model, folders)
            short = "+".join(Path(folder).name for folder in folders)
            ask(name, short, model, method=short, adapters=hashes, training=None)
    return tested


@torch.no_grad()
def _ask(model: nn.Module, questions: Questions, plan: EvalPlan, results: Results) -> None:
    device = next(model.parameters()).device
    with Bars() as bar:
        for length in plan.lengths:
            done = len(results.right.get(length, []))
            at_once = 1 if device.type == "cpu" else max(1, TOKENS_PER_FORWARD // (length + 256))
            description = f"{results.about['method']}, {length} tokens"
            task = bar.add_task(description, total=plan.rows, completed=done)
            for first in range(done, plan.rows, at_once):
                rows = range(first, min(first + at_once, plan.rows))
                batch = _draw(questions, plan, length, rows).to(device)
                right = (target_logits(model, batch).argmax(-1) == batch.targets).sum(1).tolist()
                results.note(length, first, right)
                results.write()
                bar.advance(task, len(rows))


def _draw(questions: Questions, plan: EvalPlan, length: int, rows: Iterable[int]) -> Batch:
    """Rows of a cell, each by a generator of its own."""
    turns = TASKS[plan.task](length)
    batches = [
        questions.only_digits(questions.draw(plan.split, 1, turns, step_generator(plan.seed, row))) for row in rows
    ]
    joined = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    joined["logits_to_keep"] = batches[0].inputs["logits_to_keep"]  # all rows have as many tokens
    return Batch(joined, torch.cat([batch.targets for batch in batches]))


def _watch(model: Any, questions: Questions, plan: EvalPlan, results: Results) -> None:
    """Have the model transcribe, in all rows at once. It is kept when it is done: an interrupted one begins anew.

    Rounds that were tested on more rows stay as they are: the later ones may have fewer.
    """
    longest = max(plan.lengths)
    done = sorted(distance for distance, right in results.right.items() if len(right) >= plan.rows)
    if len(done) > 1 and done[-1] + (done[-1] - done[-2]) > longest:  # the next round would begin after it
        return
    for distance, right in transcribe(model, questions, plan.split, plan.rows, plan.seed, longest):
        if len(right) > len(results.right.get(distance, [])):
            results.right[distance] = right
    results.write()


def hash_of_folder(folder: str) -> str:
    """A hash of an adapter's configuration and weights."""
    files = [Path(folder, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table_of(results: Mapping[str, Results], plan: EvalPlan) -> Table:
    """Accuracies side by side, one column for each length; of a transcription, for the last round before it."""
    title = f"{plan.task}, {plan.rows} x {NUM_CELLS} questions ({plan.split}), ± standard error by row"
    lengths: Sequence[int] = plan.lengths
    if plan.task == WRITING:
        rounds = next(iter(results.values())).right
        lengths = sorted({max(distance for distance in rounds if distance <= length) for length in lengths})
    table = Table("tokens of text between", *map(str, lengths), title=title)
    for name, result in results.items():
        cells = [result.accuracy(length, plan.rows) for length in lengths]
        table.add_row(name, *(f"{cell.value:.3f} ± {cell.standard_error:.3f}" for cell in cells))
    return table

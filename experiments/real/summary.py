"""What a folder of results of a real base holds: accuracies by task and method, and differences paired by row."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.recall import Accuracy

from ..summary import OF_MACHINES, Cell, read_results
from .findings.study import read_finding
from .methods import METHODS


FINDINGS = "findings"  # a folder beside those of the tasks, which holds no answers to questions
UNTESTED = "-"
AS_SAVED = ", as saved"  # after the method of files that tell of an adapter's folder and not of a training here

TASKS = {  # in the order of the page; others come after them, under their keys
    "look-up": "One picture",
    "interfering": "One picture, and text that tells of others",
    "two-pictures": "Two pictures",
    "three-pictures": "Three pictures",
    "three-turns": "Three turns, each with a picture",
    "transcription": "Long generation",
    "in-words": "No picture, but its digits in words",
}


@dataclass(frozen=True)
class Training:
    """How a method was trained.

    Attributes:
        recipe: By name of its fields.
        seed: Of the training.
        parameters: Trained ones.
        tokens: Read in training.
        seconds: It took.
    """

    recipe: dict[str, Any]
    seed: int
    parameters: int
    tokens: int
    seconds: float

    @classmethod
    def of(cls, content: dict[str, Any]) -> Training:
        """Make it from what a file of results says of it."""
        seed, parameters, tokens = (int(content[name]) for name in ("seed", "parameters", "tokens"))
        return cls(dict(content["recipe"]), seed, parameters, tokens, float(content["seconds"]))


@dataclass(frozen=True)
class Run:
    """One file of results: one method, from one training, on one task.

    Attributes:
        task: What was asked.
        method: What was tested; with `AS_SAVED` if an adapter's folder was.
        questions: Split and seed of the questions; rows of files with the same are the same.
        training: How it was trained; `None` without a training of the experiment.
        accuracies: By tokens of text.
        environment: The machine.
        adapters: Hashes of the saved adapters that were tested together; none if a method was.
    """

    task: str
    method: str
    questions: tuple[str, int]
    training: Training | None
    accuracies: dict[int, Accuracy]
    environment: dict[str, str]
    adapters: tuple[str, ...]

    @classmethod
    def of(cls, file: dict[str, Any]) -> Run:
        """Make it from the content of the file."""
        training, environment = file.get("training"), file["environment"]
        cells = {int(length): cell for length, cell in file["by tokens of text"].items()}
        accuracies = {length: _accuracy(cells[length]["right of nine"]) for length in sorted(cells)}
        return cls(
            str(file["task"]),
            str(file["method"]) + (AS_SAVED if file["adapters"] else ""),
            (str(file["split"]), int(file["seed"])),
            None if training is None else Training.of(training),
            accuracies,
            {name: str(environment[name]) for name in OF_MACHINES if name in environment or name != "CPU"},
            tuple(map(str, file["adapters"])),
        )

    @property
    def seed(self) -> int | None:
        """The seed of the training."""
        return None if self.training is None else self.training.seed


def _accuracy(right: str) -> Accuracy:
    if not re.fullmatch("[0-9]+", right):
        raise ValueError(f"{right!r} is not one digit a row")
    return Accuracy(tuple(map(int, right)), NUM_CELLS)


@dataclass(frozen=True)
class Entry:
    """All runs of one method on one task, one for each seed of its training; none if it was not tested.

    Attributes:
        method: Its key.
        runs: In the order of their seeds.
    """

    method: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """What tables say."""
        known = METHODS.get(self.method.removesuffix(AS_SAVED))
        return self.method if known is None else known.title + (AS_SAVED if AS_SAVED in self.method else "")

    @property
    def trainings(self) -> list[Training]:
        """Its own, one for each seed; none if it has the weights of another method."""
        if self.method in METHODS and METHODS[self.method].weights_of is not None:
            return []
        return [run.training for run in self.runs if run.training is not None]

    @property
    def lengths(self) -> list[int]:
        """Tokens of text that were tested."""
        return sorted({length for run in self.runs for length in run.accuracies})

    def accuracies(self, length: int) -> list[Accuracy]:
        """The accuracies of all seeds that were tested at this length."""
        return [run.accuracies[length] for run in self.runs if length in run.accuracies]

    def mean(self, length: int) -> float:
        """The mean accuracy over rows and seeds."""
        return Cell.of(self.accuracies(length)).mean

    def shown(self, length: int) -> str:
        """What tables show."""
        accuracies = self.accuracies(length)
        return str(Cell.of(accuracies)) if accuracies else UNTESTED


class Term(NamedTuple):
    """A part of a weighted sum of accuracies: `weight` times the accuracy of `entry` at `length`."""

    weight: float
    entry: Entry
    length: int


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        """The number as a difference, with its sign."""
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"


def contrast(*terms: Term) -> Estimate | None:
    """A weighted sum of accuracies, such as a difference, paired by row and averaged over seeds.

    Its squared error is that over rows plus, for each trained method, that over its seeds. What differs by row and
    seed at once is in both, so the error is rather too large than too small; with one seed, nothing is known of
    seeds. It is at least 1.5 answers: where n answers all agree, up to 3 / n may still differ (95 %).

    Args:
        terms: Of one task. Rows that all have are compared, from the first on.

    Returns:
        `None` if something was not tested, or on fewer than two rows.
    """
    by_method: dict[str, list[Term]] = {}
    for term in terms:
        by_method.setdefault(term.entry.method, []).append(term)
    tested = {
        method: [run for run in same[0].entry.runs if all(term.length in run.accuracies for term in same)]
        for method, same in by_method.items()
    }
    if not all(tested.values()):
        return None
    num_rows = min(len(run.accuracies[term.length].right) for term in terms for run in tested[term.entry.method])
    if num_rows < 2:
        return None
    answers = [  # by method, seed and row
        [
            [sum(term.weight * run.accuracies[term.length].right[row] for term in same) for row in range(num_rows)]
            for run in tested[method]
        ]
        for method, same in by_method.items()
    ]
    by_row = [sum(statistics.fmean(rows[row] for rows in seeds) for seeds in answers) for row in range(num_rows)]
    variance = statistics.variance(by_row) / num_rows
    for seeds in answers:
        if len(seeds) > 1:
            variance += statistics.variance(map(statistics.fmean, seeds)) / len(seeds)
    error = max(math.sqrt(variance), 1.5 / num_rows)
    return Estimate(statistics.fmean(by_row) / NUM_CELLS, error / NUM_CELLS)


class Results:
    """What a folder of results holds.

    Args:
        folder: With a folder for each task, of JSON files that `real-eval` wrote.

    Attributes:
        runs: One for each file.
        base: Fingerprint of the base.
        split: Of the questions.
        findings: Folder of what else was measured on it; it need not be there.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file is none of those, or cannot be compared with the others.
    """

    def __init__(self, folder: str | os.PathLike):
        paths = result_files(folder)
        files = read_results(folder, paths, "real-eval", lambda file: (Run.of(file), str(file["base"])))
        self.runs = [run for run, _ in files]
        self.base = files[0][1]
        self.findings = Path(folder, FINDINGS)
        for path in sorted(self.findings.glob("*.json")):
            base = read_finding(path).about["base"]
            if base != self.base:
                raise ValueError(f"{path} is of the base {base}, but the results beside it are of {self.base}.")
        questions = {run.questions for run in self.runs}
        if len(questions) > 1:
            raise ValueError(f"{folder} has results of {_listed(questions)}, which cannot be compared.")
        self.split = self.runs[0].questions[0]
        groups: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.task, run.method), []).append(run)
        self._entries = {
            (task, method): Entry(method, _one_for_each_seed(group, folder))
            for (task, method), group in groups.items()
        }

    @property
    def tasks(self) -> list[str]:
        """The tasks that were tested."""
        return _in_order(TASKS, {task for task, _ in self._entries})

    def find(self, task: str, method: str) -> Entry:
        """A method on a task; an entry without runs if it was not tested."""
        return self._entries.get((task, method)) or Entry(method, ())

    def on(self, task: str) -> list[Entry]:
        """All methods that were tested on a task."""
        return [self.find(task, method) for method in _in_order(METHODS, {m for t, m in self._entries if t == task})]


def _listed(questions: Iterable[tuple[str, int]]) -> str:
    return " and ".join(f"split {split}, seed {seed}" for split, seed in sorted(questions))


def _one_for_each_seed(runs: list[Run], folder: str | os.PathLike) -> tuple[Run, ...]:
    seeds = [run.seed for run in runs]
    if len(seeds) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(
            f"{folder} has several results of {runs[0].method} on {runs[0].task}, with seeds of training {seeds}. "
            "Keep one for each seed, and none without a seed beside them."
        )
    return tuple(sorted(runs, key=lambda run: run.seed or 0))


def result_files(folder: str | os.PathLike) -> list[Path]:
    """The files of results in a folder."""
    return sorted(path for path in Path(folder).glob("*/*.json") if path.parent.name != FINDINGS)


def _in_order(order: Iterable[str], found: set[str]) -> list[str]:
    return [key for key in order if key in found] + sorted(found.difference(order))

"""A summary of a folder of results: the mean over the runs of each method, and its error."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.recall import Accuracy
from peft_pvm.folders.data_file import holding, read_json

from .methods import METHODS
from .runs import MAIN_RECIPE


# What is said of machines, of the environment of results. Older results do not have the CPU.
OF_MACHINES = ("torch", "transformers", "peft", "Python", "Platform", "CPU", "CPU threads", "GPU")

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One number of a table: a mean over seeds of training or, without training, over rows of questions.

    Attributes:
        mean: From 0 to 1.
        spread: Standard deviation over seeds; standard error over rows where there is one run.
        standard_error: Of the mean.
    """

    mean: float
    spread: float
    standard_error: float

    @classmethod
    def of(cls, runs: Sequence[Accuracy]) -> Cell:
        """The summary of one or several runs."""
        if len(runs) == 1:
            return cls(runs[0].value, *[runs[0].standard_error] * 2)
        values = [accuracy.value for accuracy in runs]
        spread = statistics.stdev(values)
        return cls(statistics.fmean(values), spread, spread / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


def read_results(
    folder: str | os.PathLike, paths: Iterable[Path], command: str, parse: Callable[[dict[str, Any]], T]
) -> list[T]:
    """Read files of results that are to be compared.

    Args:
        folder: Where they lie, for the errors.
        paths: The files.
        command: What writes them.
        parse: Takes the content of one apart.

    Returns:
        What `parse` made of each, in the order of their names.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file is none of those, or they were made with different bases.
    """
    parsed, bases = [], set()
    for path in sorted(paths):
        file = read_json(path)
        with holding(path, f"what python -m experiments {command} writes"):
            parsed.append(parse(file))
            bases.add(str(file["base"]))
    if not parsed:
        raise FileNotFoundError(f"There are no results in {folder}. Make some first: python -m experiments {command}")
    if len(bases) > 1:
        raise ValueError(f"The results in {folder} are of different bases, {sorted(bases)}, and cannot be compared.")
    return parsed


@dataclass(frozen=True)
class Entry:
    """All runs of one method under one recipe.

    Attributes:
        method: Key of `METHODS`.
        recipe: Key of `RECIPES`; `None` for a method without training.
        parameters: Trained ones.
        runs: For each seed, accuracies by form and then by length or round.
        visual_mass: For each seed, by distractor length and then by layer.
        retrieved_mass: The same, by layer index; empty without PVM.
    """

    method: str
    recipe: str | None
    parameters: int
    runs: tuple[dict[str, dict[int, Accuracy]], ...]
    visual_mass: tuple[dict[int, list[float]], ...]
    retrieved_mass: tuple[dict[int, dict[int, float]], ...]

    def cell(self, form: str, key: int) -> Cell:
        """Summary of one column."""
        return Cell.of([run[form][key] for run in self.runs])

    def mean_mass(self, length: int) -> list[float]:
        """Visual attention mass at the questions for each layer, averaged over seeds."""
        return [statistics.fmean(values) for values in zip(*(masses[length] for masses in self.visual_mass))]

    def mean_retrieved(self, length: int) -> dict[int, float]:
        """Share of PVM's retrieval that goes to the cell asked for, by layer index, averaged over seeds."""
        by_seed = [masses[length] for masses in self.retrieved_mass]
        return {layer_idx: statistics.fmean(masses[layer_idx] for masses in by_seed) for layer_idx in by_seed[0]}

    def keys(self, form: str) -> list[int]:
        """Lengths or rounds that were tested."""
        return list(self.runs[0][form])


class Results:
    """What a folder of results holds.

    Args:
        folder: Of JSON files that `evaluate_method` wrote.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file is none of those, or they were made with different bases.
    """

    def __init__(self, folder: str | os.PathLike):
        self.files = read_results(folder, Path(folder).glob("*.json"), "eval", _checked)
        self.entries = _entries(self.files)

    def only(self, method: str, recipe: str | None, seed: int) -> Entry:
        """One run by itself.

        Raises:
            FileNotFoundError: There is no such result.
        """
        wanted = {"method": method, "recipe": recipe, "seed": seed}
        files = [file for file in self.files if wanted.items() <= file.items()]
        if not files:
            raise FileNotFoundError(f"There is no result of {wanted}. Test it first: python -m experiments eval")
        return _entries(files)[method, recipe]

    def find(self, method: str, recipe: str = MAIN_RECIPE) -> Entry | None:
        """A method's runs under a recipe, or without one if it is not trained."""
        return self.entries.get((method, recipe)) or self.entries.get((method, None))

    def under(self, recipe: str) -> list[Entry]:
        """All methods that were tested under a recipe, in the order of `METHODS`, those without training included."""
        found = [self.find(name, recipe) for name in METHODS]
        return [entry for entry in found if entry is not None]


def _checked(file: dict[str, Any]) -> dict[str, Any]:
    _entries([file])
    return file


def _entries(files: list[dict[str, Any]]) -> dict[tuple[str, str | None], Entry]:
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for file in files:
        groups.setdefault((file["method"], file["recipe"]), []).append(file)
    return {
        key: Entry(
            *key,
            group[0]["parameters"],
            tuple(_accuracies(file) for file in group),
            tuple({int(n): by_layer for n, by_layer in file["visual mass"].items()} for file in group),
            tuple(
                {
                    int(n): {int(i): mass for i, mass in by_layer.items()}
                    for n, by_layer in file["retrieved mass"].items()
                }
                for file in group
            ),
        )
        for key, group in groups.items()
    }


def _accuracies(file: dict[str, Any]) -> dict[str, dict[int, Accuracy]]:
    return {
        form: {int(key): Accuracy(tuple(map(int, right)), NUM_CELLS) for key, right in by_key.items()}
        for form, by_key in file["right of nine"].items()
    }

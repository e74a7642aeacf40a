"""The real bases' part of docs/results.md and its picture, made from the results' JSON and from nothing else."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.utils.plotting import as_png, line_look, new_figure, styled

from ..markdown import folded, machines, table
from ..summary import Cell
from .summary import TASKS, UNTESTED, Entry, Results, Term, Training, contrast, result_files


VALIDATION = "real-validation"
# The folders of results on a real base, and what the page calls them. Claims are decided by the first two.
BASES = {
    "real": "The real language model",
    "real-digits": "The real language model, visual tokens learned through it",
    "real-again": "The real language model, its base trained again on another machine",
    VALIDATION: "The real language model, on the validation split",
}
OF_CLAIMS = (BASES["real"], BASES["real-digits"])
IN_PICTURE = ("base", "log-bias", "lora", "pvm", "dipe", "dipe-128", "dipe+lora")
BESIDE = ("interfering", "transcription")  # the first of them that was tested is the right half of the picture
ROUNDS = (1, 2, 4, 8, 16, 28)  # shown of a task with more lengths than there is room for
MOST_LENGTHS = 8
START = 0.5  # where no text is on the logarithmic axis: at this part of the first length with text


def read_bases(folder: str | os.PathLike) -> dict[str, Results]:
    """The results of the real bases, by the names that the page has for them.

    Args:
        folder: Of all results. Bases whose folder in it has none are left out.

    Raises:
        ValueError: As for `Results`, or the questions are of another split than the folder is for.
    """
    found = {name: Results(Path(folder, name)) for name in BASES if result_files(Path(folder, name))}
    for name, results in found.items():
        expected = "validation" if name == VALIDATION else "test"
        if results.split != expected:
            raise ValueError(f"{Path(folder, name)} has results of split {results.split}, not {expected}.")
    return {BASES[name]: results for name, results in found.items()}


def render_base(results: Results) -> list[str]:
    """Setting, accuracies and trainings of one base, in Markdown."""
    lines = _setting(results)
    for task in results.tasks:
        title = f"{TASKS[task]} (`{task}`)" if task in TASKS else f"`{task}`"
        lines += ["", f"### {title}", "", *_accuracies(results, task)]
    return [*lines, "", *_trainings(results)]


def _setting(results: Results) -> list[str]:
    seeds = sorted({run.seed for run in results.runs if run.seed is not None})
    split, seed = results.runs[0].questions
    return [
        f"- Base {results.base}. Each row has {NUM_CELLS} questions (split {split}, seed {seed}). All methods get the "
        "same rows of a task. A cell with fewer rows than another has the first of the other's rows.",
        f"- Seeds of training: {', '.join(map(str, seeds)) or 'none'}.",
        "- ± is the standard deviation over trainings where there are several runs, and the standard error over rows "
        "where there is one. Differences from the base are paired by row; there ± is always the standard error.",
        *machines(run.environment for run in results.runs),
    ]


def _accuracies(results: Results, task: str) -> list[str]:
    entries, base = results.on(task), results.find(task, "base")
    lengths = _shown(entries)
    ends = list(dict.fromkeys([lengths[0], lengths[-1]]))
    rows = []
    for entry in entries:
        differences = [contrast(Term(1, entry, end), Term(-1, base, end)) for end in ends]
        shown = [UNTESTED if entry is base or difference is None else str(difference) for difference in differences]
        rows.append((entry.title, str(len(entry.runs)), *map(entry.shown, lengths), *shown))
    header = ("Method", "Runs", *map(_number, lengths), *(f"minus the base, {_number(end)}" for end in ends))
    return [f"Rows in a cell, by {_unit(task)}: {_rows_of_cells(entries, lengths)}.", "", *table(header, rows)]


def _shown(entries: Sequence[Entry]) -> list[int]:
    """The lengths that tables and axes show: all, or some of them and the last."""
    lengths = sorted({length for entry in entries for length in entry.lengths})
    if len(lengths) <= MOST_LENGTHS:
        return lengths
    return [length for number, length in enumerate(lengths, 1) if number in ROUNDS or number == len(lengths)]


def _number(length: int) -> str:
    return f"{length:,}"


def _unit(task: str) -> str:
    return "tokens between image and round" if task == "transcription" else "tokens of text"


def _rows_of_cells(entries: Sequence[Entry], lengths: Sequence[int]) -> str:
    def rows_at(length: int) -> str:
        counts = {len(accuracy.right) for entry in entries for accuracy in entry.accuracies(length)}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"

    groups = [(rows, [_number(length) for length in group]) for rows, group in groupby(lengths, key=rows_at)]
    return "; ".join(f"{rows} at {' to '.join(dict.fromkeys([group[0], group[-1]]))}" for rows, group in groups)


def _trainings(results: Results) -> list[str]:
    by_method: dict[str, list[Training]] = {}
    for task in results.tasks:
        for entry in results.on(task):
            by_method[entry.title] = max(by_method.get(entry.title, []), entry.trainings, key=len)
    rows = [(title, *_training(trainings)) for title, trainings in by_method.items() if trainings]
    header = ("Method", "Trained parameters", "Tokens", "Recipe")
    return ["### Trainings", "", *folded("What was trained, mean over seeds", table(header, rows))] if rows else []


def _training(trainings: Sequence[Training]) -> tuple[str, ...]:
    first = trainings[0]
    tokens = statistics.fmean(training.tokens for training in trainings)
    recipe = ", ".join(f"{name} {value}" for name, value in first.recipe.items())
    return f"{first.parameters:,}", f"{tokens:,.0f}", recipe


@styled
def draw_real(results: Results) -> bytes:
    """Accuracy by tokens of text, on the plain task and on a harder one, as PNG."""
    tasks = ["look-up", next((task for task in BESIDE if task in results.tasks), BESIDE[0])]
    figure, axes = new_figure(3.6, columns=2, sharey=True)
    labelled = {}
    for panel, task in zip(axes[0], tasks):
        entries = [results.find(task, method) for method in IN_PICTURE]
        lengths = _shown(entries)
        origin = START * next((length for length in lengths if length > 0), 1)
        for number, entry in enumerate(entries):
            if entry.runs:
                labelled[entry.title] = _draw_line(panel, entry, number, origin)
        panel.set_xscale("log", base=2)
        panel.set_xticks([max(length, origin) for length in lengths], list(map(_number, lengths)))
        panel.minorticks_off()
        panel.set_xlabel(_unit(task))
        panel.set_title(TASKS[task], fontsize=9)
        panel.axhline(0.1, color="grey", linewidth=0.8, linestyle=(0, (1, 3)))
    axes[0, 0].set_ylim(-0.02, 1.05)
    axes[0, 0].set_ylabel("accuracy")
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=4, handlelength=3, fontsize=8
    )
    return as_png(figure)


def _draw_line(panel: Any, entry: Entry, number: int, origin: float) -> Any:
    """One method's curve. Its points are a little beside the others', so that none covers another."""
    aside = 2 ** (0.07 * (number - (len(IN_PICTURE) - 1) / 2))
    cells = [Cell.of(entry.accuracies(length)) for length in entry.lengths]
    places = [max(length, origin) * aside for length in entry.lengths]
    return panel.errorbar(
        places, [cell.mean for cell in cells], [cell.spread for cell in cells], elinewidth=0.8, **line_look(number)
    )

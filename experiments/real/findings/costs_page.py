"""In words: what each method costs."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from ...markdown import table
from ..methods import METHODS
from .study import Recorded
from .words import heading


def costs_section(found: Recorded) -> Iterator[str]:
    """What does each method cost?"""
    base = found.cells["base"]
    yield from heading("What does each method cost?", found)
    yield (
        "Seconds of CPU time for a row of nine questions, which is read at once, and how many times the base's. All "
        "were measured one after the other on the same machine, on one thread, with fresh weights: the time does not "
        "depend on them. The columns are tokens of text."
    )
    yield ""
    rows = []
    for name, by_length in found.cells.items():
        seconds, of_base = ([fmean(cells[length]["seconds by row"]) for length in base] for cells in (by_length, base))
        times = [f"{ours / theirs:.2f} x" for ours, theirs in zip(seconds, of_base)]
        rows.append([METHODS[name].title, *map("{:.2f}".format, seconds), *times])
    columns = [f"{int(length):,}" for length in base]
    yield from table(["Method", *columns, *(f"x the base, {column}" for column in columns)], rows)

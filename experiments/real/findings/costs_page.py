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
        "Seconds of CPU time for a row of nine questions, which is read at once on one thread: the mean, the smallest "
        "and the largest, and how many times the base's mean. All were measured one after the other on one machine, "
        "with fresh weights, on which the time does not depend. The columns are tokens of text."
    )
    yield ""
    rows = []
    for name, by_length in found.cells.items():
        cells = [METHODS[name].title]
        for length, of_base in base.items():
            seconds = by_length[length]["seconds by row"]
            cells.append(f"{fmean(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
            cells.append(f"{fmean(seconds) / fmean(of_base['seconds by row']):.2f} x")
        rows.append(cells)
    yield from table(["Method", *(part for length in base for part in (f"{int(length):,}", "the base's"))], rows)

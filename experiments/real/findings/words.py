"""How findings are put into Markdown: headings, tables, claims, numbers with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from peft_pvm.demo.recall import Accuracy

from ...claims import FAILS, HOLDS
from ...markdown import table
from .study import Recorded


Claim = tuple[str, bool, str]  # the claim, whether it holds, and the numbers


def heading(title: str, found: Recorded, counted: str = "rows", split: str | None = None) -> Iterator[str]:
    """The heading of a finding, and the command that measured it.

    Args:
        title: The question.
        found: The finding.
        counted: What its rows are.
        split: Where they come from, if not from the split that it was measured on.
    """
    name, rows = found.about["finding"], found.about["rows"]
    yield f"### {title}"
    yield ""
    command = f"python -m experiments real-findings --base runs/real/base --only {name}"
    yield f"`{command}`: {rows} {counted} of the {split or found.about['split']} split."
    yield ""


def claims_table(claims: Iterable[Claim]) -> list[str]:
    """What the numbers say of some claims."""
    return table(["Claim", "Here", "Numbers"], [[text, HOLDS if holds else FAILS, why] for text, holds, why in claims])


def said(accuracy: Accuracy) -> str:
    """An accuracy with its standard error."""
    return f"{accuracy.value:.3f} ± {accuracy.standard_error:.3f}"


def paired(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """The mean difference of losses of the same rows, and its standard error, unknown without a second row."""
    differences = [loss - other for loss, other in zip(losses, reference)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0 to 2, 5'
    """
    if not numbers:
        return "none"
    ends = [index for index, (one, next_one) in enumerate(pairwise(numbers)) if next_one != one + 1]
    starts = [0, *(end + 1 for end in ends)]
    parts = [(numbers[start], numbers[end]) for start, end in zip(starts, [*ends, len(numbers) - 1])]
    return ", ".join(f"{first} to {last}" if first != last else str(first) for first, last in parts)

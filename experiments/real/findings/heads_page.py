"""In words: which heads DIPE as published hurts."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from ...markdown import table
from .heads import ALL, ALL_BUT, ONE, RANDOM, WORST, worst_first
from .looking import BASE
from .looking_page import NEGLIGIBLE, accuracy_of
from .study import Cell, Cells, Recorded
from .words import Claim, claims_table, heading, paired, said


NAMED = 12  # heads that are listed
FEW = 0.1  # as a share of all heads


def heads_section(found: Recorded) -> Iterator[str]:
    """Which heads does DIPE as published hurt?"""
    cells = found.cells
    alone, base = cells[ONE], cells[BASE]["validation"]["loss by row"]
    worst = worst_first(alone)
    costs = [paired(alone[f"{layer}.{head}"]["loss by row"], base) for layer, head in worst]
    named = [
        f"{layer}.{head} ({cost:+.4f} ± {error:.4f})" for (layer, head), (cost, error) in zip(worst[:NAMED], costs)
    ]
    yield from heading("Which heads does DIPE as published hurt?", found)
    yield (
        f"DIPE acts in one head at a time, without text in between, on {found.about['rows']} rows of the validation "
        f"split, where the digits have a loss of {fmean(base):.3f} nats without it. The loss rises by more than "
        f"{NEGLIGIBLE} nats in {sum(cost > NEGLIGIBLE for cost, _ in costs)} of {len(costs)} heads, and by more than "
        f"twice its standard error in {sum(cost > 2 * error for cost, error in costs)}. It rises most in these, by "
        f"layer and number: {', '.join(named)}."
    )
    yield ""
    yield (
        f"The table is about as many rows of the {found.about['split']} split. There, DIPE acts in several heads: in "
        "those that were worst by themselves, in as many random ones (one draw), or in all but the worst. It shows "
        "the accuracy, and the loss in nats, after so many tokens of text."
    )
    yield ""
    lengths, cases = list(cells[ALL]), (WORST, RANDOM, ALL_BUT)
    counts = sorted(cells[f"{WORST}, {lengths[0]}"], key=int)
    rows = [
        [count, *(_shown(cells[f"{case}, {length}"][count]) for length in lengths for case in cases)]
        for count in counts
    ]
    for name, case in (("none", BASE), ("all", ALL)):
        rows.append([name, *(part for length in lengths for part in (_shown(cells[case][length]), "", ""))])
    yield from table(["Heads", *(f"{case}, {int(length):,}" for length in lengths for case in cases)], rows)
    yield ""
    yield from claims_table(_about_heads(cells, counts, len(worst)))


def _shown(cell: Cell) -> str:
    return f"{said(accuracy_of(cell))} ({fmean(cell['loss by row']):.2f})"


def _about_heads(cells: Cells, counts: list[str], num_heads: int) -> Iterator[Claim]:
    few = max((count for count in counts if int(count) <= FEW * num_heads), key=int)
    half = min((count for count in counts if int(count) >= num_heads / 2), key=int)
    for length in cells[ALL]:
        right, lost = (accuracy_of(cells[case][length]).value for case in (BASE, ALL))
        for heads, case, count in (
            (f"the {few} worst heads", WORST, few),
            ("all other heads", ALL_BUT, few),
            ("the worst half of the heads", WORST, half),
        ):
            left = accuracy_of(cells[f"{case}, {length}"][count]).value
            yield (
                f"After {int(length):,} tokens, DIPE in {heads} costs at least half of what it costs in all",
                right - left >= (right - lost) / 2,
                f"{left:.3f}; in all heads {lost:.3f}, in none {right:.3f}",
            )

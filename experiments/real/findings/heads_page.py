"""In words: which heads DIPE as published hurts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from ...markdown import table
from .heads import ALL, ALL_BUT, ONE, RANDOM, WORST, worst_first
from .looking import BASE
from .looking_page import NEGLIGIBLE, accuracy_of
from .study import Cell, Cells, Recorded
from .words import Claim, claims_table, heading, paired, said


NAMED = 12  # heads that are listed
FEW = 0.1  # of all heads


def heads_section(found: Recorded) -> Iterator[str]:
    """Which heads does DIPE as published hurt?"""
    cells = found.cells
    alone, base = cells[ONE], cells[BASE]["validation"]
    costs = {head: paired(alone[f"{head[0]}.{head[1]}"]["loss by row"], base["loss by row"]) for head in _worst(cells)}
    yield from heading("Which heads does DIPE as published hurt?", found)
    yield (
        f"DIPE acts in one head at a time, without text in between, on {found.about['rows']} rows of the validation "
        f"split. The loss of the digits is then {fmean(base['loss by row']):.4f} nats without DIPE, and more than "
        f"{NEGLIGIBLE} nats higher in {sum(cost > NEGLIGIBLE for cost, _ in costs.values())} of {len(costs)} heads. "
        "The heads that raise it most are, by layer and number: "
        + ", ".join(f"{layer}.{head} ({costs[layer, head][0]:+.3f})" for layer, head in list(costs)[:NAMED])
        + "."
    )
    yield ""
    yield (
        "The table is about the rows of the test split. There, DIPE acts in as many of the heads that were worst by "
        "themselves, in as many random heads, or in all heads but these. It shows accuracy and loss after so many "
        "tokens of text."
    )
    yield ""
    lengths, cases = list(cells[ALL]), (WORST, RANDOM, ALL_BUT)
    counts = list(cells[f"{WORST}, {lengths[0]}"])
    rows = [["none", *(part for n in lengths for part in (_shown(cells[BASE][n]), "", ""))]]
    rows += [
        [f"{count}", *(_shown(cells[f"{case}, {n}"][count]) for n in lengths for case in cases)] for count in counts
    ]
    rows += [["all", *(part for n in lengths for part in (_shown(cells[ALL][n]), "", ""))]]
    yield from table(["Heads", *(f"{case}, {int(n):,}" for n in lengths for case in cases)], rows)
    yield ""
    yield from claims_table(_about_heads(cells, counts))


def _worst(cells: Cells) -> list[tuple[int, int]]:
    return worst_first(cells[ONE])


def _shown(cell: Cell) -> str:
    return f"{said(accuracy_of(cell))} ({fmean(cell['loss by row']):.2f})"


def _about_heads(cells: Cells, counts: list[str]) -> Iterator[Claim]:
    near = next(iter(cells[ALL]))
    right, lost = (accuracy_of(cells[case][near]).value for case in (BASE, ALL))
    heads = _worst(cells)
    few = max((count for count in counts if int(count) <= FEW * len(heads)), key=int)
    only, others, chance = (accuracy_of(cells[f"{case}, {near}"][few]).value for case in (WORST, ALL_BUT, RANDOM))
    yield (
        f"DIPE in a tenth of the heads ({few}), the worst, costs at least half of what all heads cost",
        right - only >= (right - lost) / 2,
        f"after {near} tokens {only:.3f}; random heads {chance:.3f}, all {lost:.3f}, none {right:.3f}",
    )
    yield (
        "Without these heads, DIPE costs at most half of what it costs in all",
        right - others <= (right - lost) / 2,
        f"{others:.3f} in all others",
    )
    half = next(count for count in counts if int(count) >= len(heads) / 2)
    by_half = accuracy_of(cells[f"{WORST}, {near}"][half]).value
    yield (
        f"DIPE in half of the heads ({half}), the worst, costs less than half of what all heads cost",
        right - by_half < (right - lost) / 2,
        f"{by_half:.3f}",
    )
    layers = Counter(layer for layer, _ in heads[: int(few)])
    depth = max(layer for layer, _ in heads) + 1
    late = sum(number for layer, number in layers.items() if layer >= depth / 2)
    yield (
        "Most of these heads are in the second half of the layers",
        late > int(few) / 2,
        f"{late} of {few}; by layer: {', '.join(f'{layer} ({layers[layer]})' for layer in sorted(layers))}",
    )

"""In words: what can be read from the base's residual stream, and what methods change about text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from peft_pvm.demo.mosaic import NUM_CELLS, NUM_DIGITS

from ...markdown import table
from ..methods import METHODS
from .knowing import ALONE, BEHIND_IMAGE, FITTED_ON, LANGUAGE_MODEL, WINDOW
from .study import Cells, Recorded
from .words import Claim, claims_table, heading, paired, ranges


READABLE, UNREADABLE = 0.9, 0.5  # accuracies of a probe
SHOWN = 3  # every third layer, and the last
LARGEST_LOSS = 0.5  # percent of perplexity that counts as nothing lost


def readable_section(found: Recorded) -> Iterator[str]:
    """Where PVM must sit."""
    columns = {
        f"{what}, {image}, {int(length):,} tokens": cell[f"{what} by layer"]
        for image, by_length in found.cells.items()
        for length, cell in by_length.items()
        for what in ("cell", "digit")
    }
    depth = len(next(iter(columns.values())))
    yield from heading("Where must PVM sit?", found)
    yield (
        "A linear probe (logistic regression) reads the output of each decoder layer at the token that predicts a "
        "digit. It predicts which cell is asked for, and which digit is there. It is fitted on "
        f"{FITTED_ON * found.about['rows']} rows of the training split. The table shows its accuracy; chance is "
        f"{1 / NUM_CELLS:.2f} and {1 / NUM_DIGITS:.2f}. "
        '"Hidden" means that no text token can attend to the image.'
    )
    yield ""
    shown = sorted({*range(0, depth, SHOWN), depth - 1})
    rows = [[str(layer), *(f"{accuracies[layer]:.2f}" for accuracies in columns.values())] for layer in shown]
    yield from table(["Layer", *columns], rows)
    yield ""
    yield from claims_table(_about_readable(found.cells))


def _about_readable(cells: Cells) -> Iterator[Claim]:
    sight, hidden = (cells[f"image {image}"]["0"] for image in ("in sight", "hidden"))
    depth = range(len(sight["cell by layer"]))
    unknown = [
        layer for layer in depth if min(sight["cell by layer"][layer], hidden["cell by layer"][layer]) < READABLE
    ]
    told = [layer for layer in depth if sight["digit by layer"][layer] >= UNREADABLE]
    waiting = [layer for layer in depth if layer not in (*unknown, *told)]
    guessed = max(hidden["digit by layer"])
    yield (
        f"With the image hidden, the digit is readable nowhere (below {UNREADABLE})",
        guessed < UNREADABLE,
        f"{guessed:.2f} at best",
    )
    yield (
        f"With the image in sight, there are layers that have the cell (at least {READABLE}) and not yet the digit",
        bool(waiting),
        f"layers {ranges(waiting)}; the digit: layers {ranges(told)}",
    )
    yield (
        "The probe rules layers out for PVM, whose query must know the cell",
        bool(unknown),
        f"not readable after layers: {ranges(unknown)}",
    )


def text_section(found: Recorded) -> Iterator[str]:
    """Whether anything changes on text."""
    cells, base = found.cells, found.cells["base"]
    yield from heading("Does anything change on text?", found, "windows")
    yield (
        f"The table shows the perplexity of windows of {WINDOW:,} tokens of held-out text, alone and after an image, "
        "and its change against the base, ± standard error over windows. With its paper's settings, T-DRS acts on all "
        "pairs of tokens, not only on those with an image. `--adapter` adds adapters, and `--gguf` the language model."
    )
    yield ""
    header = ["", *(part for condition in base for part in (f"text {condition}", "change"))]
    cases = sorted(cells, key=lambda case: (case == LANGUAGE_MODEL, case not in METHODS))  # methods first
    yield from table(header, [_row(case, cells) for case in cases])
    yield ""
    yield from claims_table(_about_text(cells))


def _row(case: str, cells: Cells) -> list[str]:
    row = [_name(case, cells)]
    for condition, reference in cells["base"].items():
        if condition not in cells[case]:
            row += ["", ""]
            continue
        losses = cells[case][condition]["loss"]
        change, error = paired(losses, reference["loss"])
        if case == "base":
            changed = ""
        elif losses == reference["loss"]:
            changed = "none, bit for bit"
        else:
            changed = f"{100 * math.expm1(change):+.2f} ± {100 * math.exp(change) * error:.2f} %"
        row += [f"{math.exp(fmean(losses)):.2f}", changed]
    return row


def _about_text(cells: Cells) -> Iterator[Claim]:
    base = cells["base"]
    others = {case: by for case, by in cells.items() if case not in ("base", LANGUAGE_MODEL)}
    changed = [case for case, by in others.items() if by[ALONE]["loss"] != base[ALONE]["loss"]]
    yield (
        "Without an image, methods and adapters leave text as it is, bit for bit",
        not changed,
        f"all but {', '.join(_name(case, cells) for case in changed)}" if changed else f"all {len(others)}",
    )
    costs = {case: paired(by[BEHIND_IMAGE]["loss"], base[BEHIND_IMAGE]["loss"])[0] for case, by in others.items()}
    dear = [case for case, cost in costs.items() if 100 * math.expm1(cost) > LARGEST_LOSS]
    yield (
        f"After an image, none of them costs text more than {LARGEST_LOSS} % of perplexity",
        not dear,
        "all but " + ", ".join(f"{_name(case, cells)} ({100 * math.expm1(costs[case]):+.1f} %)" for case in dear)
        if dear
        else f"all {len(others)}",
    )
    if LANGUAGE_MODEL in cells:
        gained, error = paired(base[ALONE]["loss"], cells[LANGUAGE_MODEL][ALONE]["loss"])
        yield (
            "Learning to read mosaics cost the language model nothing on text",
            100 * math.expm1(gained) <= LARGEST_LOSS,
            f"the base has {math.exp(gained):.2f} ± {math.exp(gained) * error:.2f} times its perplexity",
        )


def _name(case: str, cells: Cells) -> str:
    """A method's title; an adapter's folder, with its hash only where another has the same name."""
    if case == LANGUAGE_MODEL:
        return "the language model before it saw mosaics"
    if case in METHODS:
        return METHODS[case].title
    folder, *_ = case.rpartition(" (")
    is_only = [other.rpartition(" (")[0] for other in cells].count(folder) == 1
    return f"the adapter `{folder if is_only else case}`"

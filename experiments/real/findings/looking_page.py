"""In words: where the base looks, why DIPE as published hurts it, and whether a limit can be read off it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from statistics import fmean

import torch

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.recall import Accuracy
from peft_pvm.probe.measures import PowerLaw, fit_power_law

from ...markdown import folded, table
from ..methods import METHODS
from .looking import ALL_LAYERS, ALONE, BASE, LAYERS, LIMITED, OTHERS
from .study import Cell, Cells, Recorded
from .words import Claim, claims_table, heading, paired, said


SHORTEST_FADING = 64  # tokens: below, the question is as long as the text
LIKE_1_OVER_T = (0.8, 1.2)  # exponents
LARGEST_ERROR = 0.1  # of an exponent: beyond it, the curve is not one power
NEGLIGIBLE = 0.01  # nats, as for `peft-pvm calibrate`


def heads_of(cell: Cell) -> list[list[float]]:
    """The attention on the image, by layer and head."""
    return [list(map(float, layer.split())) for layer in cell["visual mass by layer"]]


def on_image(cell: Cell) -> list[float]:
    """The attention on the image, by layer, mean over heads."""
    return [fmean(layer) for layer in heads_of(cell)]


def mean_mass(cell: Cell) -> float:
    """The attention on the image, mean over layers and heads."""
    return fmean(on_image(cell))


def on_cell(cell: Cell) -> list[float]:
    """The attention on the cell that is asked for, by layer, mean over heads."""
    return list(map(float, cell["mass on the asked cell by layer"].split()))


def accuracy_of(cell: Cell) -> Accuracy:
    """The accuracy of a cell's rows."""
    return Accuracy(tuple(map(int, cell["right of nine"])), NUM_CELLS)


def fading(cells: Sequence[Cell], masses: Sequence[float]) -> PowerLaw | None:
    """The power law of some attention over the tokens in sight that are not visual.

    Args:
        cells: Of several lengths of text.
        masses: The attention in each of them.
    """
    return fit_power_law([cell["text tokens in sight"] for cell in cells], masses)


def distance(cell: Cell, other: Cell, by_head: bool = False) -> float:
    """How differently two cells look: the mean of |log ratio| of the attention on the image, over layers or heads.

    Args:
        cell: What `look` measured.
        other: The same under other conditions.
        by_head: Compare head by head, not layer by layer.
    """
    ours, theirs = (list(chain(*heads_of(one))) if by_head else on_image(one) for one in (cell, other))
    tiny = 1e-9  # a head may have no attention left
    return fmean(abs(math.log(max(mass, tiny) / max(wanted, tiny))) for mass, wanted in zip(ours, theirs))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation. Equal numbers rank in their order, so that equal pairs agree."""
    ranks = torch.tensor([first, second], dtype=torch.float64).argsort(dim=1, stable=True).argsort(1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def attention_section(found: Recorded) -> Iterator[str]:
    """Does attention fall as 1/t, and do answers follow it?"""
    cells = found.cells
    yield from heading("Does attention fall as 1/t, and do answers follow it?", found)
    yield (
        "The table shows the attention from the tokens that predict the digits, mean over layers and heads: on the "
        "image, and on the cell that is asked for. It also shows the accuracy of the same rows. The columns are "
        "tokens of text between image and question."
    )
    yield ""
    rows = []
    for name, by_length in cells.items():
        at = by_length.values()
        rows.append([f"{METHODS[name].title}: on the image", *(f"{mean_mass(cell):.4f}" for cell in at)])
        rows.append([f"{METHODS[name].title}: on the asked cell", *(f"{fmean(on_cell(cell)):.4f}" for cell in at)])
        rows.append([f"{METHODS[name].title}: accuracy", *(said(accuracy_of(cell)) for cell in at)])
    yield from table(["", *(f"{int(length):,}" for length in cells[BASE])], rows)
    yield ""
    yield (
        "The next table shows the exponent a of attention ~ t^-a, by least squares of the logarithms, ± its standard "
        "error. t is the number of tokens in sight that are not visual; texts have at least "
        f'{SHORTEST_FADING} tokens. "Flatter" means that a is below {LIKE_1_OVER_T[0]}, "steeper" that it is above '
        f"{LIKE_1_OVER_T[1]}."
    )
    yield ""
    yield from table(
        ["", "a of the mean", "layers: flatter", "like 1/t", "steeper", "heads: flatter", "like 1/t", "steeper"],
        [[METHODS[name].title, *_exponents(by_length)] for name, by_length in cells.items()],
    )
    yield ""
    by_layer, by_head = exponents_of(cells[BASE])
    rows = [
        [str(layer), _exponent(fit), *("" if head is None else f"{head.exponent:.1f}" for head in heads)]
        for layer, (fit, heads) in enumerate(zip(by_layer, by_head))
    ]
    header = ["Layer", "a of the mean", *(f"head {head}" for head in range(len(by_head[0])))]
    yield from folded("The base's exponents by layer and head", table(header, rows))
    yield ""
    yield from claims_table(_about_attention(cells))


def far_from(by_length: dict[str, Cell]) -> list[Cell]:
    """The cells with so much text that its length is that of what is in sight."""
    return [cell for length, cell in by_length.items() if int(length) >= SHORTEST_FADING]


def exponents_of(by_length: dict[str, Cell]) -> tuple[list[PowerLaw | None], list[list[PowerLaw | None]]]:
    """How the attention on the image falls, by layer, and by layer and head."""
    far = far_from(by_length)
    by_layer = [fading(far, masses) for masses in zip(*map(on_image, far))]
    by_head = [[fading(far, masses) for masses in zip(*heads)] for heads in zip(*map(heads_of, far))]
    return by_layer, by_head


def _exponents(by_length: dict[str, Cell]) -> list[str]:
    far, (by_layer, by_head) = far_from(by_length), exponents_of(by_length)
    return [_exponent(fading(far, list(map(mean_mass, far)))), *_kinds(by_layer), *_kinds(list(chain(*by_head)))]


def _steps(cells: Sequence[Cell]) -> list[float]:
    """The exponent from each length of text to the next."""
    return [
        math.log(mean_mass(near) / mean_mass(far))
        / math.log(far["text tokens in sight"] / near["text tokens in sight"])
        for near, far in pairwise(cells)
    ]


def _exponent(fit: PowerLaw | None) -> str:
    return "unknown" if fit is None else f"{fit.exponent:.2f} ± {fit.standard_error:.2f}"


def _kinds(fits: Sequence[PowerLaw | None]) -> list[str]:
    low, high = LIKE_1_OVER_T
    exponents = [fit.exponent for fit in fits if fit is not None]
    flatter, steeper = sum(a < low for a in exponents), sum(a > high for a in exponents)
    return list(map(str, (flatter, len(exponents) - flatter - steeper, steeper)))


def _about_attention(cells: Cells) -> Iterator[Claim]:
    base, dipe = cells[BASE], cells["dipe"]
    far = far_from(base)
    fit = fading(far, list(map(mean_mass, far)))
    low, high = LIKE_1_OVER_T
    yield (
        "The base's attention on the image falls like 1/t, by one power of t from end to end",
        fit is not None and low <= fit.exponent <= high and fit.standard_error <= LARGEST_ERROR,
        f"a = {_exponent(fit)}; from each length to the next: {', '.join(f'{a:.2f}' for a in _steps(far))}",
    )
    everything = [cell for by_length in cells.values() for cell in by_length.values()]
    goodness = [-fmean(cell["loss by row"]) for cell in everything]
    by_image, by_cell = (
        rank_correlation([fmean(of(cell)) for cell in everything], goodness) for of in (on_image, on_cell)
    )
    yield (
        "Answers follow attention on the asked cell more closely than attention on the image",
        by_cell > by_image,
        f"rank correlation with the loss of the digits, its sign turned, over all {len(everything)} columns: "
        f"{by_cell:.2f} against {by_image:.2f}",
    )
    length = next(iter(base))
    (more, right), (less, base_right) = ((mean_mass(by[length]), accuracy_of(by[length]).value) for by in (dipe, base))
    yield (
        "More attention on the image means more right answers",
        (more > less) == (right > base_right),
        f"at {length} tokens, DIPE as published has {more:.3f} on the image and an accuracy of {right:.3f}; the base "
        f"has {less:.3f} and {base_right:.3f}",
    )


def dipe_section(found: Recorded) -> Iterator[str]:
    """Why DIPE as published hurts a base that was not trained with it."""
    cells = found.cells
    base, everywhere, limited = (cells[case] for case in (BASE, ALL_LAYERS, LIMITED))
    near, far = base
    yield from heading("Why does DIPE as published hurt a base that was not trained with it?", found)
    yield (
        f"The table has two things for each group of layers. The first is its attention after {near} tokens of text, "
        "in the base → with DIPE as published in all layers. The second is the accuracy after "
        f"{near} and after {int(far):,} tokens, with DIPE only in these layers, and in all others. With a limit, a "
        "query keeps its own distance up to that many tokens after the image."
    )
    yield ""
    rows = []
    for case in cells:
        if case.endswith(ALONE):
            group = case.removeprefix(LAYERS).removesuffix(ALONE)
            first, last = map(int, group.split(" to "))
            looks = [
                " → ".join(f"{fmean(of(by[near])[first : last + 1]):.3f}" for by in (base, everywhere))
                for of in (on_image, on_cell)
            ]
            tests = [cells[case], cells.get(OTHERS + group, {})]
            rows.append(
                [group, *looks, *(said(accuracy_of(by[n])) if by else "" for by in tests for n in (near, far))]
            )
    header = ["Layers", "on the image", "on the asked cell"]
    header += [f"{where}, {int(n):,}" for where in ("alone", "all others") for n in (near, far)]
    yield from table(header, rows)
    yield ""
    named = {"Without DIPE": base, "with DIPE as published in all layers": everywhere, "with a limit of 128": limited}
    yield (
        "; ".join(
            f"{name} {said(accuracy_of(by[near]))} and {said(accuracy_of(by[far]))}" for name, by in named.items()
        )
        + "."
    )
    yield ""
    yield from claims_table(_about_dipe(cells, near, far))


def _about_dipe(cells: Cells, near: str, far: str) -> Iterator[Claim]:
    base, everywhere, limited = (cells[case] for case in (BASE, ALL_LAYERS, LIMITED))
    before, after = on_image(base[near]), on_image(everywhere[near])
    yield (
        f"DIPE as published puts more attention on the image than the base has after {near} tokens",
        fmean(after) > fmean(before),
        f"{fmean(after):.3f} against {fmean(before):.3f}; more in {sum(a > b for a, b in zip(after, before))} of "
        f"{len(before)} layers",
    )
    read, still_read = on_cell(base[near]), on_cell(everywhere[near])
    reading = max(range(len(read)), key=lambda layer: read[layer])
    yield (
        "It takes attention off the asked cell where the base looks at it most",
        still_read[reading] < read[reading],
        f"layer {reading}: {still_read[reading]:.3f} with DIPE, {read[reading]:.3f} without",
    )
    right, lost = (accuracy_of(by[near]).value for by in (base, everywhere))
    alone, left_out = (
        {case: accuracy_of(by[near]).value for case, by in cells.items() if is_one(case)}
        for is_one in (lambda case: case.endswith(ALONE), lambda case: case.startswith(OTHERS))
    )
    worst, best = min(alone, key=lambda case: alone[case]), max(left_out, key=lambda case: left_out[case])
    yield (
        "One group of layers alone costs at least half of what all cost together",
        right - alone[worst] >= (right - lost) / 2,
        f"the worst is {worst}: {alone[worst]:.3f} after {near} tokens, all layers: {lost:.3f}. Leaving one "
        f"group out wins back the most with {best}: {left_out[best]:.3f}",
    )
    same = all(limited[near][key] == base[near][key] for key in ("visual mass by layer", "loss by row"))
    yield f"A limit of 128 changes nothing after {near} tokens", same, "attention and loss are the base's"
    masses = [f"{fmean(on_cell(cell)):.4f}" for cell in (limited[far], base[far], base[near])]
    yield (
        f"After {int(far):,} tokens, the limit keeps more attention on the asked cell than the base has there",
        fmean(on_cell(limited[far])) > fmean(on_cell(base[far])),
        f"{masses[0]} with the limit, {masses[1]} without; the base after {near} tokens has {masses[2]}",
    )


def limit_section(found: Recorded) -> Iterator[str]:
    """Whether the best limit can be read off the model without answers."""
    base = found.cells[BASE]
    near, *lengths = base
    yield from heading("Can the best limit be read off the model without answers?", found)
    yield (
        "We tested this rule: take the limit with which the attention on the image is most like that of the base "
        f"after {near} tokens. The distance between the two is the mean of |log ratio| of the attention on the image, "
        "over layers or over heads. The table also shows the loss of the digits in nats and the accuracy, which need "
        "the answers."
    )
    yield ""
    columns = [f"{what}, {int(n):,}" for what in ("by layer", "by head", "loss", "accuracy") for n in lengths]
    rows = [
        [
            "none" if case == BASE else case,
            *(f"{distance(by[n], base[near], by_head):.2f}" for by_head in (False, True) for n in lengths),
            *(f"{fmean(by[n]['loss by row']):.4f}" for n in lengths),
            *(said(accuracy_of(by[n])) for n in lengths),
        ]
        for case, by in found.cells.items()
    ]
    yield from table(["Limit", *columns], rows)
    yield ""
    yield from claims_table(_about_limit(found.cells, near, lengths))


def _about_limit(cells: Cells, near: str, lengths: Sequence[str]) -> Iterator[Claim]:
    wanted = cells[BASE][near]
    limits = {case: [by[n] for n in lengths] for case, by in cells.items() if case != BASE}
    losses = {case: list(map(fmean, zip(*(cell["loss by row"] for cell in by)))) for case, by in limits.items()}
    best = min(losses, key=lambda case: fmean(losses[case]))
    as_good = [case for case, found in losses.items() if _is_tie(found, losses[best])]
    for kind, by_head in {"layers": False, "heads": True}.items():
        picked = min(limits, key=lambda case: fmean(distance(cell, wanted, by_head) for cell in limits[case]))
        more, error = paired(losses[picked], losses[best])
        yield (
            f"Over {kind}, the rule picks a limit that answers as well as the best",
            picked in as_good,
            f"it picks {picked}, the least loss has {best}: {more:.4f} ± {error:.4f} nats more. Less than "
            f"{NEGLIGIBLE} or a standard error counts as none, so as good are {', '.join(as_good)}",
        )


def _is_tie(losses: Sequence[float], best: Sequence[float]) -> bool:
    more, error = paired(losses, best)
    return more <= max(NEGLIGIBLE, error)


def calibration_section(found: Recorded) -> Iterator[str]:
    """What `peft-pvm calibrate` proposes."""
    (cell,) = found.cells["calibrate"].values()
    yield from heading("What does `peft-pvm calibrate` propose?", found, "chats", "validation")
    yield f"It took {cell['CPU seconds']:,.0f} CPU seconds on one thread, and said:"
    yield ""
    yield f"> {cell['reason']}"
    yield ""
    lengths = list(next(iter(cell["loss"].values())))
    yield from table(
        ["Loss in nats, by tokens of text", *(f"{int(length):,}" for length in lengths)],
        [
            ["no DIPE" if case == BASE else f"limit {case}", *(f"{loss:.4f}" for loss in by_length.values())]
            for case, by_length in cell["loss"].items()
        ],
    )

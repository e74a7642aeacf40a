"""The claims of the papers, and what the results say about each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from peft_pvm.probe.measures import PowerLaw, fit_power_law

from .methods import METHODS
from .runs import MAIN_RECIPE
from .summary import Cell, Entry, Results


FAR = 2048  # bytes: where the claims are tested
NEAR = 256
LARGEST_ERROR = 0.1  # of an exponent that is to be told from another
LATE = 16  # rounds of transcription
# Where PVM is compared with its controls, each under the recipe that is better for it: hidden- and plain- with this.
TRAININGS = {
    "1024": "trained with text of up to 1,024 bytes",
    "1024-long": "trained twice as long, mostly with long text of up to 1,024 bytes",
    "256": "trained with text of up to 256 bytes",
}
SHORTEST_FADING = 64  # bytes: below, the question and the mosaic are as long as the text
HOLDS, FAILS, UNCLEAR, NOT_TESTED = "holds", "does not hold", "inconclusive", "not tested"

# Claims that are tested on the real base too, see real/claims.py.
DECAYS = "Attention to the image falls at least as fast as 1/t (PVM, theorem 3.1)"
BEATS_LORA = "PVM beats LoRA of its size (PVM)"
BEATS_MLP = "PVM beats an MLP branch of its size (PVM)"
GAIN_GROWS = "The gain grows with length (PVM)"
KEEPS_GENERATING = "PVM keeps a long generation right where the base does not (PVM)"
BEATS_LORA_IN_SIGHT = "PVM beats LoRA where the image is never hidden (ours)"
RAW_MEMORY = "A memory of raw visual embeddings beats one of hidden states (PVM)"
COSTS_NOTHING = "DIPE costs no more than one point without text in between (DIPE)"
KEEPS_FLAT = "DIPE keeps accuracy flat to within five points (DIPE)"
BOTH_BEAT_PVM = "PVM + DIPE beats PVM (ours)"
BOTH_BEAT_DIPE = "PVM + DIPE beats DIPE (ours)"


@dataclass(frozen=True)
class Claim:
    """A claim and what the results say about it.

    Attributes:
        text: The claim, with its paper.
        verdict: "holds", "does not hold", "inconclusive" or "not tested".
        numbers: Why.
        setting: Under which it was tested, where there are several.
    """

    text: str
    verdict: str
    numbers: str
    setting: str = ""


def verdict_on(difference: float, standard_error: float, margin: float = 0.0) -> str:
    """Whether a difference is above a margin, below it, or within twice its standard error of it."""
    if abs(difference - margin) <= 2 * standard_error:
        return UNCLEAR
    return HOLDS if difference > margin else FAILS


def verdict_on_decay(fit: PowerLaw) -> str:
    """Whether attention falls as 1/t or faster. A fit so loose that any exponent would do says nothing."""
    if verdict_on(fit.exponent, fit.standard_error, margin=1.0) == FAILS:
        return FAILS
    return HOLDS if fit.standard_error <= LARGEST_ERROR else UNCLEAR


def claims(results: Results) -> list[Claim]:
    """All claims for which there are results."""
    return [
        *_fading(results),
        *_pvm_against_controls(results),
        *_pvm_against_pvm(results),
        *_dipe(results),
        *_tdrs(results),
        *_together(results),
        Claim("What it costs: 4.9 % a token (PVM)", UNCLEAR, "a model of this size says nothing about that"),
    ]


def _fading(results: Results) -> Iterator[Claim]:
    base = results.find("base")
    if base is None:
        return
    lengths = [length for length in base.keys("one mosaic") if length >= SHORTEST_FADING]
    layers = list(zip(*(base.mean_mass(length) for length in lengths)))
    fits = [fit_power_law(lengths, masses) for masses in [[sum(at) / len(at) for at in zip(*layers)], *layers]]
    if any(fit is None for fit in fits):
        return
    mean, *by_layer = [fit for fit in fits if fit is not None]
    exponents = ", ".join(f"{fit.exponent:.2f}" for fit in by_layer)
    numbers = (
        f"attention ~ t^-a over {lengths[0]} to {lengths[-1]:,} bytes: a = {mean.exponent:.2f} ± "
        f"{mean.standard_error:.2f} for the mean over layers; by layer {exponents}"
    )
    yield Claim(DECAYS, verdict_on_decay(mean), numbers)


def _difference(better: Cell, worse: Cell) -> tuple[float, float]:
    return better.mean - worse.mean, math.hypot(better.standard_error, worse.standard_error)


def _compare(
    text: str, better: Entry, worse: Entry, length: int = FAR, margin: float = 0.0, setting: str = ""
) -> Claim:
    ours, theirs = (entry.cell("one mosaic", length) for entry in (better, worse))
    numbers = f"after {length:,} bytes {ours} against {theirs}"
    return Claim(text, verdict_on(*_difference(ours, theirs), margin), numbers, setting)


def _both(results: Results, one: str, other: str, recipe: str = MAIN_RECIPE) -> tuple[Entry, Entry] | None:
    first, second = results.find(one, recipe), results.find(other, recipe)
    return None if first is None or second is None else (first, second)


def _pvm_against_controls(results: Results) -> Iterator[Claim]:
    for name, training in TRAININGS.items():
        pvm = results.find("pvm", f"hidden-{name}")
        tested = [results.find(control, f"plain-{name}") for control in ("lora", "mlp")]
        controls = [entry for entry in tested if entry is not None]
        if pvm is None or not controls:
            continue
        for control in controls:
            text = BEATS_LORA if control.method == "lora" else BEATS_MLP
            yield _compare(text, pvm, control, setting=training)
        gains = []
        for length in (NEAR, FAR):
            cells = [control.cell("one mosaic", length) for control in controls]
            gains.append(_difference(pvm.cell("one mosaic", length), max(cells, key=lambda cell: cell.mean)))
        (near, near_error), (far, far_error) = gains
        verdict = verdict_on(far - near, math.hypot(near_error, far_error))
        numbers = f"over the better control: {near:+.3f} after {NEAR} bytes, {far:+.3f} after {FAR:,}"
        yield Claim(GAIN_GROWS, verdict, numbers, training)
    found = _both(results, "pvm", "base")
    if found is not None:
        ours, base = found
        verdict = verdict_on(*_difference(ours.cell("transcription", LATE), base.cell("transcription", LATE)))
        numbers = "; ".join(
            f"round {number}: {ours.cell('transcription', number)} against {base.cell('transcription', number)}"
            for number in (4, LATE, 28)
        )
        yield Claim(KEEPS_GENERATING, verdict, numbers)
    found = _both(results, "pvm", "lora", "plain-1024")
    if found is not None:
        yield _compare(BEATS_LORA_IN_SIGHT, *found)


def _pvm_against_pvm(results: Results) -> Iterator[Claim]:
    for text, worse in (
        (RAW_MEMORY, "pvm-hidden-states"),
        ("Strided layers beat adjacent ones (PVM)", "pvm-adjacent"),
        ("Strided layers beat late ones (PVM)", "pvm-late"),
        ("A narrow branch beats one twice as wide (PVM)", "pvm-r128"),
    ):
        found = _both(results, "pvm", worse)
        if found is not None:
            yield _compare(text, *found)


def _dipe(results: Results) -> Iterator[Claim]:
    found = _both(results, "dipe", "base")
    if found is None:
        return
    dipe, base = found
    yield _compare(COSTS_NOTHING, dipe, base, length=0, margin=-0.01)
    start, *_, end = dipe.keys("one mosaic")
    near, far = (dipe.cell("one mosaic", length) for length in (start, end))
    numbers = f"{near} after {start} bytes, {far} after {end:,}"
    yield Claim(KEEPS_FLAT, verdict_on(*_difference(far, near), margin=-0.05), numbers)


def helps(title: str) -> str:
    """The claim that T-DRS, or a part of it, is better than nothing."""
    return f"{title} helps (T-DRS)"


def _tdrs(results: Results) -> Iterator[Claim]:
    for name in ("t-drs-sd", "t-drs-dc", "t-drs-re", "t-drs"):
        found = _both(results, name, "base")
        if found is not None:
            yield _compare(helps(METHODS[name].title), *found, length=NEAR)


def _together(results: Results) -> Iterator[Claim]:
    for text, better, worse in (
        (BOTH_BEAT_PVM, "pvm+dipe", "pvm"),
        (BOTH_BEAT_DIPE, "pvm+dipe", "dipe"),
        ("LoRA + PVM beats PVM (ours; it has twice the parameters)", "lora+pvm", "pvm"),
    ):
        found = _both(results, better, worse)
        if found is not None:
            yield _compare(text, *found)

"""The claims of the papers and ours on a real base: what its results say about each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_pvm.folders.data_file import holding

from ..claims import (
    BEATS_LORA,
    BEATS_LORA_IN_SIGHT,
    BEATS_MLP,
    BOTH_BEAT_DIPE,
    BOTH_BEAT_PVM,
    COSTS_NOTHING,
    DECAYS,
    GAIN_GROWS,
    HOLDS,
    KEEPS_FLAT,
    KEEPS_GENERATING,
    NOT_TESTED,
    RAW_MEMORY,
    UNCLEAR,
    Claim,
    helps,
    verdict_on,
    verdict_on_decay,
)
from .findings.looking import BASE
from .findings.looking_page import fading, far_from, mean_mass
from .findings.study import MEASURED_TO_ITS_END, read_finding
from .methods import METHODS, UNTRAINED
from .summary import Entry, Estimate, Results, Term, contrast


LOOK_UP, GENERATION, IN_WORDS = "look-up", "transcription", "in-words"
SEVERAL = ("two-pictures", "three-pictures", "three-turns")
HARDER = ("interfering", *SEVERAL)
NEAR = 1024  # tokens of text
FAR = (4096, 7500)  # tokens of text: where the base is lost
PLACES = (*((LOOK_UP, length) for length in FAR), ("interfering", FAR[0]))  # where methods are compared
LORAS = ("lora", "lora-short", "lora-several")  # of PVM's size
# What was shown in training: PVM by our recipe, and the controls that saw the same kind of chats.
TRAININGS = {
    "trained with one picture": ("pvm", ("lora",)),
    "trained with several pictures and turns": ("pvm-several", ("lora-short", "lora-several")),
    "trained with several pictures and turns, PVM for 800 steps and on twice the tokens": (
        "pvm-several-long",
        ("lora-short", "lora-several"),
    ),
}
LIMITED = "dipe-128"
TDRS = ("t-drs-sd", "t-drs-dc", "t-drs-re", "t-drs-literal", "t-drs-inter", "t-drs")
DIPES = ("dipe", LIMITED, "dipe+lora", "dipe-image+lora")
REMEDIES = (
    LIMITED,
    "dipe-128-image",
    "dipe+lora",
    "dipe-image+lora",
    "pvm",
    "pvm-several",
    "pvm-several-long",
    "pvm+dipe-128",
    "pvm-several+dipe-128-image",
    *LORAS,
    *UNTRAINED,
)
ENOUGH = 0.95


def claims(results: Results) -> list[Claim]:
    """All claims. Those for which there are no results say so."""
    return [
        *_fading(results),
        *_pvm_against_controls(results),
        *_pvm_against_pvm(results),
        *_dipe(results),
        *_tdrs(results),
        *_together(results),
        *_high(results),
        *_no_loss(results),
        *_half_won_back(results),
    ]


def _fading(results: Results) -> Iterator[Claim]:
    path = results.findings / "attention.json"
    if not path.is_file():
        yield Claim(DECAYS, NOT_TESTED, "")
        return
    with holding(path, MEASURED_TO_ITS_END):
        far = far_from(read_finding(path).cells[BASE])
        fit = fading(far, list(map(mean_mass, far)))
    if fit is not None:
        numbers = f"a = {fit.exponent:.2f} ± {fit.standard_error:.2f} for the mean over layers"
        yield Claim(DECAYS, verdict_on_decay(fit), numbers)


def _judge(text: str, estimate: Estimate | None, numbers: str, setting: str, margin: float = 0.0) -> Claim:
    if estimate is None:
        return Claim(text, NOT_TESTED, "", setting)
    return Claim(text, verdict_on(estimate.mean, estimate.standard_error, margin), numbers, setting)


def _best(results: Results, task: str, methods: Sequence[str], length: int) -> Entry:
    """The best of several controls at this length, so that none of them is short of what it can do."""
    entries = [results.find(task, method) for method in methods]
    tested = [entry for entry in entries if entry.accuracies(length)]
    return max(tested, key=lambda entry: entry.mean(length), default=entries[0])


def _compare(
    results: Results,
    text: str,
    better: str,
    others: Sequence[str],
    places: Sequence[tuple[str, int]] = PLACES,
    training: str = "",
) -> Iterator[Claim]:
    """Whether a method beats another, or the best of several, at each of the places."""
    for task, length in places:
        ours, theirs = results.find(task, better), _best(results, task, others, length)
        difference = contrast(Term(1, ours, length), Term(-1, theirs, length))
        numbers = f"{ours.title} {ours.shown(length)}, {theirs.title} {theirs.shown(length)}: {difference}"
        yield _judge(text, difference, numbers, " ".join(filter(None, [_place(task, length), training])))


def _place(task: str, length: int) -> str:
    return f"`{task}` after {length:,} tokens"


def _pvm_against_controls(results: Results) -> Iterator[Claim]:
    for training, (method, controls) in TRAININGS.items():
        places = (*PLACES, *((task, FAR[0]) for task in SEVERAL))
        yield from _compare(results, BEATS_LORA, method, controls, places, training)
    yield from _compare(results, BEATS_MLP, "pvm", ["mlp"])
    pvm = results.find(LOOK_UP, "pvm")
    for far in FAR:
        gains, numbers = [], []
        for weight, length in ((-1, NEAR), (1, far)):
            control = _best(results, LOOK_UP, ("lora", "mlp"), length)
            gains += [Term(weight, pvm, length), Term(-weight, control, length)]
            gain = contrast(Term(1, pvm, length), Term(-1, control, length))
            numbers.append(f"over {control.title} {gain} after {length:,}")
        growth = contrast(*gains)
        yield _judge(GAIN_GROWS, growth, f"{', '.join(numbers)}: {growth}", _place(LOOK_UP, far))
    pvm, base = (results.find(GENERATION, method) for method in ("pvm", "base"))
    length = max(set(pvm.lengths) & set(base.lengths), default=0)
    yield from _compare(results, KEEPS_GENERATING, "pvm", ["base"], [(GENERATION, length)])
    yield from _compare(results, BEATS_LORA_IN_SIGHT, "pvm-plain", ["lora"])


def _pvm_against_pvm(results: Results) -> Iterator[Claim]:
    yield from _compare(results, RAW_MEMORY, "pvm", ["pvm-hidden-states"])
    yield from _compare(
        results, "Strided layers beat those that `peft-pvm layers` proposes (PVM)", "pvm-strided", ["pvm"]
    )


def _dipe(results: Results) -> Iterator[Claim]:
    base = results.find(LOOK_UP, "base")
    for method in DIPES:
        yield _costs_a_point(COSTS_NOTHING, results.find(LOOK_UP, method), base)
    for method in DIPES:
        entry = results.find(LOOK_UP, method)
        far = max(entry.lengths, default=0)
        drop = contrast(Term(1, entry, far), Term(-1, entry, 0)) if far > 0 else None
        numbers = f"{entry.shown(0)} without text, {entry.shown(far)} after {far:,} tokens: {drop}"
        yield _judge(KEEPS_FLAT, drop, numbers, entry.title, margin=-0.05)


def _costs_a_point(text: str, entry: Entry, base: Entry, place: str = "") -> Claim:
    difference = contrast(Term(1, entry, 0), Term(-1, base, 0))
    numbers = f"{entry.shown(0)}, base {base.shown(0)}: {difference}"
    return _judge(text, difference, numbers, f"{entry.title}{place}", margin=-0.01)


def _tdrs(results: Results) -> Iterator[Claim]:
    for method in TDRS:
        yield from _compare(results, helps(METHODS[method].title), method, ["base"], PLACES[:1])


def _together(results: Results) -> Iterator[Claim]:
    yield from _compare(results, BOTH_BEAT_PVM, "pvm+dipe-128", ["pvm"])
    yield from _compare(results, BOTH_BEAT_DIPE, "pvm+dipe-128", [LIMITED])


def _high(results: Results) -> Iterator[Claim]:
    for method, text in (
        (LIMITED, f"DIPE with a limit of 128, untrained, has an accuracy of at least {ENOUGH} (ours)"),
        ("pvm", f"PVM has an accuracy of at least {ENOUGH} (ours)"),
    ):
        for length in FAR:
            entry, lora = results.find(LOOK_UP, method), _best(results, LOOK_UP, LORAS, length)
            accuracy = contrast(Term(1, entry, length))
            error = "" if accuracy is None else f", standard error {accuracy.standard_error:.3f}"
            numbers = f"{entry.shown(length)}{error}; base {results.find(LOOK_UP, 'base').shown(length)}"
            if lora.accuracies(length):
                numbers += f"; {lora.title} {lora.shown(length)}"
            yield _judge(text, accuracy, numbers, _place(LOOK_UP, length), ENOUGH)


def _no_loss(results: Results) -> Iterator[Claim]:
    text = "No method costs more than one point without text in between (ours)"
    base = results.find(LOOK_UP, "base")
    others = [entry for entry in results.on(LOOK_UP) if entry.method != "base"]
    yield from (_costs_a_point(text, entry, base) for entry in others)
    text = "No method costs more than one point where a picture is told in words (ours)"
    base = results.find(IN_WORDS, "base")
    others = [entry for entry in results.on(IN_WORDS) if entry.method != "base"]
    yield from (_costs_a_point(text, entry, base) for entry in others)
    text = "No remedy costs more than one point without text in between, with several pictures or turns (ours)"
    for task in SEVERAL:
        base = results.find(task, "base")
        others = [entry for entry in results.on(task) if entry.method in REMEDIES]
        yield from (_costs_a_point(text, entry, base, f" on `{task}`") for entry in others)


def _half_won_back(results: Results) -> Iterator[Claim]:
    """Whether a method is above the middle of what the base has without text and what it has after the longest."""
    for method in REMEDIES:
        entries = {task: results.find(task, method) for task in HARDER}
        if method not in (LIMITED, "pvm") and not any(entry.runs for entry in entries.values()):
            continue
        for task, entry in entries.items():
            text = f"{entry.title} wins back at least half of what the base loses (ours)"
            yield _half_on(text, f"`{task}`", entry, results.find(task, "base"))


def _half_on(text: str, setting: str, entry: Entry, base: Entry) -> Claim:
    far = max({length for length in entry.lengths if length > 0} & set(base.lengths), default=None)
    if far is None:
        return Claim(text, NOT_TESTED, "", setting)
    loss = contrast(Term(1, base, 0), Term(-1, base, far))
    won = contrast(Term(1, entry, far), Term(-1, base, far))
    above_half = contrast(Term(1, entry, far), Term(-0.5, base, 0), Term(-0.5, base, far))
    if loss is None or won is None:
        return Claim(text, NOT_TESTED, "", setting)
    if verdict_on(loss.mean, loss.standard_error) != HOLDS:
        return Claim(text, UNCLEAR, f"the base loses {loss} up to {far:,} tokens", setting)
    numbers = (
        f"{entry.shown(far)} after {far:,} tokens, where the base falls from {base.shown(0)} to {base.shown(far)}: "
        f"{100 * won.mean / loss.mean:.0f} % won back"
    )
    return _judge(text, above_half, numbers, setting)

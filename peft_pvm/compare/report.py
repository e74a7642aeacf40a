"""A comparison as a folder: its numbers, a Markdown page, an HTML page that needs nothing else, and its picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..folders.replacing import replacing
from ..utils.html import render
from ..utils.text import markdown, markdown_table
from .comparison import TIMED, Comparison, Finding
from .contenders import BASE, METHOD
from .plots import draw_pareto, front
from .statistics import HELPS, HURTS, LEVEL, UNCHANGED, UNCLEAR, fewest_changed


NUMBERS, PICTURE, PAGE, TEXT = "compare.json", "pareto.png", "compare.html", "compare.md"
MISSING, NOTHING_TO_DO = "-", "nothing to do"
CHANGED = "Answers changed"
LATENCY, DETAILS, SETTINGS = "Accuracy against latency", "Every difference", "Settings and machine"  # headings
ALTERNATIVE = "Accuracy of each method against the time of an answer."  # in the picture's place


@dataclass(frozen=True)
class Table:
    """A table of texts, which are neither Markdown nor HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        parts: Paragraphs and tables, in order.
    """

    title: str
    parts: Sequence[str | Table]


def save(comparison: Comparison, folder: str | os.PathLike) -> Path:
    """Write `compare.json`, `compare.md`, `compare.html` and `pareto.png`, all or none.

    The same comparison gives the same bytes.

    Args:
        comparison: What `compare` found.
        folder: Made if it is not there; files of the same name are overwritten.

    Returns:
        The path of the HTML page.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    picture = draw_pareto(comparison)
    files = {
        NUMBERS: _as_json(comparison).encode(),
        TEXT: ("\n".join(as_markdown(comparison, PICTURE)) + "\n").encode(),
        PAGE: as_html(comparison, picture).encode(),
        PICTURE: picture,
    }
    with replacing(folder, entry=NUMBERS) as staged:
        for name, content in files.items():
            (staged / name).write_bytes(content)
    return Path(folder, PAGE)


def _as_json(comparison: Comparison) -> str:
    """A line for each part: with a line for each number, it would be several times as long."""
    parts = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in comparison.to_dict().items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_markdown(comparison: Comparison, picture: str) -> list[str]:
    """The report as lines of Markdown.

    Args:
        comparison: The comparison.
        picture: Where the picture lies, from the page.
    """
    lines = [f"# {markdown(title(comparison))}"]
    for section in sections(comparison):
        lines += ["", f"## {section.title}", *in_markdown(section, picture)]
    return lines


def in_markdown(section: Section, picture: str) -> list[str]:
    """What comes below a section's heading, as lines of Markdown."""
    lines = []
    for part in section.parts:
        if isinstance(part, str):
            lines += ["", markdown(part, limit=2_000)]
        else:
            rows = [[markdown(cell, limit=400) for cell in row] for row in part.rows]
            lines += ["", *markdown_table([markdown(cell) for cell in part.header], rows)]
    return [*lines, "", f"![{ALTERNATIVE}]({picture})"] if section.title == LATENCY else lines


def as_html(comparison: Comparison, picture: bytes) -> str:
    """The report as a page that needs nothing else."""
    return render(
        "compare/report.html",
        title=title(comparison),
        sections=sections(comparison),
        with_picture=LATENCY,
        picture=picture,
        alternative=ALTERNATIVE,
    )


def title(comparison: Comparison) -> str:
    """What the report is called."""
    return f"{comparison.about['model']} on {comparison.about['task']}"


def sections(comparison: Comparison) -> list[Section]:
    """The sections of the report, in whatever format it is written."""
    return [
        Section("What came out", outcome(comparison)),
        Section("Accuracy", [_how(comparison), overview(comparison), _caution(comparison)]),
        Section(LATENCY, _latency(comparison)),
        Section(DETAILS, [_details(comparison)]),
        Section(SETTINGS, [_settings(comparison), _machine(comparison)]),
    ]


def outcome(comparison: Comparison) -> list[str]:
    """Who helps, who hurts, who did neither clearly, and who did nothing, in a sentence each."""
    meanings = {
        HELPS: "Helps",
        HURTS: "Hurts",
        UNCLEAR: "Inconclusive",
        UNCHANGED: "Changed nothing",
    }
    said = []
    for word, meaning in meanings.items():
        by_name: dict[str, list[int]] = {}
        for (name, length), found in comparison.findings.items():
            if name != BASE and found.verdict == word:
                by_name.setdefault(name, []).append(length)
        told = [f"{_called(comparison, name)} {_where(comparison, lengths)}" for name, lengths in by_name.items()]
        if told or word != UNCHANGED:
            said.append(f"{meaning}: {'; '.join(told) or 'none'}.")
    said += [f"{name} has nothing to do: {reason}" for name, reason in comparison.idle.items()]
    return said + [f"{name} refused the model: {reason}" for name, reason in comparison.refused.items()]


def _where(comparison: Comparison, lengths: Sequence[int]) -> str:
    if list(lengths) == comparison.lengths:
        return "at every length"
    return f"at {', '.join(f'{length:,}' for length in lengths)}"


def _called(comparison: Comparison, name: str) -> str:
    kind = comparison.contenders[name]["kind"]
    return name if kind == METHOD else f"{name} ({kind})"


def _how(comparison: Comparison) -> str:
    about, seeds = comparison.about, sorted({seed for seed, _ in comparison.asked})
    limit = f"{about['max_new_tokens']} token{'s' if about['max_new_tokens'] != 1 else ''}"
    return (
        "The table shows accuracy by tokens of text between image and question, with its standard error over "
        f"{comparison.num_questions} questions; seeds {', '.join(map(str, seeds))}. {about['scored']} Answers are "
        f'generated, with at most {limit}. "Helps" or "hurts" means that the difference to the base is significant. '
        "In all other cells, the method cannot be told apart from the base. An answer is changed if its tokens are "
        f"not those of the base's answer ({MISSING}: not recorded). A method that changed none may not have acted."
    )


def overview(comparison: Comparison) -> Table:
    """Accuracies by contender and length, with what can be told of them."""
    rows = []
    for name, cells in comparison.cells.items():
        missing = NOTHING_TO_DO if name in comparison.idle else MISSING
        shown = [
            _cell(comparison.findings[name, length]) if length in cells else missing for length in comparison.lengths
        ]
        time = _number(comparison.slowdown(name, list(cells)), ".2f") if cells else MISSING
        changed = MISSING if name == BASE else _of(comparison.changed(name), len(cells) * len(comparison.asked))
        rows.append([_called(comparison, name), *shown, changed, time])
    return Table(["", *(f"{length:,}" for length in comparison.lengths), CHANGED, "Time of an answer, base = 1"], rows)


def _cell(found: Finding) -> str:
    said = f", {found.verdict}" if found.verdict in (HELPS, HURTS) else ""
    return f"{found.accuracy.shown()}{said}"


def _number(number: float | None, form: str) -> str:
    return MISSING if number is None else format(number, form)


def _of(changed: int | None, answers: int) -> str:
    return MISSING if changed is None else f"{changed} of {answers}"


def _caution(comparison: Comparison) -> str:
    tests = comparison.tests
    least = fewest_changed(tests)
    return (
        f"{tests} differences are tested, each by the exact two-sided sign-flip test over questions, and corrected "
        f"together by Holm's method at {LEVEL}. If the strictest step of this method applies, a difference can only "
        f"be significant if at least {least} of the {comparison.num_questions} answers change, all in one direction. "
        "So a real difference may go unnoticed. A standard error of 0 says that all questions agree, not that no "
        "other question would differ."
    )


def _latency(comparison: Comparison) -> list[str]:
    lengths = comparison.lengths
    whole = [name for name, cells in comparison.cells.items() if cells.keys() >= set(lengths)]
    slowdowns = {name: comparison.slowdown(name, lengths) for name in whole}
    points = {
        name: (slowdown, sum(comparison.accuracies(name, lengths)))
        for name, slowdown in slowdowns.items()
        if slowdown is not None
    }
    return [
        "Higher is more accurate, and farther right is slower. Bars are standard errors over questions. The dotted "
        "line joins the contenders that no other beats in both accuracy and time. The accuracy is the mean over all "
        f"answers. The time is that of an answer as a multiple of the base's, the median over the first {TIMED} "
        "questions of each length, which all contenders answered in turns. On a CPU, it is the CPU time of all "
        "threads; on other devices, it is wall-clock time.",
        f"Over all lengths together, these contenders are: {', '.join(front(points))}.",
    ]


def _details(comparison: Comparison) -> Table:
    header = [
        "",
        "Tokens of text",
        "Minus the base",
        "p",
        "p, Holm",
        "Verdict",
        CHANGED,
        "Time, base = 1",
        "ms a token",
    ]
    rows = [
        [
            _called(comparison, name),
            f"{length:,}",
            found.difference.shown("+.3f"),
            f"{found.p:.2g}",
            f"{found.corrected:.2g}",
            found.verdict,
            _of(found.changed, len(comparison.asked)),
            _number(found.slowdown, ".2f"),
            _number(comparison.cells[name][length].milliseconds_of_a_token, ".3g"),
        ]
        for (name, length), found in comparison.findings.items()
        if name != BASE
    ]
    return Table(header, rows)


def _settings(comparison: Comparison) -> Table:
    rows = [
        [name, ", ".join(f"{field} {value}" for field, value in settings.items() if field != "kind") or "greedy"]
        for name, settings in comparison.contenders.items()
    ]
    return Table(["", "Settings"], rows)


def _machine(comparison: Comparison) -> Table:
    shown = {name: value for name, value in comparison.about.items() if name not in ("scored", "environment")}
    environment = comparison.about["environment"]
    return Table(["Name", "Value"], [[name, str(value)] for name, value in (*shown.items(), *environment.items())])

"""docs/leaderboard.md and its pictures, made from recorded comparisons and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from peft_pvm.compare.comparison import Comparison
from peft_pvm.compare.contenders import BASE
from peft_pvm.compare.plots import draw_pareto
from peft_pvm.compare.report import DETAILS, MISSING, NOTHING_TO_DO, SETTINGS, in_markdown, sections, title
from peft_pvm.compare.statistics import HELPS, HURTS, UNCHANGED, UNCLEAR
from peft_pvm.folders.replacing import write_file
from peft_pvm.utils.text import markdown

from .markdown import folded, table


FOLDED = (DETAILS, SETTINGS)
FIGURES = "figures"


def write_leaderboard(results: str | os.PathLike, docs: str | os.PathLike) -> Path:
    """Write `leaderboard.md` and a picture for each comparison: the same bytes from the same results.

    Args:
        results: Folder of `compare.json` files, each under a name of its own.
        docs: Folder to write to.

    Returns:
        The page.

    Raises:
        FileNotFoundError: There are no results.
        ValueError: A file is none of those.
    """
    comparisons = read_comparisons(results)
    for name, comparison in comparisons.items():
        write_file(Path(docs, FIGURES, picture_of(name)), draw_pareto(comparison))
    page = Path(docs, "leaderboard.md")
    write_file(page, render(comparisons))
    return page


def read_comparisons(folder: str | os.PathLike) -> dict[str, Comparison]:
    """The comparisons in a folder, by the names of their files."""
    found = {path.stem: Comparison.load(path) for path in sorted(Path(folder).glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"There are no results in {folder}. Make some first: peft-pvm compare")
    return found


def picture_of(name: str) -> str:
    """The name of a comparison's picture."""
    return f"leaderboard-{name}.png"


def render(comparisons: Mapping[str, Comparison]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Leaderboard",
        "",
        "Written by `python -m experiments leaderboard` from the JSON in `experiments/results/leaderboard/`; do not "
        "edit. Each file was recorded by one `peft-pvm compare`. [How to compare](how-to/compare.md) says what is "
        "measured, how it is tested, and how to do it on your model.",
        "",
        "Methods run at their defaults: none was tuned for these models and tasks. Where a default suits a model "
        "badly, that shows.",
        "",
        "## What helped and what hurt",
        "",
        "By tokens of text between image and question. At lengths that are not named, the result is inconclusive.",
        "",
        *_verdicts(comparisons),
    ]
    for name, comparison in comparisons.items():
        lines += ["", f"## {markdown(title(comparison))}"]
        for section in sections(comparison):
            written = in_markdown(section, f"{FIGURES}/{picture_of(name)}")
            if section.title in FOLDED:
                lines += ["", *folded(section.title, written[1:])]
            else:
                lines += ["", f"### {section.title}", *written]
    return "\n".join(lines) + "\n"


def _verdicts(comparisons: Mapping[str, Comparison]) -> list[str]:
    """Each contender on each comparison, in a few words."""
    names = list(dict.fromkeys(name for comparison in comparisons.values() for name in comparison.contenders))
    kinds = {name: one.contenders[name]["kind"] for one in comparisons.values() for name in one.contenders}
    rows = [
        [f"{markdown(name)} ({kinds[name]})", *(_verdict(comparison, name) for comparison in comparisons.values())]
        for name in names
        if name != BASE
    ]
    return table(["", *(markdown(title(comparison)) for comparison in comparisons.values())], rows)


def _verdict(comparison: Comparison, name: str) -> str:
    if name not in comparison.contenders:
        return MISSING
    said = [
        f"{word} at {', '.join(f'{length:,}' for length in lengths)}"
        for word in (HELPS, HURTS)
        if (lengths := [length for length in comparison.lengths if _is(comparison, name, length, word)])
    ]
    if name in comparison.refused:
        said.append("refused")
    if name in comparison.idle:
        said.append(NOTHING_TO_DO)
    return "; ".join(said) or (UNCHANGED if comparison.changed(name) == 0 else UNCLEAR)


def _is(comparison: Comparison, name: str, length: int, word: str) -> bool:
    found = comparison.findings.get((name, length))
    return found is not None and found.verdict == word

"""The work of `peft-pvm methods`: a table of the methods, also for the docs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table

from ...methods import METHODS
from ...utils.terminal import Terminal, say
from .models import WORKS, architectures


HEADINGS = {
    "method": "Method",
    "does": "What it does",
    "changes": "What it changes",
    "parameters": "Parameters",
    "kernels": "Attention kernels",
    "models": "Types of models",
    "paper": "Source",
}
# What a method does is shown together with what it changes.
SHOWN = ("method", "changes", "parameters", "kernels", "models", "paper")


def methods(as_json: bool) -> None:
    """Show the methods."""
    if as_json:
        say(json.dumps(rows(), indent=2, ensure_ascii=False))
        return
    table = Table(*(HEADINGS[field].lower() for field in SHOWN), show_lines=True)
    for row in rows():
        shown = {**row, "changes": f"{row['changes']}: {row['does']}"}
        table.add_row(*(shown[field] for field in SHOWN))
    Terminal().print(table)


def rows() -> list[dict[str, str]]:
    """What tables say of each method, by the keys of `HEADINGS`."""
    types = {row["type"] for row in architectures()}

    def works_on(method: str) -> str:
        works = {row["type"] for row in architectures() if row[method].startswith(WORKS)}
        return f"{len(works)} of {len(types)}"

    return [
        {
            "method": method.name,
            "does": method.does,
            "changes": method.changes,
            "parameters": method.parameters,
            "kernels": method.kernels,
            "models": works_on(method.config.method),
            "paper": f"arXiv {method.config.paper}" if method.config.paper else "ours",
        }
        for method in METHODS
    ]


def markdown(fields: Sequence[str], docs: str) -> list[str]:
    """The lines of a table of the docs.

    Args:
        fields: Which columns, of `HEADINGS`.
        docs: The way from the page to the folder `docs`.
    """
    lines = [f"| {' | '.join(HEADINGS[field] for field in fields)} |", "|---" * len(fields) + "|"]
    for method, row in zip(METHODS, rows()):
        number = method.config.paper
        source = f"[arXiv {number}](https://arxiv.org/abs/{number})" if number else "ours"
        name = f"**{method.name}**{f', {method.full_name}' if method.full_name else ''}"
        cells = {**row, "method": name, "paper": f"{source}, [docs]({docs}{method.page})"}
        lines.append(f"| {' | '.join(cells[field] for field in fields)} |")
    return lines

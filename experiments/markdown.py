"""What the report and the adapters' cards are made of: tables, parts that are folded away, machines, addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_pvm.utils.text import markdown_table as table

from .summary import OF_MACHINES


__all__ = ["HOME", "folded", "machines", "one_level_down", "table"]

HOME = (
    "https://github.com/peft-pvm/peft-pvm"  # cards are read on the Hub, where links into the repository lead nowhere
)


def folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Lines that a reader unfolds, on GitHub and, by its extension `md_in_html`, in mkdocs."""
    return ['<details markdown="1">', f"<summary>{summary}</summary>", "", *lines, "", "</details>"]


def one_level_down(lines: Iterable[str]) -> list[str]:
    """The same under a heading: each of their headings one level lower."""
    return [f"#{line}" if line.startswith("#") else line for line in lines]


def machines(environments: Iterable[Mapping[str, str]]) -> list[str]:
    """One line for each machine that results come from."""
    found = {
        ", ".join(f"{name} {environment[name]}" for name in OF_MACHINES if name in environment)
        for environment in environments
    }
    return [f"- Machine: {machine}." for machine in sorted(found)]

"""The numbers of the real base that other pages repeat are those of docs/results.md, which code writes from JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
RESULTS = (REPOSITORY / "docs" / "results.md").read_text()
ROWS = {  # what a row begins with elsewhere, and its title in results.md
    "base": "base",
    "Log-bias": "Log-bias",
    "LoRA": "LoRA",
    "PVM": "PVM",
    "DIPE limited to 128": "DIPE, limit 128",
    "DIPE, limit 128": "DIPE, limit 128",
    "DIPE as published": "DIPE as published + LoRA trained under it",
}
COLUMNS = {  # the task and the length of a column
    "No text": ("look-up", "0"),
    "4,096": ("look-up", "4,096"),
    "7,500": ("look-up", "7,500"),
    "7,500 tokens of text": ("look-up", "7,500"),
    "4,096 that interfere": ("interfering", "4,096"),
    "4,096 tokens of interfering text": ("interfering", "4,096"),
}
NUMBER = r"\d\.\d+"


def table_after(page: str, marker: str) -> list[list[str]]:
    """The cells of the first table after a text, without the line below its header."""
    lines = page[page.index(marker) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[first:end])
    return [header, *rows]


def cell_of_results(title: str, task: str, length: str) -> str:
    base = RESULTS[RESULTS.index("\n## The real language model\n") :]
    header, *rows = table_after(base, f"(`{task}`)")
    (row,) = (row for row in rows if row[0] == title)
    return row[header.index(length)]


@pytest.mark.parametrize(
    ("page", "marker"), [("README.md", "| Accuracy on 12 mosaics"), ("docs/real-model.md", "## What came out")]
)
def test_tables_repeat_the_results(page: str, marker: str):
    (_, *columns), *rows = table_after((REPOSITORY / page).read_text(), marker)
    assert len(rows) > 5
    for name, *cells in rows:
        title = next(title for start, title in ROWS.items() if name.startswith(start))
        for column, cell in zip(columns, cells, strict=True):
            expected = cell_of_results(title, *COLUMNS[column])
            assert re.search(NUMBER, expected), (name, column)
            for said, found in zip(re.findall(NUMBER, cell), re.findall(NUMBER, expected)):
                digits = len(said.partition(".")[2])
                assert abs(float(said) - float(found)) < 0.51 * 10**-digits, (name, column, expected)

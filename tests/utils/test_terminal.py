"""What reaches the terminal: tables that are not cut, and progress where there is no terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table

from peft_pvm.utils import terminal
from peft_pvm.utils.terminal import Bars, Terminal


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_no_cell_is_cut(on_a_terminal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*(["heading"] * 9))
    table.add_row(*(["0123456789"] * 9))
    console = Terminal(file=io.StringIO(), force_terminal=on_a_terminal, no_color=True)
    if on_a_terminal:
        console.width = 80
    console.print(table)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert printed.count("0123456789") == (0 if on_a_terminal else 9)


def test_off_a_terminal_progress_is_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Bars() as bars:
        bars.get_time = lambda: now
        task = bars.add_task("Testing", total=100)
        for _ in range(22):
            now += 0.5
            bars.advance(task)
    assert capsys.readouterr() == (
        "",
        "Testing: 10 of 100, 0:00:05 so far, about 0:00:45 left\n"
        "Testing: 20 of 100, 0:00:10 so far, about 0:00:40 left\n",
    )


def test_off_a_terminal_what_is_tracked_is_told_of_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with Bars() as bars:
        for _ in bars.track(range(3), description="Training"):
            pass
    assert re.findall("[0-9] of 3", capsys.readouterr().err) == ["1 of 3", "2 of 3", "3 of 3"]


def test_progress_without_an_end_says_what_is_being_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with Bars() as bars:
        bars.update(bars.add_task("", total=None), description="loading")
    assert re.fullmatch(r"loading: 0:00:00 so far\n", capsys.readouterr().err)

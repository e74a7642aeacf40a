"""Prints to the terminal. Text of others appears as it is, without any effect on the terminal."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .text import plain


WIDE = 1_000  # columns
SECONDS_BETWEEN_LINES = 5.0


def printable(text: object) -> str:
    r"""Text in which control characters are written out.

    Example:
        >>> print(printable("\x1b[31mred"))
        \x1b[31mred
    """
    return plain(text, limit=None, keep="\n\t")


def say(text: object, err: bool = False) -> None:
    """Print a line.

    Args:
        text: The text.
        err: Print to standard error.
    """
    print(printable(text), file=sys.stderr if err else sys.stdout)


class Terminal(Console):
    """A rich console that takes no markup, so that a path such as `runs[/x]` is printed as it is, and cuts no table.

    Off a terminal, in a file or a pipe, tables are as wide as they need to be.

    Args:
        kwargs: The arguments of `rich.console.Console`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(markup=False, emoji=False, **kwargs)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = WIDE

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """As rich does, of printable text."""
        return super().render_str(printable(text), **kwargs)

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """As rich does, but what is too long for a cell of a table goes on in its next line."""
        for table in objects:
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
        super().print(*objects, **kwargs)


class Bars(Progress):
    """Progress on standard error: bars that leave the screen when done; off a terminal, a line every few seconds."""

    def __init__(self) -> None:
        console = Terminal(stderr=True)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            auto_refresh=console.is_terminal,  # else `track` leaves it to the screen's thread to count
        )
        self._said_at = time.monotonic()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """As rich does."""
        super().update(task_id, **fields)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich does."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if not self.disable or time.monotonic() - self._said_at < SECONDS_BETWEEN_LINES:
            return
        self._said_at = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        parts = [f"{task.description}: " if task.description else ""]
        if task.total is not None:
            parts.append(f"{task.completed:.0f} of {task.total:.0f}, ")
        parts.append(f"{_clock(task.elapsed)} so far")
        if task.time_remaining:
            parts.append(f", about {_clock(task.time_remaining)} left")
        say("".join(parts), err=True)


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0)))

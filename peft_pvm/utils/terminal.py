"""What reaches the terminal: text of others as it stands, without effect on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .text import plain


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
    """A rich console that takes no markup, so that a path such as `runs[/x]` is printed as it is.

    Args:
        kwargs: The arguments of `rich.console.Console`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(markup=False, emoji=False, **kwargs)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """As rich does, of printable text."""
        return super().render_str(printable(text), **kwargs)


def progress_bar() -> Progress:
    """A bar on standard error with count, time spent and time left; it leaves the screen when done."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Terminal(stderr=True),
        transient=True,
    )

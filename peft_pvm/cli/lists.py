"""Options that hold several values between commas."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar


Value = TypeVar("Value")


def separated(option: str, text: str, read: Callable[[str], Value], accepted: str) -> list[Value]:
    """What an option holds between commas.

    Args:
        option: Its name.
        text: What it was given.
        read: Makes a value of each part; raises ValueError if it is none.
        accepted: What parts may be, for the error.

    Raises:
        ValueError: A part is empty, or cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(parts):
        raise ValueError(f"{option} is {text!r}, but must be {accepted}, separated by commas.")
    return values

"""Options that hold several values between commas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import typer


Value = TypeVar("Value")
LARGEST = 10**9


def separated(option: str, text: str, read: Callable[[str], Value], accepted: str) -> list[Value]:
    """What an option holds between commas.

    Args:
        option: Its name.
        text: What it was given.
        read: Makes a value of each part; raises ValueError if it is none.
        accepted: What parts may be, for the error.

    Raises:
        BadParameter: A part is empty, or cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(parts):
        raise typer.BadParameter(f"{text!r} must be {accepted}, separated by commas.", param_hint=[option])
    return values


def whole_number(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """For `separated`: reads whole numbers of a range."""

    def read(part: str) -> int:
        number = int(part)
        if not low <= number <= high:
            raise ValueError(f"{number} is not from {low} to {high}.")
        return number

    return read


def finite_number(part: str) -> float:
    """For `separated`: reads a number."""
    number = float(part)
    if not math.isfinite(number):
        raise ValueError(f"{part} is not finite.")
    return number


def name_among(names: tuple[str, ...]) -> Callable[[str], str]:
    """For `separated`: reads one of some names."""

    def read(part: str) -> str:
        if part not in names:
            raise ValueError(f"{part!r} is none of {names}.")
        return part

    return read

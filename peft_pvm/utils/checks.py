"""Checks of config fields, with one form of message."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from .text import quoted


LARGEST = 65_504  # the largest number of fp16: a larger one would become infinite in a model of that dtype
DEEPEST = 4_096  # more decoder layers than any model has


def check(config: object, name: str, valid: bool, accepted: str) -> None:
    """Raise a ValueError that names the field, its value and what is accepted, unless `valid`."""
    if not valid:
        raise ValueError(f"{type(config).__name__}.{name} is {quoted(getattr(config, name))}, but must be {accepted}.")


def is_int(value: object) -> bool:
    """Whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is an int or float that fits fp16, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_text(value: object, limit: int = 1_000) -> bool:
    """Whether `value` is a string of at most `limit` characters."""
    return isinstance(value, str) and len(value) <= limit


def is_list_of_indices(value: object, limit: int, most: int = 2**31 - 1) -> bool:
    """Whether `value` is a list or tuple of 1 to `limit` integers from 0 to `most`."""
    return (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= limit
        and all(is_int(index) and 0 <= index <= most for index in value)
    )


def layer_list(config: object, other: str) -> list[int]:
    """The field `layers_to_transform`, an index or several, as a sorted list.

    Args:
        config: The config.
        other: What else the field may be, for the message.
    """
    layers = getattr(config, "layers_to_transform")  # noqa: B009  # configs share the field, not a class
    indices = [layers] if isinstance(layers, int) else layers
    valid = is_list_of_indices(indices, DEEPEST, most=DEEPEST - 1)
    check(config, "layers_to_transform", valid, f"{other} or a non-empty list of layer indices from 0 on")
    check(config, "layers_to_transform", len(set(indices)) == len(indices), "a list without repetitions")
    return sorted(indices)


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = False,
    or_none: bool = False,
    among: Collection[str] | None = None,
    valid: Callable[[Any], bool] | None = None,
    accepted: str = "",
) -> Any:
    """A field of a configuration, which `check_settings` checks.

    Args:
        default: Its default.
        help: What it is for, without needing the paper.
        least: It is a number from this on.
        above: It is a number above this.
        most: With `least` or `above`: it is at most this.
        whole: With `least`: it is an integer.
        or_none: With `least` or `above`: it may also be `None`.
        among: It is one of these.
        valid: Whether a value is valid, if none of these says it.
        accepted: What `valid` accepts, for the message.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Config:
        ...     strength: float = setting(1.0, "How much it does.", least=0)
        >>> check_settings(Config(strength=-1.0))
        Traceback (most recent call last):
        ValueError: Config.strength is -1.0, but must be a number from 0 to 65504.
    """
    highest = LARGEST if most is None else most
    is_kind, kind = (is_int, "an integer") if whole else (is_number, "a number")
    kind = f"None or {kind}" if or_none else kind
    if least is not None:
        valid = lambda value: (or_none and value is None) or (is_kind(value) and least <= value <= highest)  # noqa: E731
        accepted = f"{kind} from {least} to {highest}"
    elif above is not None:
        valid = lambda value: (or_none and value is None) or (is_kind(value) and above < value <= highest)  # noqa: E731
        accepted = f"{kind} above {above}" + ("" if most is None else f", at most {most}")
    elif among is not None:
        valid, accepted = lambda value: value in among, f"one of {tuple(among)}"
    return dataclasses.field(default=default, metadata={"help": help, "valid": valid, "accepted": accepted})


def check_settings(config: Any) -> None:
    """Check the fields of a configuration that `setting` made.

    Raises:
        ValueError: A value is not accepted.
    """
    for field in dataclasses.fields(config):
        if field.metadata.get("valid") is not None:
            check(config, field.name, field.metadata["valid"](getattr(config, field.name)), field.metadata["accepted"])

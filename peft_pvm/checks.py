"""Checks of config fields, with one form of message."""

from __future__ import annotations

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


def layer_list(config: object, other: str) -> list[int]:
    """The field `layers_to_transform`, an index or several, as a sorted list.

    Args:
        config: The config.
        other: What else the field may be, for the message.
    """
    layers = getattr(config, "layers_to_transform")  # noqa: B009  # configs share the field, not a class
    indices = [layers] if isinstance(layers, int) else layers
    valid = isinstance(indices, (list, tuple)) and 0 < len(indices) <= DEEPEST
    valid = valid and all(is_int(i) and 0 <= i < DEEPEST for i in indices)
    check(config, "layers_to_transform", valid, f"{other} or a non-empty list of layer indices from 0 on")
    check(config, "layers_to_transform", len(set(indices)) == len(indices), "a list without repetitions")
    return sorted(indices)

"""A vision tower in front of a language model of the common shape."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

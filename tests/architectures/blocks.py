"""Decoder layers of other shapes than the common one."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

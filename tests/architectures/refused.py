"""Models on which no method can work."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

"""Models that read documents."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

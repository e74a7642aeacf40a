"""Models of more than images and text, mixtures of experts, and kin of the core families."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

"""Multi-head latent attention."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

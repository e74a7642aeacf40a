"""Text models of other shapes than one stack of layers with one residual stream; images that come by a Q-Former."""

from __future__ import annotations

from .rows import Architecture


ROWS: dict[str, Architecture] = {}

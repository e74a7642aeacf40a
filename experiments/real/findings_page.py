"""The findings about the real base as a section of docs/real-model.md, made from their JSON and from nothing else."""

from __future__ import annotations

import os


def render_findings(folder: str | os.PathLike) -> str:
    """The section, in Markdown."""
    return "## What is behind it\n"

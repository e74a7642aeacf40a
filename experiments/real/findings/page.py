"""The findings as a section of docs/results.md, made from their JSON and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from peft_pvm.folders.data_file import holding

from ...markdown import machines
from .costs_page import costs_section
from .heads_page import heads_section
from .knowing_page import readable_section, text_section
from .looking_page import attention_section, calibration_section, dipe_section, limit_section
from .study import MEASURED_TO_ITS_END, Recorded, read_finding


SECTIONS: dict[str, Callable[[Recorded], Iterator[str]]] = {
    "attention": attention_section,
    "dipe-layers": dipe_section,
    "dipe-heads": heads_section,
    "limit": limit_section,
    "calibrate": calibration_section,
    "readable": readable_section,
    "text": text_section,
    "costs": costs_section,
}


def render_findings(folder: str | os.PathLike) -> str:
    """The section, in Markdown: the same bytes from the same files. A finding that was not measured is left out.

    Args:
        folder: Folder of the findings.

    Raises:
        ValueError: A file is damaged.
    """
    lines = [
        "## What is behind it",
        "",
        "`python -m experiments real-findings` looks for the reasons behind these numbers. The tables of each finding "
        "are made from a JSON file in `experiments/results/real/findings/`. All findings are only about this base. "
        "Errors of accuracy are standard errors over rows.",
    ]
    environments = []
    for name, section in SECTIONS.items():
        path = Path(folder, f"{name}.json")
        if path.is_file():
            found = read_finding(path)
            with holding(path, MEASURED_TO_ITS_END):
                lines += ["", *section(found)]
                environments.append(found.environment)
    if environments:
        lines += ["", *machines(environments)]
    return "\n".join(lines) + "\n"

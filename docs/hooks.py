"""What mkdocs runs: the pages of methods come into the navigation by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Fill the section "Methods" with the table of all and the pages of docs/methods/, the first three in front."""
    folder = Path(config["docs_dir"])
    first = ["pvm", "dipe", "t-drs"]
    pages = sorted(folder.glob("methods/*.md"))
    pages.sort(key=lambda page: first.index(page.stem) if page.stem in first else len(first))
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"] = ["methods.md", *(page.relative_to(folder).as_posix() for page in pages)]
    return config

"""The work of `peft-pvm models`, and of `peft-pvm inspect` with only `--base`: what works on which models."""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from ...bench.models import pvm_config
from ...methods import METHODS, Method
from ...tuners.active import attached
from ...utils.terminal import Terminal, say
from ...utils.text import listed, plain
from ..refusals import reading
from .loading import without_weights


TABLE = Path(__file__).parents[1] / "architectures.json"  # of the tests; `make generate` writes it
WORKS = "works"
LEADING, OTHERS = METHODS[:3], METHODS[3:]  # what has a column of its own, and what shares one
NOT_TRIED = "can be attached; the first forward checks the rest"


@functools.cache
def architectures() -> list[dict[str, Any]]:
    """The models that are tested: their type, what they are known as, and by method "works" or what a refusal says."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def models(name: str | None, as_json: bool) -> None:
    """Show all models that are tested, or those of a type or name."""
    rows = architectures() if name is None else _named(name)
    if as_json:
        say(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("models", "type", *columns(rows[0]), "kernels", "video", "transformers", show_lines=True)
    for row in rows:
        lists = ", ".join(row["kernels"]), "yes" if row["video"] else "no", ", ".join(row["transformers"])
        table.add_row(row["known_as"], row["type"], *columns(row).values(), *lists)
    Terminal().print(table)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """What a table shows of a row, by heading: each of the first methods, and which of the others work."""
    cells = {method.name: row[method.config.method] for method in LEADING}
    cells = {name: "yes" if cell == WORKS else cell for name, cell in cells.items()}
    working = [method.name for method in OTHERS if row[method.config.method] == WORKS]
    cells["others"] = "yes" if len(working) == len(OTHERS) else ", ".join(working) or "no"
    return cells


def _named(name: str) -> list[dict[str, Any]]:
    """The rows of a type; if there is none, those whose type or name contains it, however it is written."""
    if exact := [row for row in architectures() if row["type"] == name]:
        return exact
    wanted = _letters(name)
    found = [row for row in architectures() if wanted and wanted in _letters(f"{row['type']} {row['known_as']}")]
    if not found:
        known = [row[field] for row in architectures() for field in ("type", "known_as")]
        near = difflib.get_close_matches(name, known)
        raise typer.BadParameter(
            f"No model that is tested has the type {plain(name, 100)!r} or is known by such a name. "
            f"{f'Near to it: {listed(near)}. ' if near else ''}`peft-pvm inspect --base MODEL` asks about any model."
        )
    return found


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def describe_base(base: str, as_json: bool) -> None:
    """Say what works on a base model, of which only the configuration is read.

    Args:
        base: Folder or Hub id.
        as_json: Print JSON.

    Raises:
        OSError: There is none.
        ValueError: It is no model that reads images and writes text.
    """
    with reading("a base model", base):
        model: Any = without_weights(base)
    model_type = model.config.model_type
    row = next((row for row in architectures() if row["type"] == model_type), {})
    with reading("a base model", base):
        found = {method.config.method: _refusal(model, method) for method in METHODS}
    works = {
        method: f"refused: {reason}" if reason else row.get(method, NOT_TRIED) for method, reason in found.items()
    }
    if as_json:
        about = {"base": base, "type": model_type, "known_as": row.get("known_as"), "methods": works}
        say(json.dumps(about, indent=2, ensure_ascii=False))
        return
    table = Table(title=Text(plain(base)), show_header=False)
    table.add_row("type", f"{model_type} ({row['known_as']})" if row else f"{model_type}, which is not tested")
    for said in dict.fromkeys(works.values()):
        table.add_row(", ".join(method.name for method in METHODS if works[method.config.method] == said), said)
    Terminal().print(table)


def _refusal(model: Any, method: Method) -> str | None:
    """Why a method cannot be attached."""
    try:
        with attached(model, pvm_config(model) if method.needs_training else method.config(**method.of_the_model)):
            return None
    except (ValueError, NotImplementedError) as error:
        return str(error)

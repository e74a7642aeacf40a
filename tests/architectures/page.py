"""The table of architectures as docs/models.md and as the file that `peft-pvm models` reads: `make generate`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import transformers as T

from . import ARCHITECTURES, OF_THE_NEWEST, type_of
from .rows import Architecture


REPOSITORY = Path(__file__).parents[2]
JSON = REPOSITORY / "peft_pvm" / "cli" / "architectures.json"
PAGE = REPOSITORY / "docs" / "models.md"
TABLES = re.compile(r"(<!-- models:[^>]*-->\n).*?(<!-- models end -->)", re.DOTALL)
WORKS, REFUSED, HIDDEN_STATES = "works", "refused: ", "works with memory_source='hidden_states'"
METHODS = ("pvm", "dipe", "tdrs")
FLAGS = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}  # eager: all do


def pinned(constraints: str) -> str:
    """The version of transformers that a file of constraints names."""
    return re.search(r"^transformers==(\S+)$", (REPOSITORY / constraints).read_text(), re.MULTILINE)[1]


OLDEST, NEWEST = pinned("constraints-oldest.txt"), pinned("constraints.txt")


def entries() -> list[dict[str, Any]]:
    """What there is to say about each type, and about each of its forms that has a name people know."""
    named = [(type_of(name), row) for name, row in ARCHITECTURES.items() if row.known_as or type_of(name) == name]
    return [_entry(model_type, row) for model_type, row in sorted(named, key=lambda entry: entry[0])]


def _entry(model_type: str, row: Architecture) -> dict[str, Any]:
    reasons = {method: row.refusal(method) for method in METHODS}
    says = {method: f"{REFUSED}{reason}" if reason else WORKS for method, reason in reasons.items()}
    if reasons["pvm"] and not row.refusal("pvm-hidden-states"):
        says["pvm"] = HIDDEN_STATES
    model_cls = getattr(T, row.tiny.model_class)
    parts = [module for module in row.tiny.build_anyway().modules() if isinstance(module, T.PreTrainedModel)]
    takes = {*inspect.signature(model_cls.forward).parameters, *dir(model_cls)}
    versions = [NEWEST] if model_type in OF_THE_NEWEST else [OLDEST, NEWEST]
    return {
        "type": model_type,
        "known_as": row.known_as or model_type,
        **says,
        "kernels": [kernel for kernel, flag in FLAGS.items() if all(getattr(part, flag) for part in parts)],
        "video": not takes.isdisjoint({"pixel_values_videos", "get_video_features"}),
        "transformers": [version for version in versions if not row.tiny.broken or version != row.tiny.broken[0]],
    }


def as_json() -> str:
    """The file that the command line reads."""
    return "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries()) + "\n]\n"


def with_tables(page: str) -> str:
    """docs/models.md with the tables as they are now."""
    rows = entries()
    refused = [row for row in rows if row["pvm"].startswith(REFUSED) and row["pvm"] == row["dipe"] == row["tdrs"]]
    types = {row["type"] for row in rows}
    pvm, dipe, tdrs = (len({row["type"] for row in rows if not row[method].startswith(REFUSED)}) for method in METHODS)
    lines = [
        f"Of {len(types)} types, PVM works on {pvm}, DIPE on {dipe} and T-DRS on {tdrs}.",
        "",
        "| Models | Type | PVM | DIPE | T-DRS | Kernels | Video | transformers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows if row not in refused]
    lines += ["", "No method works on these, for the reason given:", "", "| Models | Type | Why |", "|---|---|---|"]
    lines += [f"| {row['known_as']} | `{row['type']}` | {row['pvm'].removeprefix(REFUSED)} |" for row in refused]
    return TABLES.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


def _line(row: dict[str, Any]) -> str:
    cells = {WORKS: "yes", HIDDEN_STATES: '`memory_source="hidden_states"`'}
    works = [cells.get(row[method], row[method]) for method in METHODS]
    kernels, versions = ", ".join(row["kernels"]), ", ".join(row["transformers"])
    cells = [row["known_as"], f"`{row['type']}`", *works, kernels, "yes" if row["video"] else "no", versions]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    JSON.write_text(as_json())
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(JSON, PAGE, sep="\n")

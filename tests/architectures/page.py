"""The table of architectures as docs/models.md and as the file that `peft-pvm models` reads; the tables of methods.

`make generate` writes them.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import transformers as T

from peft_pvm.cli.work import methods, models
from peft_pvm.methods import METHODS as PACKAGED

from . import ARCHITECTURES, OF_THE_NEWEST, type_of
from .rows import Architecture


REPOSITORY = Path(__file__).parents[2]
JSON = REPOSITORY / "peft_pvm" / "cli" / "architectures.json"
PAGE = REPOSITORY / "docs" / "models.md"
TABLES = re.compile(r"(<!-- models:[^>]*-->\n).*?(<!-- models end -->)", re.DOTALL)
WORKS, REFUSED, HIDDEN_STATES = "works", "refused: ", "works with memory_source='hidden_states'"
METHODS = tuple(method.config.method for method in PACKAGED)
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
    refused = [row for row in rows if all(row[method].startswith(REFUSED) for method in METHODS)]
    types = {row["type"] for row in rows}
    works = {name: {row["type"] for row in rows if not row[name].startswith(REFUSED)} for name in METHODS}
    first, *others = (f"{method.name}{{}} on {len(works[method.config.method])}" for method in PACKAGED)
    numbers = ", ".join([first.format(" works"), *(other.format("") for other in others)])
    names = list(models.columns(rows[0]))
    lines = [
        f"Of {len(types)} types, {numbers}.",
        "",
        f"| Models | Type | {' | '.join(names)} | Kernels | Video | transformers |",
        f"|---|---|{'---|' * len(names)}---|---|---|",
    ]
    lines += [_line(row) for row in rows if row not in refused]
    lines += ["", "No method works on these, for the reason given:", "", "| Models | Type | Why |", "|---|---|---|"]
    lines += [f"| {row['known_as']} | `{row['type']}` | {_reasons(row)} |" for row in refused]
    return TABLES.sub(lambda found: "\n".join([found[1], *lines, "", found[2]]), page)


def _reasons(row: dict[str, Any]) -> str:
    return "; ".join(dict.fromkeys(row[method].removeprefix(REFUSED) for method in METHODS))


def _line(row: dict[str, Any]) -> str:
    works = [cell.replace(HIDDEN_STATES, '`memory_source="hidden_states"`') for cell in models.columns(row).values()]
    kernels, versions = ", ".join(row["kernels"]), ", ".join(row["transformers"])
    cells = [row["known_as"], f"`{row['type']}`", *works, kernels, "yes" if row["video"] else "no", versions]
    return f"| {' | '.join(cells)} |"


OF_METHODS = re.compile(r"(<!-- methods:[^>]*-->\n).*?(<!-- methods end -->)", re.DOTALL)
# By page: the columns of its table of methods, and the way from there to docs/.
PAGES_WITH_METHODS = {
    "README.md": (("method", "does", "parameters", "paper"), "docs/"),
    "docs/methods.md": (("method", "does", "changes", "parameters", "kernels", "models", "paper"), ""),
}


def with_methods(page: str) -> str:
    """A page with the table of methods as it is now.

    Args:
        page: Its path in the repository.
    """
    lines = "\n".join(methods.markdown(*PAGES_WITH_METHODS[page]))
    return OF_METHODS.sub(lambda found: f"{found[1]}\n{lines}\n\n{found[2]}", (REPOSITORY / page).read_text())


if __name__ == "__main__":
    JSON.write_text(as_json())
    PAGE.write_text(with_tables(PAGE.read_text()))
    models.architectures.cache_clear()
    for page in PAGES_WITH_METHODS:
        (REPOSITORY / page).write_text(with_methods(page))
    print(JSON, PAGE, *PAGES_WITH_METHODS, sep="\n")

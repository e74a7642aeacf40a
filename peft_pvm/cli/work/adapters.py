"""The work of `peft-pvm inspect`, `merge`, `convert`, `export-reference`, `export-vllm`, `card` and `push`."""

from __future__ import annotations

import json
import shlex
from itertools import chain
from pathlib import Path
from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from ...folders.adapter_file import read_config
from ...folders.inspection import Inspection, inspect_adapter
from ...folders.sharing import push_adapter
from ...folders.writing import write_card
from ...integrations.vllm import export_vllm as write_for_vllm
from ...integrations.vllm import serve_arguments, serve_environment
from ...methods.pvm.checkpoints import convert_reference_checkpoint, export_reference_checkpoint, merge_adapters
from ...tuners.names import separate
from ...utils.terminal import Terminal, say
from ...utils.text import plain, quoted
from ..refusals import reading


def inspect(adapter: str, base: str | None, as_json: bool) -> None:
    """Show an adapter, and whether it fits a base model; exit with 1 if it does not."""
    with reading("an adapter", adapter):
        found = inspect_adapter(adapter)
    if base is not None:
        with reading("a base model", base):
            found = inspect_adapter(adapter, base)
    if as_json:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        Terminal().print(_table(adapter, found))
    if found.misfit is not None:
        raise typer.Exit(1)


def merge(adapters: list[str], weights: list[float], out: Path, **options: Any) -> None:
    """Make one PVM adapter of several, with the options of `merge_adapters`."""
    with reading("an adapter of PVM", *adapters):
        say(merge_adapters(adapters, weights, out, **options))


def convert(source: str, out: Path, with_base: Path | None) -> None:
    """Make an adapter of a checkpoint of the authors' code, and if asked the model without it."""
    with reading("a checkpoint of the authors' PVM code", source):
        say(convert_reference_checkpoint(source, out, with_base))
    if with_base is None:
        note = (
            "The checkpoint also holds the base model. If it was trained along (the paper's second stage), the "
            "adapter belongs on that, not on the published base: --with-base FOLDER writes it."
        )
        say(note, err=True)


def export_reference(adapter: str, base: str, out: Path) -> None:
    """Make a checkpoint for the authors' code."""
    with reading("an adapter and its base model", adapter, base):
        say(export_reference_checkpoint(adapter, base, out))


def export_vllm(base: str, adapters: list[str], out: Path, accept_causal: bool, by_request: bool) -> None:
    """Make a folder that `vllm serve` takes, and say how."""
    with reading("a base model and its adapters", base, *chain.from_iterable(map(separate, adapters))):
        folder = write_for_vllm(base, adapters, out, accept_causal, by_request)
    say(folder)
    command = [f"{name}={value}" for name, value in serve_environment(folder).items()] + ["vllm", "serve"]
    say(f"To serve it: {shlex.join([*command, *serve_arguments(folder)])}", err=True)


def card(folder: Path) -> None:
    """Write an adapter's model card again."""
    with reading("an adapter", folder):
        write_card(read_config(folder), folder)
    say(folder / "README.md")


def push(folder: Path, repo_id: str, **options: Any) -> None:
    """Send an adapter to the Hub, with the options of `push_adapter`."""
    with reading("an adapter", folder):
        say(push_adapter(folder, repo_id, **options))


def _table(adapter: str, found: Inspection) -> Table:
    config = found.config
    rows = {
        "method": found.method,
        "parameters": f"{found.parameters:,} ({found.num_bytes / 2**20:.2f} MiB, {', '.join(found.dtypes) or 'none'})",
        "layers": quoted(config.get("layers_to_transform", "all")),
        "trained on": config.get("base_model_name_or_path", "not said"),
    }
    if found.gates:
        rows["r"] = config["r"]
        rows["memory"] = f"{config['memory_source']}, {config['memory_visibility']}"
        rows["lineage"] = config.get("lineage", "not known")
    for number, by_layer in enumerate(found.gates):
        title = "gates" if len(found.gates) == 1 else f"gates of branch {number}"
        rows[title] = ", ".join(f"layer {layer_idx}: {gate:.4g}" for layer_idx, gate in by_layer.items())
    if found.trained_with:
        rows["trained with"] = "; ".join(f"{other}: {other.settings}" for other in found.trained_with)
    if found.base is not None:
        rows[f"fits {found.base}"] = "yes" if found.misfit is None else f"no: {' '.join(found.misfit.split())}"
    table = Table(title=Text(plain(adapter)), show_header=False)
    for name, value in rows.items():
        table.add_row(Text(plain(name)), Text(plain(value)))  # Text, in which brackets are no markup
    return table

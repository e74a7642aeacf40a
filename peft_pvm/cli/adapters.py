"""`peft-pvm inspect`, `merge`, `convert`, `export-reference`, `export-vllm`, `card`: adapters as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table
from rich.text import Text

from ..folders.adapter_file import Inspection, inspect_adapter, read_config
from ..folders.writing import write_card
from ..integrations.vllm import export_vllm as write_for_vllm
from ..methods.pvm.checkpoints import convert_reference_checkpoint, export_reference_checkpoint, merge_adapters
from ..methods.pvm.merging import CombinationType
from ..utils.terminal import Terminal, say
from ..utils.text import plain, quoted
from .models import describe_base
from .options import finite_number, new_folder, one_of, separated
from .refusals import reading


Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")]
COMBINATIONS = get_args(CombinationType)


def inspect(
    adapter: Annotated[str | None, typer.Argument(help="Folder or Hub id of an adapter.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a base model. Does the adapter fit it? Alone: which methods work?"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an adapter is, and whether it fits a base model; or which methods work on a base model.

    An adapter is shown with its method, sizes, layers, gates and lineage. Only the configuration of a base model is
    read.
    """
    if adapter is None:
        if base is None:
            raise typer.BadParameter("Give an adapter, or the base model to be asked about.", param_hint=["--base"])
        describe_base(base, as_json)
        return
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


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids of PVM adapters.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder of the new adapter.")],
    weights: Annotated[
        str, typer.Option(help="One for each, with commas: 0.7,0.3. By default equal, adding up to 1.")
    ] = "",
    combination_type: Annotated[
        str, typer.Option(callback=one_of(COMBINATIONS), help=f"One of {', '.join(COMBINATIONS)}.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of ties and dare_linear: the share that is kept.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Average adapters that are not known to be of one lineage.")] = False,
) -> None:
    """Make one PVM adapter of several, without a base model."""
    if density is not None and combination_type not in ("ties", "dare_linear"):
        raise typer.BadParameter(f"{combination_type} keeps all, so it takes no density.", param_hint=["--density"])
    if force and combination_type == "cat":
        raise typer.BadParameter("cat does not average, so there is nothing to force.", param_hint=["--force"])
    numbers = [1 / len(adapters)] * len(adapters)
    if weights:
        numbers = separated("--weights", weights, finite_number, "numbers")
    options = {"combination_type": combination_type, "density": density, "force": force}
    with reading("an adapter of PVM", *adapters):
        say(merge_adapters(adapters, numbers, out, **options))


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint of the authors' PVM code.")],
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the adapter.")],
    with_base: Annotated[
        Path | None, typer.Option(callback=new_folder, help="Folder for the model without the branch.")
    ] = None,
) -> None:
    """Make an adapter of a checkpoint of the authors' PVM code."""
    with reading("a checkpoint of the authors' PVM code", source):
        say(convert_reference_checkpoint(source, out, with_base))
    if with_base is None:
        note = (
            "The checkpoint also holds the base model. If it was trained along (the paper's second stage), the "
            "adapter belongs on that, not on the published base: --with-base FOLDER writes it."
        )
        say(note, err=True)


def export_reference(
    adapter: Adapter,
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the checkpoint.")],
) -> None:
    """Make a checkpoint for the authors' PVM code of an adapter and its base model."""
    with reading("an adapter and its base model", adapter, base):
        say(export_reference_checkpoint(adapter, base, out))


def export_vllm(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model, a Qwen3-VL.")],
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids: one of PVM, one of DIPE, or both.")],
    out: Annotated[Path, typer.Argument(callback=new_folder, help="Folder for the model.")],
    accept_causal: Annotated[
        bool, typer.Option(help="Let a token see the images before it, though the adapter says all of its sample.")
    ] = False,
) -> None:
    """Make a folder of a base model and adapters that `vllm serve` takes."""
    with reading("a base model and its adapters", base, *adapters):
        say(write_for_vllm(base, adapters, out, accept_causal))


def card(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of an adapter.")],
) -> None:
    """Write an adapter's model card again, with what its results.json holds."""
    with reading("an adapter", folder):
        write_card(read_config(folder), folder)
    say(folder / "README.md")


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

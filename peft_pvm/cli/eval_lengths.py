"""`peft-pvm eval-lengths`: tasks of lmms-eval with ever more text between image and question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..integrations.lmms_eval import report, tasks_folder
from ..plotting import as_png
from ..replacing import write_file
from .lists import separated
from .refusals import refusals


NAME = "by_length"


def eval_lengths(
    model: Annotated[str, typer.Option(help="Of lmms-eval: qwen3_vl, qwen2_5_vl or llava_hf.")],
    model_args: Annotated[str, typer.Option(help="Of that model, such as pretrained=Qwen/Qwen3-VL-8B-Instruct.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lmms-eval, separated by commas.")],
    out: Annotated[Path, typer.Option(help=f"Folder for {NAME}.json and {NAME}.png.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of text between image and question, separated by commas.")
    ] = "0,1024,4096,8192,16384,32768",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Folder or Hub id, or several with + between, which act together. Repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of sampling, separated by commas; each is a run.")] = "0",
    include_path: Annotated[
        str | None, typer.Option(help="Folder of further tasks; by default those of this package, such as pvm_paper.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, for a try.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 1,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Changes to the tasks' generation settings.")] = None,
) -> None:
    """Evaluate a model with lmms-eval, alone and with adapters, after ever more text between image and question."""
    with refusals():
        names = separated("--tasks", tasks, str, "names of tasks or groups")
        tokens = separated("--lengths", lengths, int, "whole numbers of tokens, such as 0,1024")
        draws = separated("--seeds", seeds, int, "whole numbers")
    try:
        from ..integrations.lmms_eval.lengths import evaluate_lengths
    except ImportError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error

    def write(result: dict[str, Any]) -> None:
        write_file(out / f"{NAME}.json", json.dumps(result, indent=1) + "\n")

    with refusals():
        out.mkdir(parents=True, exist_ok=True)
        result = evaluate_lengths(
            model,
            model_args,
            names,
            tokens,
            adapter or [],
            draws,
            include_path or tasks_folder(),
            limit,
            batch_size,
            device,
            gen_kwargs,
            lambda text: typer.echo(text, err=True),
            write,
        )
    if not result["scores"]:  # another process than the first writes nothing
        return
    console = Console()
    for table in report.tables(result):
        console.print(table)
    write_file(out / f"{NAME}.png", as_png(report.draw(result)))

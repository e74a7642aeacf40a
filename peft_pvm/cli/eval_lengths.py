"""`peft-pvm eval-lengths`: tasks of lmms-eval with ever more text between image and question."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..data_file import write_json
from ..extras import require
from ..integrations.lmms_eval import report, tasks_folder
from ..plotting import as_png
from ..replacing import write_file
from ..terminal import Terminal, say
from .lists import separated, whole_number
from .options import LARGEST_SEED, MANY, check_device, new_folder


NAME = "by_length"


def eval_lengths(
    model: Annotated[str, typer.Option(help="Of lmms-eval: qwen3_vl, qwen2_5_vl or llava_hf.")],
    model_args: Annotated[str, typer.Option(help="Of that model, such as pretrained=Qwen/Qwen3-VL-8B-Instruct.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lmms-eval, separated by commas.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help=f"Folder for {NAME}.json and {NAME}.png.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of text between image and question, separated by commas.")
    ] = "0,1024,4096,8192,16384,32768",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Folder or Hub id, or several with + between, which act together. Repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of sampling, separated by commas; each is a run.")] = "0",
    include_path: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of further tasks; by default those of this package, such as pvm_paper.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=MANY, help="Documents of each task, for a try.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MANY, help="Documents at a time.")] = 1,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Changes to the tasks' generation settings.")] = None,
) -> None:
    """Evaluate a model with lmms-eval, alone and with adapters, after ever more text between image and question."""
    names = separated("--tasks", tasks, str, "names of tasks or groups")
    tokens = separated("--lengths", lengths, whole_number(0), "whole numbers of tokens, such as 0,1024")
    draws = separated("--seeds", seeds, whole_number(0, LARGEST_SEED), "whole numbers from 0 on")
    if device is not None:
        check_device(device)
    require("lab", "matplotlib")  # for the picture, at the end
    from ..integrations.lmms_eval.lengths import evaluate_lengths  # here: it needs the extra `eval`

    out.mkdir(parents=True, exist_ok=True)
    result = evaluate_lengths(
        model,
        model_args,
        names,
        tokens,
        adapter or [],
        draws,
        tasks_folder() if include_path is None else os.fspath(include_path),
        limit,
        batch_size,
        device,
        gen_kwargs,
        lambda text: say(text, err=True),
        lambda result: write_json(out / f"{NAME}.json", result),
    )
    if not result["scores"]:  # another process than the first writes nothing
        return
    write_file(out / f"{NAME}.png", as_png(report.draw(result)))
    for table in report.tables(result):
        Terminal().print(table)

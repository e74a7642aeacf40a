"""`peft-pvm compare`: a model with each method side by side, on the lab's questions or on those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.extras import require
from .choices import UNTRAINED
from .options import (
    LARGEST_SEED,
    MANY,
    REAL,
    REAL_BASE,
    TINY,
    Device,
    DType,
    Kernel,
    ModelOptions,
    counted,
    name_among,
    new_folder,
    separated,
    there,
    whole_number,
)


ALL = "all"
Model = Annotated[
    str,
    typer.Option(
        help=f"Folder or Hub id of a vision-language model; `{TINY}` and `{REAL}` are the lab's, the latter in "
        f"{REAL_BASE}.",
        callback=there("a model that reads images"),
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        callback=new_folder, help="Folder for the report. If it holds answers already, the comparison continues there."
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        help="`mosaic` or `transcription`, the lab's tasks; a JSON Lines file of `image`, `question` and `answer`; or "
        "the folder or Hub id of a data set with these columns, or with chats as for training."
    ),
]
Methods = Annotated[str, typer.Option(help=f"`{ALL}`, or some of {', '.join(UNTRAINED)}, separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Tokens of text between image and question, separated by commas.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder or Hub id of an adapter, or several joined by +, which act together. Repeatable.",
        callback=there("an adapter"),
    ),
]
Seeds = Annotated[
    str,
    typer.Option(help="Seeds, separated by commas. Each draws other texts and, in the lab's tasks, other questions."),
]
MaxNewTokens = Annotated[
    int | None, counted("The most tokens of an answer; by default, 16 more than the longest right answer has.")
]


def compare(
    model: Model,
    out: Out,
    task: TaskName = "mosaic",
    methods: Methods = ALL,
    lengths: Lengths = "0,256,1024",
    adapter: Adapters = None,
    rows: Annotated[int, counted("Questions for each seed.")] = 32,
    seeds: Seeds = "0",
    split: Annotated[str, typer.Option(help="The split of the data set.")] = "train",
    max_new_tokens: MaxNewTokens = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
) -> None:
    """Compare methods and adapters on your model: all answer the same questions, beside a few controls."""
    require("lab", "jinja2", "matplotlib", "PIL", "sklearn")
    names = None
    if methods != ALL:
        accepted = (
            f"{ALL}, or methods without training ({', '.join(UNTRAINED)}; a trained adapter is given with --adapter)"
        )
        names = separated("--methods", methods, name_among(UNTRAINED), accepted)
    tokens = separated("--lengths", lengths, whole_number(0, MANY), "whole numbers of tokens, such as 0,1024")
    draws = separated("--seeds", seeds, whole_number(0, LARGEST_SEED), "whole numbers from 0 on")
    from .work import comparing as work

    of_model = ModelOptions(model, device, dtype, attn_implementation)
    asked = work.Asked(task, rows, split)
    plan = work.Plan(tuple(sorted(set(tokens))), tuple(dict.fromkeys(draws)), max_new_tokens)
    work.compare(of_model, asked, names, adapter or [], plan, out)

"""`peft-pvm lab`: the demo, and the tiny model and its task for trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..utils.extras import require
from .choices import Split
from .options import LARGEST_SEED, MANY, new_folder, there
from .refusals import Commands


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Work with the lab's tiny model, which forgets its image after some text.",
)

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything that is drawn at random.")]
Rows = Annotated[int, typer.Option(min=1, max=MANY, help="Rows of nine questions at every length.")]


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(callback=new_folder, help="Folder for the adapter; by default a temporary one."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps of the adapter's training.")] = 1000,
    rows: Rows = 16,
    seed: Seed = 0,
) -> None:
    """Train a PVM adapter on the shipped tiny model and show what each method changes."""
    require("lab", "sklearn")
    from .work import lab as work

    work.run_demo(out, steps, rows, seed)


@app.command("recall")
def recall_command(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders or Hub ids of adapters. Adapters joined by + act together.", callback=there("an adapter")
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a tiny model that was trained further, or of the real base; `real` is runs/real/base, "
            "where make real-base puts it. By default the shipped tiny model."
        ),
    ] = None,
    rows: Rows = 16,
    seed: Seed = 0,
) -> None:
    """Test the lab's model, alone and with each adapter, on questions after longer and longer texts."""
    require("lab", "sklearn")
    from .work import lab as work

    work.recall(adapters or [], base, rows, seed)


@app.command("save-base")
def save_base(out: Annotated[Path, typer.Argument(callback=new_folder, help="The folder to write to.")]) -> None:
    """Write the tiny model to a folder, with tokenizer, image processor and chat template, for use in trainers."""
    from .work import lab as work

    work.save_base(out)


@app.command()
def chats(
    out: Annotated[
        Path,
        typer.Argument(callback=new_folder, help="Folder for the data set; `datasets.load_dataset` reads it."),
    ],
    form: Annotated[
        Literal["messages", "prompts"], typer.Option(help="`messages` for SFT, `prompts` for GRPO.")
    ] = "messages",
    rows: Annotated[int, typer.Option(min=1, max=MANY, help="Chats with one image each.")] = 1000,
    max_length: Annotated[
        int, typer.Option(min=0, max=MANY, help="Bytes of text before the first question, at most.")
    ] = 1024,
    split: Annotated[Split, typer.Option(help="The part of the data that digits and text come from.")] = "train",
    seed: Seed = 0,
) -> None:
    """Write questions on mosaics as a data set of chats with images."""
    require("train", "datasets", "PIL")
    from .work import lab as work

    work.chats(out, form, rows, max_length, split, seed)

"""`peft-pvm lab`: the demo, and the tiny model and its task for trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from transformers import LlavaForConditionalGeneration

from ..demo.for_trainers import save_as_folder
from ..demo.mosaic import Split
from ..demo.questions import Questions
from ..demo.recall import compare, load_models, run_demo
from ..demo.tiny_vlm import SHIPPED, load_tiny_vlm
from ..utils.packages import require
from ..utils.terminal import say
from .options import LARGEST_SEED, MANY, new_folder
from .refusals import Commands, reading


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A tiny model that forgets its image, and what helps against it.",
)

REAL_BASE = Path("runs", "real", "base")  # from the repository's root

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides everything that is drawn.")]
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
    run_demo(out, steps, rows, seed)


@app.command("recall")
def recall_command(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or Hub ids of adapters, or several with + between, which act together."),
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
    """Test a base of the lab, and each of some adapters on it: which digit was in that cell, after ever more text?"""
    if base == Path("real") and not base.exists():
        base = REAL_BASE
    with reading("a base of the lab and adapters of it", base or SHIPPED, *(adapters or [])):
        models = load_models(adapters or [], base)
        questions = None
        if base is not None and isinstance(models["base"], LlavaForConditionalGeneration):
            questions = Questions.of(base)
    compare(models, rows, seed, questions)


@app.command("save-base")
def save_base(out: Annotated[Path, typer.Argument(callback=new_folder, help="The folder.")]) -> None:
    """Write the tiny model as a folder, with tokenizer, image processor and chat template, as trainers want it."""
    save_as_folder(load_tiny_vlm(), out)
    say(out)


@app.command()
def chats(
    out: Annotated[
        Path,
        typer.Argument(callback=new_folder, help="Folder for the data set; `datasets.load_dataset` reads it."),
    ],
    form: Annotated[Literal["messages", "prompts"], typer.Option(help="For SFT, for GRPO.")] = "messages",
    rows: Annotated[int, typer.Option(min=1, max=MANY, help="Chats with one image each.")] = 1000,
    max_length: Annotated[
        int, typer.Option(min=0, max=MANY, help="Bytes of text before the first question, at most.")
    ] = 1024,
    split: Annotated[Split, typer.Option(help="Where digits and text come from.")] = "train",
    seed: Seed = 0,
) -> None:
    """Write questions on mosaics as a data set of chats with images."""
    require("train", "datasets", "PIL")
    from ..demo.for_trainers import make_chats, write_chats

    write_chats(make_chats(form, rows, max_length, split, seed), out)
    say(out)

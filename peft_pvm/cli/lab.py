"""`peft-pvm lab`: the tiny model, its training, the experiment and the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..extras import require
from ..lab.demo import compare, load_models, run_demo
from ..lab.experiment import MAIN_RECIPE, RECIPES, evaluate_method, plan, train_method
from ..lab.limits import load_for_limits, show_limits
from ..lab.methods import METHODS
from ..lab.mosaic import Split
from ..lab.processor import save_as_folder
from ..lab.readings import compare_readings
from ..lab.recall import recall
from ..lab.report import write_report
from ..lab.shipping import export_adapter
from ..lab.step_time import Size, show_step_time
from ..lab.tiny_vlm import SHIPPED, load_tiny_vlm, new_tiny_vlm, save_tiny_vlm
from ..lab.train import train_base
from ..terminal import say
from .options import LARGEST_SEED, MANY, new_file, new_folder, one_of
from .refusals import Commands, reading


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A tiny model that forgets its image, and what helps against it.",
)

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides everything that is drawn.")]
Rows = Annotated[int, typer.Option(min=1, max=MANY, help="Rows of nine questions at every length.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", callback=one_of(METHODS), help=f"One or several of: {', '.join(METHODS)}."),
]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", callback=one_of(RECIPES), help=f"One or several of: {', '.join(RECIPES)}."),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the training; by default 0, 1 and 2."),
]
Runs = Annotated[Path, typer.Option(callback=new_folder, help="Folder for what is trained.")]
ResultsFolder = Annotated[Path, typer.Option("--results", callback=new_folder, help="Folder of the results.")]


@app.command("train-base")
def train_base_command(
    out: Annotated[
        Path,
        typer.Option(
            callback=new_file, help="The file; by default the shipped one is overwritten.", show_default=False
        ),
    ] = Path(SHIPPED),
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Of the optimizer.")] = 2000,
    seed: Seed = 0,
) -> None:
    """Train the tiny model again."""
    start = time.perf_counter()
    model = new_tiny_vlm(seed)
    train_base(model, steps, seed=seed)
    save_tiny_vlm(model, out)
    say(f"Trained in {time.perf_counter() - start:.0f} s, saved to {out}.")
    for length in (0, 2048):
        accuracy = recall(model, length)
        say(f"Accuracy after {length} bytes: {accuracy.value:.3f} ± {accuracy.standard_error:.3f}")


@app.command()
def train(method: Methods = None, recipe: Recipes = None, seed: Seeds = None, runs: Runs = Path("runs")) -> None:
    """Train what the experiment compares. What is done is not done again; what was interrupted goes on."""
    planned = plan(method, recipe, seed)
    trained = [run for run in planned if METHODS[run.method].is_trained]
    for run in trained:
        say(train_method(run.method, run.recipe, run.seed, runs))
    for name in dict.fromkeys(run.method for run in planned if run not in trained):
        say(f"{name} has no training of its own.", err=True)


@app.command("eval")
def evaluate(
    method: Methods = None,
    recipe: Recipes = None,
    seed: Seeds = None,
    runs: Runs = Path("runs"),
    results: ResultsFolder = Path("results"),
) -> None:
    """Test what was trained, and what needs no training. What is done is not done again."""
    for run in plan(method, recipe, seed):
        say(evaluate_method(run.method, run.recipe, run.seed, runs, results))


@app.command()
def report(
    results: ResultsFolder = Path("results"),
    docs: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the page.")] = Path("docs"),
) -> None:
    """Write results.md and its pictures from the results."""
    say(write_report(results, docs))


@app.command()
def export(
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the adapter.")],
    recipe: Annotated[str, typer.Option(callback=one_of(RECIPES), help="Of its training.")] = MAIN_RECIPE,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of its training.")] = 0,
    runs: Runs = Path("runs"),
    results: ResultsFolder = Path("results"),
) -> None:
    """Save the PVM adapter of a run as a folder to share, with its card."""
    say(export_adapter(recipe, seed, runs, results, out))


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
    adapters: Annotated[list[str] | None, typer.Argument(help="Folders or Hub ids of adapters.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of a tiny model that was trained further; by default the shipped one."),
    ] = None,
    rows: Rows = 16,
    seed: Seed = 0,
) -> None:
    """Test the tiny model, and each of some adapters on it: which digit was in that cell, after ever more text?"""
    with reading("the tiny model and adapters of it", base or SHIPPED, *(adapters or [])):
        models = load_models(adapters or [], base)
    compare(models, rows, seed)


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
    from ..lab.chats import make_chats, write_chats

    write_chats(make_chats(form, rows, max_length, split, seed), out)
    say(out)


@app.command("step-time")
def step_time(
    size: Annotated[Size, typer.Option(help="Of the model, whose weights are random.")] = "tiny",
    text_tokens: Annotated[
        int, typer.Option(min=1, max=MANY, help="Of a row, after an image of 256 visual tokens.")
    ] = 512,
    rows: Annotated[int, typer.Option(min=1, max=MANY, help="Of a batch.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, max=MANY, help="Rounds.")] = 7,
    r: Annotated[int, typer.Option(min=1, max=MANY, help="PVM's width.")] = 64,
    seed: Seed = 0,
) -> None:
    """Measure a step of training with PVM, with LoRA of its size and of the base alone."""
    show_step_time(size, text_tokens, rows, repeats, r, seed)


@app.command()
def readings(rows: Rows = 32, seed: Seed = 0) -> None:
    """Test T-DRS on the tiny model under each reading of its paper."""
    compare_readings(rows, seed)


@app.command()
def limits(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PVM adapter for the tiny model.")],
    rows: Rows = 64,
    seed: Seed = 0,
) -> None:
    """Show what a PVM adapter's query knows, what its memory holds and where its wrong answers come from."""
    with reading("a PVM adapter of the tiny model", adapter):
        model = load_for_limits(adapter)
    show_limits(model, str(adapter), rows, seed)

"""The commands of `python -m experiments`."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from peft_pvm.cli.lab import Rows, Seed
from peft_pvm.cli.options import LARGEST_SEED, MANY, new_file, new_folder, one_of
from peft_pvm.cli.refusals import Commands, reading
from peft_pvm.demo.mosaic import Split
from peft_pvm.demo.recall import recall
from peft_pvm.demo.tiny_vlm import SHIPPED, save_tiny_vlm
from peft_pvm.utils.extras import require
from peft_pvm.utils.terminal import say

from .anchors import compare_anchors
from .base import new_tiny_vlm, train_base
from .export import export_adapter
from .in_turns import SHAPES
from .in_turns import measure as measure_in_turns
from .in_turns import table as table_of_turns
from .leaderboard import write_leaderboard
from .methods import METHODS
from .pvm_limits import load_for_limits, show_limits
from .real.commands import COMMANDS as REAL_COMMANDS
from .report import write_report
from .runs import MAIN_RECIPE, RECIPES, evaluate_method, plan, train_method
from .serving_load import measure as measure_load
from .serving_load import table as load_table
from .step_time import Size, show_step_time
from .tdrs_readings import compare_readings


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RECORDED = Path("experiments", "results")  # from the repository's root

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
Runs = Annotated[Path, typer.Option(callback=new_folder, help="Folder of the trainings.")]
ResultsFolder = Annotated[Path, typer.Option("--results", callback=new_folder, help="Folder of the results.")]


@app.callback()
def describe() -> None:
    """Train and test what helps the tiny model against forgetting its image, and write the report."""
    # PEFT asks transformers for something by its old name; nobody who runs a command can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


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
    """Train the methods of the experiment. Finished runs are not repeated, interrupted ones resume."""
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
    results: ResultsFolder = RECORDED,
) -> None:
    """Test the trained methods, and those that need no training. Finished tests are not repeated."""
    for run in plan(method, recipe, seed):
        say(evaluate_method(run.method, run.recipe, run.seed, runs, results))


@app.command()
def report(
    results: ResultsFolder = RECORDED,
    docs: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the page.")] = Path("docs"),
) -> None:
    """Write results.md and its pictures from the results."""
    say(write_report(results, docs))


@app.command()
def leaderboard(
    results: Annotated[
        Path, typer.Option("--results", callback=new_folder, help="Folder of what peft-pvm compare recorded.")
    ] = RECORDED / "leaderboard",
    docs: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the page.")] = Path("docs"),
) -> None:
    """Write leaderboard.md and its pictures from recorded comparisons."""
    say(write_leaderboard(results, docs))


@app.command()
def export(
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the adapter.")],
    recipe: Annotated[str, typer.Option(callback=one_of(RECIPES), help="Of its training.")] = MAIN_RECIPE,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of its training.")] = 0,
    runs: Runs = Path("runs"),
    results: ResultsFolder = RECORDED,
) -> None:
    """Save the PVM adapter of a run as a folder to share, with its card."""
    say(export_adapter(recipe, seed, runs, results, out))


@app.command("serving-load")
def serving_load(
    rounds: Annotated[int, typer.Option(min=1, max=MANY, help="Of turns.")] = 3,
    output_tokens: Annotated[int, typer.Option(min=2, max=1024, help="Length of each answer.")] = 128,
    layers: Annotated[int, typer.Option(min=1, max=100, help="Of the model, whose weights are random.")] = 36,
    out: Annotated[Path, typer.Option(callback=new_file, help="The JSON file for the measurements.")] = (
        RECORDED / "serving" / "load.json"
    ),
) -> None:
    """Measure vLLM's server under load: the base, PVM and DIPE take turns. It needs vLLM in this environment."""
    require("vllm", "vllm", "PIL")
    say(load_table(measure_load(rounds, output_tokens, out, num_hidden_layers=layers)))


@app.command("in-turns")
def in_turns(
    before: Annotated[str, typer.Option(help="The earlier commit, as git names it.")],
    shape: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(SHAPES), help=f"One or several of: {', '.join(SHAPES)}; by default all."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, max=MANY, help="Of turns.")] = 15,
    out: Annotated[Path, typer.Option(callback=new_file, help="The JSON file for the measurements.")] = (
        RECORDED / "bench" / "in-turns.json"
    ),
) -> None:
    """Measure prefill and tokens of an earlier commit and of the code as it is, in turns."""
    say(table_of_turns(measure_in_turns(before, shape or list(SHAPES), rounds, out)))


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
    """Measure a step of training with PVM, with LoRA of its size, without both, and with the image hidden."""
    show_step_time(size, text_tokens, rows, repeats, r, seed)


@app.command()
def readings(rows: Rows = 32, seed: Seed = 0) -> None:
    """Test T-DRS on the tiny model under each reading of its paper."""
    compare_readings(rows, seed)


@app.command()
def anchors(
    out: Annotated[
        Path, typer.Option(callback=new_file, help="JSON file for the answers; by default the recorded one.")
    ] = RECORDED / "anchors" / "test.json",
    split: Annotated[
        Split, typer.Option(help="Where digits and text come from: validation to choose by, test to report.")
    ] = "test",
    rows: Rows = 32,
    seed: Seed = 0,
) -> None:
    """Test DIPE by run and by image on the tiny model: several mosaics, and a chat of several turns."""
    compare_anchors(rows, split, seed, out)


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


for name, command in REAL_COMMANDS.items():
    app.command(name)(command)

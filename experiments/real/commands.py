"""The commands of `python -m experiments` about the real base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peft_pvm.cli.lab import Rows, Seed
from peft_pvm.cli.options import (
    LARGEST_SEED,
    MANY,
    new_file,
    new_folder,
    one_of,
    separated,
    whole_number,
)
from peft_pvm.cli.refusals import reading
from peft_pvm.cli.work.loading import check_device
from peft_pvm.demo.for_trainers import write_chats
from peft_pvm.demo.mosaic import Split
from peft_pvm.utils.extras import require
from peft_pvm.utils.terminal import Terminal, say

from ..checkpoint import CheckpointFile
from .chats import make_real_chats
from .evaluation import LENGTHS, TASKS, WRITING, EvalPlan, Place, evaluate, planned, table_of
from .export import export_adapters
from .findings.page import render_findings
from .findings.plan import FINDINGS, FindingPlan, find
from .language_model import PACKAGE, load_language_model
from .methods import METHODS
from .runs import load_questions, train_method
from .trained import build_base, save_trained
from .training import RealRecipe, Seeing, lora_config, train_real_base
from .vlm import save_vlm


RECORDED = Path("experiments", "results", "real")  # from the repository's root
TRAINED = RECORDED / "trained.safetensors"

TRAINABLE = [name for name, method in METHODS.items() if method.training]

Base = Annotated[Path, typer.Option(help="Folder of the real base.")]
Runs = Annotated[Path, typer.Option(callback=new_folder, help="Folder of what is trained on the real base.")]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--training-seed", min=0, max=LARGEST_SEED, help="Of the trainings; by default 0, 1 and 2."),
]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
SEEDS = [0, 1, 2]
GGUF = Annotated[Path, typer.Option(help=f"The GGUF file of the package {PACKAGE}.")]


def train_command(
    gguf: GGUF,
    out: Annotated[
        Path, typer.Option(callback=new_file, help="File for what is trained; by default the recorded one.")
    ] = TRAINED,
    seeing: Annotated[
        Seeing,
        typer.Option(help="Learnt first: to write cells in the language model's words, or only to tell digits."),
    ] = RealRecipe.seeing,
    seeing_steps: Annotated[
        int, typer.Option(min=1, max=MANY, help="Steps of what is learned first.")
    ] = RealRecipe.seeing_steps,
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps of the LoRA.")] = RealRecipe.steps,
    single_steps: Annotated[
        int, typer.Option(min=0, max=MANY, help="The first of them, with one picture and one turn a chat.")
    ] = RealRecipe.single_steps,
    on_text: Annotated[bool, typer.Option(help="Text and questions count like the answers.")] = RealRecipe.on_text,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train vision tower, projector and LoRA of the real base, and write them into one file.

    On a CPU, an interrupted training resumes and makes the same file: the first stage starts anew, and the LoRA goes
    on from its last multiple of 20 steps.
    """
    check_device(device)
    language_model = load_language_model(gguf)
    recipe = RealRecipe(seeing, seeing_steps, steps, single_steps, on_text=on_text, seed=seed)
    about = {"recipe": asdict(recipe), "base": language_model.fingerprint, "adapters": lora_config().to_dict()}
    checkpoint = CheckpointFile(out.with_suffix(".checkpoint.safetensors"), about)
    model = train_real_base(language_model, recipe, device, checkpoint if device == "cpu" else None)
    seconds = checkpoint.seconds
    save_trained(model, language_model, recipe, out)
    checkpoint.remove()
    say(f"Trained in {seconds:.0f} s on the language model {language_model.fingerprint}, saved to {out}.")


def build_command(
    gguf: GGUF,
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the base.")],
    from_trained: Annotated[Path, typer.Option(help="File of what was trained.")] = TRAINED,
) -> None:
    """Make the real base from the language model and what was trained, as a folder for from_pretrained."""
    language_model = load_language_model(gguf)
    with reading("what was trained", from_trained):
        base = build_base(language_model, from_trained)
    save_vlm(base, language_model, out)
    say(out)


def train_methods_command(
    base: Base,
    method: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(TRAINABLE), help=f"By default all that are trained: {', '.join(TRAINABLE)}."),
    ] = None,
    training_seed: Seeds = None,
    runs: Runs = Path("runs", "real"),
    device: Device = "cpu",
) -> None:
    """Train methods on the real base. Finished trainings are not repeated; on a CPU, interrupted ones resume."""
    check_device(device)
    for name in method or TRAINABLE:
        for seed in training_seed or SEEDS:
            say(train_method(name, seed, base, runs, device))


def evaluate_command(
    base: Base,
    method: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(METHODS), help=f"One or several of: {', '.join(METHODS)}."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folders of adapters, or several with + between, which act together.")
    ] = None,
    task: Annotated[
        str,
        typer.Option(callback=one_of([*TASKS, WRITING]), help=f"What is asked: {', '.join([*TASKS, WRITING])}."),
    ] = EvalPlan.task,
    lengths: Annotated[
        str, typer.Option(help="Tokens of text after images, in all turns together, separated by commas.")
    ] = ",".join(map(str, LENGTHS)),
    rows: Rows = EvalPlan.rows,
    split: Annotated[
        Split, typer.Option(help="Where digits and text come from: validation to choose by, test to report.")
    ] = "test",
    training_seed: Seeds = None,
    runs: Runs = Path("runs", "real"),
    results: Annotated[Path, typer.Option(callback=new_folder, help="Folder of the results.")] = RECORDED,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Test the real base with methods and adapters, after ever more text. Rows that are done are not repeated."""
    check_device(device)
    wanted = separated("--lengths", lengths, whole_number(0, MANY), "whole numbers, at least 0")
    plan = EvalPlan(task, tuple(wanted), rows, split, seed)
    tested = planned(method or ([] if adapter else ["base"]), training_seed or SEEDS)
    results_of = evaluate(Place(base, runs, device), tested, adapter or [], plan, results)
    Terminal().print(table_of(results_of, plan))


def chats_command(
    base: Annotated[Path, typer.Option(help="Folder of the real base, whose tokens are counted.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the data set.")],
    rows: Annotated[int, typer.Option(min=1, max=MANY, help="Chats with one image each.")] = 1000,
    max_text: Annotated[
        int, typer.Option(min=0, max=MANY, help="Tokens of text between image and question, at most.")
    ] = RealRecipe.max_text,
    split: Annotated[Split, typer.Option(help="Where digits and text come from.")] = "train",
    seed: Seed = 0,
) -> None:
    """Write questions in natural language as a data set of chats with images, for train_sft.py and peft-pvm."""
    require("train", "datasets", "PIL")
    write_chats(make_real_chats(load_questions(base), rows, max_text, split, seed), out)
    say(out)


def export_command(
    base: Base,
    adapter: Annotated[list[str], typer.Option(help="Folders of adapters that act together.")],
    trained_by: Annotated[str, typer.Option(help="The command that trained them, for their cards.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for them; each keeps its name in it.")],
    results: Annotated[Path, typer.Option(help="Folder of the results on the real base.")] = RECORDED,
) -> None:
    """Copy adapters of the real base, rounded to bf16, with cards that hold their results."""
    for folder in export_adapters(base, adapter, trained_by, results, out):
        say(folder)


def findings_command(
    base: Base,
    only: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(FINDINGS), help=f"One or several of: {', '.join(FINDINGS)}; by default all."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folders of adapters, or several with + between, which `text` tests.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help=f"The GGUF file of {PACKAGE}: `text` tests also what the base was made from.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Of each finding; by default as many as are recorded.")
    ] = None,
    split: Annotated[
        Split, typer.Option(help="Where digits and text come from: validation to choose by, test to report.")
    ] = "test",
    results: Annotated[Path, typer.Option(callback=new_folder, help="Folder of the findings.")] = RECORDED
    / "findings",
    seed: Seed = 0,
) -> None:
    """Measure what is behind the real base's results, finding by finding. What was measured before is kept."""
    find(base, FindingPlan(tuple(only or FINDINGS), rows, split, seed), results, adapter or [], gguf)
    say(render_findings(results))


COMMANDS: dict[str, Callable[..., None]] = {
    "train-real-base": train_command,
    "real-base": build_command,
    "real-train": train_methods_command,
    "real-eval": evaluate_command,
    "real-chats": chats_command,
    "real-export": export_command,
    "real-findings": findings_command,
}

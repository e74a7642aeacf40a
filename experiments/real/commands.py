"""The commands of `python -m experiments` about the real base."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from peft_pvm.cli.lab import Rows, Seed
from peft_pvm.cli.options import MANY, new_file, new_folder, one_of, separated, whole_number
from peft_pvm.cli.refusals import reading
from peft_pvm.demo.for_trainers import write_chats
from peft_pvm.demo.mosaic import Split
from peft_pvm.utils.packages import require
from peft_pvm.utils.terminal import Terminal, say

from .chats import make_real_chats
from .evaluation import LENGTHS, METHODS, TASKS, EvalPlan, evaluate, table_of
from .findings.page import render_findings
from .findings.plan import FINDINGS, FindingPlan, find
from .language_model import PACKAGE, load_language_model
from .questions import Questions
from .trained import build_base, save_trained
from .training import RealRecipe, Seeing, train_real_base
from .vlm import save_vlm


RECORDED = Path("experiments", "results", "real")  # from the repository's root
TRAINED = RECORDED / "trained.safetensors"

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
        int, typer.Option(min=1, max=MANY, help="Steps of what is learnt first.")
    ] = RealRecipe.seeing_steps,
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps of the LoRA.")] = RealRecipe.steps,
    seed: Seed = 0,
) -> None:
    """Train vision tower, projector and LoRA of the real base, and write them into one file."""
    language_model = load_language_model(gguf)
    recipe = RealRecipe(seeing, seeing_steps, steps, seed=seed)
    start = time.perf_counter()
    model = train_real_base(language_model, recipe)
    seconds = time.perf_counter() - start
    save_trained(model, language_model, recipe, out)
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


def evaluate_command(
    base: Annotated[Path, typer.Option(help="Folder of the real base.")],
    method: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(METHODS), help=f"One or several of: {', '.join(METHODS)}."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folders of adapters, or several with + between, which act together.")
    ] = None,
    task: Annotated[
        str, typer.Option(callback=one_of(TASKS), help=f"What is asked: {', '.join(TASKS)}.")
    ] = EvalPlan.task,
    lengths: Annotated[
        str, typer.Option(help="Tokens of text after images, in all turns together, separated by commas.")
    ] = ",".join(map(str, LENGTHS)),
    rows: Rows = EvalPlan.rows,
    split: Annotated[
        Split, typer.Option(help="Where digits and text come from: validation to choose by, test to report.")
    ] = "test",
    results: Annotated[Path, typer.Option(callback=new_folder, help="Folder of the results.")] = RECORDED,
    seed: Seed = 0,
) -> None:
    """Test the real base with methods and adapters, after ever more text. Rows that are done are not repeated."""
    wanted = separated("--lengths", lengths, whole_number(0, MANY), "whole numbers, at least 0")
    plan = EvalPlan(task, tuple(wanted), rows, split, seed)
    methods = method or ([] if adapter else ["base"])
    tested = evaluate(base, methods, adapter or [], plan, results)
    Terminal().print(table_of(tested, plan))


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
    write_chats(make_real_chats(Questions.of(base), rows, max_text, split, seed), out)
    say(out)


def findings_command(
    base: Annotated[Path, typer.Option(help="Folder of the real base.")],
    only: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(FINDINGS), help=f"One or several of: {', '.join(FINDINGS)}; by default all."),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folders of adapters, which `text` tests beside the methods.")
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
    "real-eval": evaluate_command,
    "real-chats": chats_command,
    "real-findings": findings_command,
}

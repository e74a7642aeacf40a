"""`peft-pvm compare`: a model with each method side by side, on the lab's questions or on those of a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..compare.contenders import UNTRAINED, contenders
from ..compare.files import questions_of, read_questions
from ..compare.report import outcome, overview, save
from ..compare.run import Plan
from ..compare.run import compare as compare_model
from ..compare.tasks import Question, Task, file_task
from ..demo import cells
from ..demo.for_trainers import TinyVLMProcessor, tiny_vlm_processor
from ..demo.mosaic import NUM_CELLS
from ..demo.tiny_vlm import load_tiny_vlm
from ..folders.adapter_file import inspect_adapter
from ..tokens.families import find_vlm
from ..utils.packages import require
from ..utils.terminal import Terminal, say
from .lab import REAL_BASE
from .loading import load_model, load_processor, progress_bars
from .options import (
    LARGEST_SEED,
    MANY,
    check_adapter,
    check_device,
    counted,
    name_among,
    new_folder,
    separated,
    set_kernel,
    whole_number,
    without_weights,
)
from .proposals import Device, DType, Kernel, Split
from .refusals import reading


TINY, REAL, ALL = "tiny", "real", "all"
LAB_TASKS = ("mosaic", "transcription")


Model = Annotated[
    str,
    typer.Option(
        help=f"Folder or Hub id of a vision-language model; `{TINY}` and `{REAL}` are the lab's, the latter in "
        f"{REAL_BASE}."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        callback=new_folder, help="Folder for the report. If it holds answers, the comparison goes on from there."
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        help="`mosaic` or `transcription`, the lab's; a JSON Lines file of `image`, `question` and `answer`; or the "
        "folder or Hub id of a data set with these columns, or with chats as for training."
    ),
]
Methods = Annotated[str, typer.Option(help=f"`{ALL}`, or some of {', '.join(UNTRAINED)}, separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Tokens of text between image and question, separated by commas.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="Folder or Hub id, or several with + between, which act together. Repeatable."),
]
Seeds = Annotated[
    str, typer.Option(help="Separated by commas. Each draws another text, and the lab's tasks other questions.")
]
MaxNewTokens = Annotated[
    int | None, counted("Length of an answer at most; by default that of the longest right one, and 16 more.")
]


def compare(
    model: Model,
    out: Out,
    task: TaskName = LAB_TASKS[0],
    methods: Methods = ALL,
    lengths: Lengths = "0,256,1024",
    adapter: Adapters = None,
    rows: Annotated[int, counted("Questions, under each seed.")] = 32,
    seeds: Seeds = "0",
    split: Split = "train",
    max_new_tokens: MaxNewTokens = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
) -> None:
    """Have a model answer the same questions alone, with trivial controls, with each method and with adapters."""
    require("lab", "jinja2", "matplotlib", "PIL", "sklearn")
    names = None
    if methods != ALL:
        names = separated("--methods", methods, name_among(tuple(UNTRAINED)), f"{ALL}, or some of {tuple(UNTRAINED)}")
    tokens = separated("--lengths", lengths, whole_number(0, MANY), "whole numbers of tokens, such as 0,1024")
    draws = separated("--seeds", seeds, whole_number(0, LARGEST_SEED), "whole numbers from 0 on")
    check_device(device)
    source = str(REAL_BASE) if model == REAL and not Path(model).exists() else model
    entered = contenders(names, adapter or ())
    _check(source, [part for contender in entered for part in contender.adapters], attn_implementation)
    processor = tiny_vlm_processor() if source == TINY else load_processor(source)
    asked = _task(task, rows, split, isinstance(processor, TinyVLMProcessor))
    if source == TINY:
        loaded = _tiny(device, attn_implementation)
    else:
        loaded = load_model(source, [], device, dtype, attn_implementation)
    plan = Plan(tuple(sorted(set(tokens))), tuple(dict.fromkeys(draws)), max_new_tokens)
    with progress_bars() as show:
        found = compare_model(loaded, processor, asked, entered, plan, out, name=model, progress=show)
    page = save(found, out)
    shown = overview(found)
    table = Table(*shown.header)
    for row in shown.rows:
        table.add_row(*row)
    Terminal().print(table)
    for sentence in (*outcome(found), f"Report: {page}"):
        say(sentence)


def _tiny(device: str, attn_implementation: str | None) -> Any:
    model: Any = load_tiny_vlm().to(torch.device(device))
    if attn_implementation is not None:
        set_kernel(model, attn_implementation)
    return model


def _check(source: str, adapters: list[str], attn_implementation: str | None) -> None:
    """Find what is wrong with a model and adapters as far as their configurations tell."""
    if source != TINY:
        find_vlm(without_weights(source, attn_implementation))
    for part in adapters:
        if source != TINY:
            check_adapter(part, source)
        else:
            with reading("an adapter", part):
                inspect_adapter(part)


def _task(name: str, rows: int, split: str, in_tokens: bool) -> Task:
    """The task of a name, a file or a data set.

    Args:
        name: What `--task` was given.
        rows: Questions, under each seed.
        split: The split of a data set.
        in_tokens: Whether the model reads the lab's own tokens, and nothing else.
    """
    if name in LAB_TASKS:
        return lab_task(name, rows, in_tokens)
    if Path(name).is_file():
        with reading("questions about images", name):
            return file_task(name, read_questions(name, rows))
    require("train", "datasets")
    import datasets  # of the extra `train`

    with reading("a data set of questions about images", name):
        data = datasets.load_dataset(name, split=split, streaming=True)
        numbered = ((f"{name}, row {number}", row) for number, row in enumerate(data))
        return file_task(name, questions_of(numbered, rows, name))


def lab_task(name: str, rows: int, in_tokens: bool) -> Task:
    """The questions of the lab about mosaics: see `_task`."""
    is_transcription = name == LAB_TASKS[1]
    ask = partial(cells.ask_in_tokens if in_tokens else cells.ask_in_words, is_transcription, rows)

    def questions(seed: int) -> list[Question]:
        return [_about_cells(f"{seed}-{number}", *one) for number, one in enumerate(ask(seed))]

    def score(answer: str, question: Question) -> int:
        if not in_tokens:
            return cells.digits_right(answer, question.answers[0])
        asked = question.prompt[0]["content"][-1]["text"]
        return cells.cells_right(asked + answer, asked + question.answers[0])

    if not in_tokens:
        asked = NUM_CELLS
        scored = f"Accuracy is the share of {asked} digits that are right. Digits of an answer count in their order."
    elif is_transcription:
        asked = cells.ROUNDS * NUM_CELLS
        scored = f"Accuracy is the share of {asked} cells with the right digit behind them, be it their turn or not."
    else:
        asked, scored = 1, "An answer counts if it is the right digit."
    limit = 2 * asked - 1 if in_tokens else None  # the tiny model does not end
    return Task(name, questions, score, scored, asked, "", cells.held_out_text(), limit)


def _about_cells(name: str, image: Any, question: str, answer: str) -> Question:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return Question(name, [image], [{"role": "user", "content": content}], (answer,))

"""The work of `peft-pvm compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ...compare.contenders import TEMPERATURE, contenders
from ...compare.files import questions_of, read_questions
from ...compare.report import outcome, overview, save
from ...compare.run import Plan
from ...compare.run import compare as compare_model
from ...compare.tasks import Question, Task, file_task
from ...demo import cells
from ...demo.for_trainers import TinyVLMProcessor, tiny_vlm_processor
from ...demo.mosaic import NUM_CELLS
from ...utils.extras import require
from ...utils.terminal import Terminal, say
from ..options import TINY, ModelOptions, located
from ..refusals import reading
from .loading import (
    check_device,
    check_fit,
    load_model,
    load_processor,
    load_tiny,
    progress_bars,
)


__all__ = ["Asked", "Plan", "compare", "lab_task"]
LAB_TASKS = ("mosaic", "transcription")


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        task: One of `LAB_TASKS`, a file, or the folder or Hub id of a data set.
        rows: Questions, under each seed.
        split: The split of a data set.
    """

    task: str
    rows: int
    split: str

    def read(self, in_tokens: bool) -> Task:
        """The task.

        Args:
            in_tokens: Whether the model reads the lab's own tokens, and nothing else.
        """
        if self.task in LAB_TASKS:
            return lab_task(self.task, self.rows, in_tokens)
        if Path(self.task).is_file():
            with reading("questions about images", self.task):
                return file_task(self.task, read_questions(self.task, self.rows))
        require("train", "datasets")
        import datasets  # of the extra `train`

        with reading("a data set of questions about images", self.task):
            data = datasets.load_dataset(self.task, split=self.split, streaming=True)
            numbered = ((f"{self.task}, row {number}", row) for number, row in enumerate(data))
            return file_task(self.task, questions_of(numbered, self.rows, self.task))


def compare(
    of_model: ModelOptions, asked: Asked, methods: list[str] | None, adapters: list[str], plan: Plan, out: Path
) -> None:
    """Have a model answer the same questions with each of what is compared, and write the report."""
    check_device(of_model.device)
    name = of_model.model
    of_model = dataclasses.replace(of_model, model=located(name))
    entered = contenders(methods, adapters)
    check_fit(of_model, [part for contender in entered for part in contender.adapters])
    is_tiny = of_model.model == TINY
    processor = tiny_vlm_processor() if is_tiny else load_processor(of_model.model)
    task = asked.read(isinstance(processor, TinyVLMProcessor))
    loaded = load_tiny(of_model) if is_tiny else load_model(of_model)
    with progress_bars() as show:
        found = compare_model(loaded, processor, task, entered, plan, out, name=name, progress=show)
    page = save(found, out)
    shown = overview(found)
    table = Table(*shown.header)
    table.columns[0].min_width = len(TEMPERATURE)  # the longest word in names of ours
    for row in shown.rows:
        table.add_row(*row)
    Terminal().print(table)
    for sentence in (*outcome(found), f"Report: {page}"):
        say(sentence)


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

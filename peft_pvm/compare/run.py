"""`compare`: a model answers the same questions with each contender, after longer and longer texts."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..env import environment
from ..probe.observers import undisturbed
from ..probe.rows import ask, on_model
from ..tokens.families import VisionLanguageModel, find_vlm
from ..tuners.active import base_of
from ..utils.distractors import Distractors, read_paragraphs
from ..utils.packages import attn_implementation
from .comparison import TIMED, Comparison
from .contenders import BASE, Contender, NothingToDo, needs_channels, with_channels
from .journal import Answer, Journal
from .tasks import Asked, Task


ANSWERS = "answers.jsonl"
SPARE = 16  # tokens that an answer may be longer than the longest right one
TIMES = "taking times"  # as progress calls it
REFUSALS = (ImportError, NotImplementedError, ValueError)  # how methods say that a model is not for them
GREEDY = {"do_sample": False, "num_beams": 1}

Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        lengths: Tokens of text between image and question.
        seeds: Each decides the text, sampling and, where questions are drawn, the questions.
        max_new_tokens: Length of an answer at most; `None`: what the task says.
    """

    lengths: tuple[int, ...] = (0, 1024, 4096)
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int | None = None


@torch.no_grad()
def compare(
    model: nn.Module,
    processor: Any,
    task: Task,
    entered: Sequence[Contender],
    plan: Plan,
    out: str | os.PathLike,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Have a model answer the same questions with each contender. Answers that are there are not asked for again.

    Questions are asked one at a time, and each answer is kept at once, in `out/answers.jsonl`. A contender that
    refuses the model, or has nothing to do on it, is noted with its reason, and the others go on. VAR without sink
    channels gets those that the first questions show. Times are taken last: all contenders answer the first questions
    of each length once more, in turns.

    Args:
        model: A vision-language model from transformers, without adapters.
        processor: Its processor, with a chat template.
        task: What is asked.
        entered: What is compared; the first is the base.
        plan: Lengths and seeds.
        out: Folder of the answers.
        name: What the model is called; by default what its configuration says.
        progress: Called with the contender, how many questions are answered and how many there are; while times are
            taken, with "taking times".

    Returns:
        The comparison, whose `save` writes a report.

    Raises:
        ValueError: The base cannot answer, a length leaves the model's positions, there is not enough text without the
            answers in it, or `out` has answers to something else.
    """
    vlm = find_vlm(base_of(model))
    asked = _asked(processor, task, plan)
    limit = plan.max_new_tokens or task.max_new_tokens or SPARE + _longest_answer(processor, asked)
    _check_positions(vlm, processor, asked, limit)
    about = _about(vlm, task, limit, name)
    Path(out).mkdir(parents=True, exist_ok=True)
    asker = _Asker(vlm.model, processor, task, limit, Journal(Path(out, ANSWERS), about))
    prepared, refused, idle = [], {}, {}
    with undisturbed(vlm):
        for contender in entered:
            try:
                contender = asker.prepare(contender, asked)
                asker.ask(contender, asked, progress or (lambda *_: None))
            except NothingToDo as reason:
                idle[contender.name] = str(reason)
            except Refusal as error:
                if contender.name == BASE:
                    raise ValueError(f"The base cannot answer: {error}") from error
                refused[contender.name] = str(error)
            prepared.append(contender)
        asker.take_times(prepared, asked, progress or (lambda *_: None))
    return Comparison.of(about, prepared, asked, asker.journal.answers, asker.journal.times, refused, idle)


class Refusal(Exception):
    """A contender cannot act on the model."""


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        raise Refusal(str(error).strip() or type(error).__name__) from error


@dataclass(frozen=True, eq=False)
class _Asker:
    """Asks a model questions and keeps the answers."""

    model: Any
    processor: Any
    task: Task
    limit: int
    journal: Journal

    def prepare(self, contender: Contender, asked: Sequence[Asked]) -> Contender:
        """A contender with what it has to know of the model. More questions than last time do not change it."""
        if not needs_channels(contender):
            return contender
        known = self.journal.settings.get(contender.name, {}).get("sink_channels")
        with _refusing():
            return with_channels(contender, self.model, self.processor, asked, known)

    def ask(self, contender: Contender, asked: Sequence[Asked], progress: Progress) -> None:
        """Have a contender answer whatever it has not answered yet."""
        self.journal.enter(contender.name, contender.settings())
        left = [one for one in asked if self.journal.find(contender.name, one) is None]
        if not left:
            return
        with _refusing(), contender.acting(self.model):
            for number, one in enumerate(left, len(asked) - len(left)):
                progress(contender.name, number, len(asked))
                self.journal.add(self._answer(contender, one))

    def take_times(self, entered: Sequence[Contender], asked: Sequence[Asked], progress: Progress) -> None:
        """Have those who answered the first questions of a length answer them again, in turns.

        Whatever else the machine does at the time then slows all of them.
        """
        by_length: dict[int, list[Asked]] = {}
        for one in asked:
            by_length.setdefault(one.length, []).append(one)
        timed = [one for of_length in by_length.values() for one in of_length[:TIMED]]
        for number, one in enumerate(timed):
            able = [contender for contender in entered if self.journal.find(contender.name, one) is not None]
            if self.journal.times.get(one.key, {}).keys() >= {contender.name for contender in able}:
                continue
            progress(TIMES, number, len(timed))
            first = number % len(able)
            turns = able[first:] + able[:first]
            self.journal.add_times(one, {contender.name: self._time(contender, one) for contender in turns})

    def _time(self, contender: Contender, asked: Asked) -> float | None:
        # CPU time tells methods apart also where other programs run beside.
        clock = time.process_time if self.model.device.type == "cpu" else time.perf_counter
        inputs = self._inputs(asked)
        try:
            with _refusing(), contender.acting(self.model):
                # What is tried or compiled once must not count as time of an answer.
                self._generate(inputs, contender, asked, min(2, self.limit))
                started = clock()
                self._generate(inputs, contender, asked, self.limit)
                return clock() - started
        except Refusal as error:
            if contender.name == BASE:
                raise ValueError(f"The base cannot answer: {error}") from error
            return None

    def _answer(self, contender: Contender, asked: Asked) -> Answer:
        tokens = self._generate(self._inputs(asked), contender, asked, self.limit)
        written = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        right = self.task.score(written, asked.question)
        return Answer(contender.name, *asked.key, asked.question.answers[0], written, right, len(tokens), tokens)

    def _inputs(self, asked: Asked) -> dict[str, torch.Tensor]:
        return on_model(ask(self.processor, asked.messages, asked.question.images), self.model)

    def _generate(self, inputs: dict[str, torch.Tensor], contender: Contender, asked: Asked, limit: int) -> list[int]:
        """The tokens of an answer, on the CPU."""
        how: dict[str, Any] = GREEDY
        if contender.temperature is not None:
            how = {**GREEDY, "do_sample": True, "temperature": contender.temperature, "top_p": 1.0, "top_k": 0}
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(repr(asked.key).encode()))
            sequences = self.model.generate(**inputs, **how, max_new_tokens=limit)
        return sequences[0, inputs["input_ids"].shape[1] :].tolist()


def _asked(processor: Any, task: Task, plan: Plan) -> list[Asked]:
    """All questions with the text before them, length by length."""
    paragraphs = task.paragraphs or read_paragraphs()
    asked = []
    for length in plan.lengths:
        for seed in plan.seeds:
            texts = Distractors(processor.tokenizer, length, paragraphs, seed) if length else None
            for question in task.draw(seed):
                text = texts.draw(question.name, question.answers) if texts else ""
                asked.append(Asked(length, seed, question, task.messages(question, text)))
    return asked


def _longest_answer(processor: Any, asked: Sequence[Asked]) -> int:
    answers = {answer for one in asked for answer in one.question.answers}
    return max(len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)


def _check_positions(vlm: VisionLanguageModel, processor: Any, asked: Sequence[Asked], limit: int) -> None:
    """Refuse a length that leaves the model's positions, before anything is asked."""
    positions = getattr(vlm.text_config, "max_position_embeddings", None)
    longest = max(one.length for one in asked)
    of_longest = next(one for one in asked if one.length == longest)
    tokens = ask(processor, of_longest.messages, of_longest.question.images)["input_ids"].shape[1] + limit
    if positions is not None and tokens > positions:
        raise ValueError(
            f"A text of {longest:,} tokens is too long: with image, question and answer it takes {tokens:,} "
            f"positions, but the model has {positions:,}. Give shorter --lengths."
        )


def _about(vlm: VisionLanguageModel, task: Task, limit: int, name: str) -> dict[str, Any]:
    """What decides answers and times, as JSON holds it."""
    model: Any = vlm.model
    return {
        "model": name or model.config.name_or_path,
        "type": model.config.model_type,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention kernel": attn_implementation(vlm.text_config),
        "device": model.device.type,
        "task": task.name,
        "scored": task.scored,
        "asked": task.asked,
        "max_new_tokens": limit,
        "environment": environment(),
    }

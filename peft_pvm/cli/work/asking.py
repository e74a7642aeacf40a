"""What `peft-pvm app` computes: a model's answer to a question, alone and with adapters, while it is being written."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, TextIteratorStreamer

from ...compare.contenders import BASE, UNTRAINED
from ...demo.cells import (
    CellsInTurn,
    ask_in_turn,
    ask_in_words,
    cells_right,
    digits_right,
    held_out_text,
    laid_out,
)
from ...demo.for_trainers import tiny_vlm_processor
from ...demo.mosaic import NUM_CELLS
from ...demo.questions import PLACES, ask
from ...demo.recall import suited
from ...probe import ProbeResult, build_inputs, picture_of, probe
from ...probe.inputs import visual_grids
from ...probe.observers import Glance, Watcher, visual_mask, watched
from ...probe.rows import on_model
from ...tokens.families import find_vlm
from ...tuners.active import activate, attached, base_of
from ...tuners.loading import load_adapters
from ...utils.distractors import Distractors, read_paragraphs
from ..options import TINY, ModelOptions, located
from ..refusals import reading
from .loading import check_fit, load_model, load_processor, load_tiny


if TYPE_CHECKING:
    from PIL.Image import Image


METHODS = {method.name: method.config for method in UNTRAINED.values() if not method.of_the_model}
SMALL = 256  # pixels: the longest side of what is shown while the model writes
ONLY_QUESTION = "Which digits are in the nine cells?"  # that the tiny model can be asked
ALL_CELLS = ask(PLACES)  # as the lab's second base was trained to be asked


@dataclass(frozen=True)
class Question:
    """What somebody asks.

    Attributes:
        model: Folder or Hub id, or "tiny" or "real". The tiny model is asked `ONLY_QUESTION`, whatever the prompt is.
        image: The image.
        prompt: The question about it.
        text_tokens: Tokens of text between image and prompt.
        methods: Those of `METHODS` that act, at their defaults.
        adapters: Folders or Hub ids of adapters that act as well.
        max_new_tokens: Length of an answer at most.
        seed: The seed by which `ask_in_turn` drew the image, if it did.
    """

    model: str
    image: Image
    prompt: str
    text_tokens: int = 0
    methods: Sequence[str] = ()
    adapters: Sequence[str] = ()
    max_new_tokens: int = 64
    seed: int | None = None

    @property
    def is_lab(self) -> bool:
        """Whether it is for the tiny model."""
        return self.model == TINY

    @property
    def acting(self) -> str:
        """What acts, for a reader; empty if nothing does."""
        return " + ".join([*self.methods, *self.adapters])


@dataclass(frozen=True)
class Looks:
    """Where the model looked so far, as `panel` shows it.

    Attributes:
        picture: The image, a PNG file.
        grids: Rows and columns of visual tokens, if they are known.
        seen: For each token but the first, by "base" and by what acts.
    """

    picture: bytes
    grids: Sequence[tuple[int, int]]
    seen: dict[str, list[Glance]]


@dataclass(frozen=True)
class State:
    """How far the answers have come.

    Attributes:
        doing: What is being done, for a reader; empty at the end.
        answers: What has been written, by "base" and by what acts.
        looks: Where the model looked; `None` before it writes.
        right: By the same names, how many of the nine digits are right. Empty where nobody knows them.
        result: What the probe found, at the end.
    """

    doing: str
    answers: dict[str, str] = field(default_factory=dict)
    looks: Looks | None = None
    right: dict[str, int] = field(default_factory=dict)
    result: ProbeResult | None = None


class Desk:
    """Answers one question after another, and keeps the last model for the next one.

    Args:
        of_model: How models are loaded; which one, each question says.
    """

    def __init__(self, of_model: ModelOptions):
        self._of_model = of_model
        self._name = ""
        self._model: Any = None
        self._processor: Any = None
        self._adapters: dict[str, str] = {}  # names on the model, by what was loaded
        self._busy = threading.Lock()

    def ask(self, question: Question, stop: threading.Event) -> Iterator[State]:
        """Answer a question. Closing the iterator stops the model as well.

        Args:
            question: The question.
            stop: Once it is set, the model stops at its next token.

        Yields:
            States. The last one has the result, unless the model was stopped.

        Raises:
            ValueError: The prompt is empty, or model and adapters cannot be used together.
            OSError: A model or an adapter cannot be found.
        """
        if not question.prompt.strip():
            raise ValueError("There is no question. Write one into the field under the image.")
        with self._busy:
            yield State(f"Loading {question.model} ...")
            self._load(question)
            configs = [METHODS[name] for name in question.methods]
            activate(self._model, [self._adapters[source] for source in question.adapters], trainable=False)
            with attached(self._model, *(suited(config) if question.is_lab else config() for config in configs)):
                yield from self._answer(question, stop)

    def _load(self, question: Question) -> None:
        of_model = dataclasses.replace(self._of_model, model=located(question.model))
        check_fit(of_model, question.adapters)
        if question.model != self._name:
            self._name, self._model, self._adapters = "", None, {}  # there may not be memory for two
            self._processor = tiny_vlm_processor() if question.is_lab else load_processor(of_model.model)
            self._model = load_tiny(of_model) if question.is_lab else load_model(of_model)
            self._name = question.model
        for source in question.adapters:
            if source not in self._adapters:
                with reading("an adapter", source):
                    (self._adapters[source],) = load_adapters(self._model, [source])

    def _answer(self, question: Question, stop: threading.Event) -> Iterator[State]:
        answers = dict.fromkeys([BASE, question.acting] if question.acting else [BASE], "")
        stream = _Stream(self._processor.tokenizer, stop)

        def state(doing: str, **found: Any) -> State:
            shown = {name: laid_out(text) if question.is_lab else text for name, text in answers.items()}
            return State(doing, shown, stream.looks(list(answers)), **found)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self._probe, question, stream)
            running.add_done_callback(lambda _: stream.finish())
            try:
                for name in reversed(answers):  # as `probe` has them written
                    yield state(f"{name}: reading ...")
                    for piece in stream:
                        answers[name] += piece
                        yield state(f"{name}: writing ...")
                yield state("Looking at where it looked ...")
                result = running.result()
            except _Stopped:
                yield state("Stopped.")
            else:
                yield state("", right=_digits_right(question, answers), result=result)
            finally:
                stop.set()

    def _probe(self, question: Question, stream: _Stream) -> ProbeResult:
        text, shown = self._text_between(question), question.prompt
        if text:
            shown = f"[{question.text_tokens:,} tokens of text]\n\n{shown}"
        if question.is_lab:
            prompt = f"{text}{ask_in_turn(0).question}"
        else:
            prompt = f"{text}\n\n{question.prompt}" if text else question.prompt
        inputs = on_model(build_inputs(self._processor, question.image, prompt), self._model)
        vlm = find_vlm(base_of(self._model))
        stream.picture = picture_of(self._processor, question.image, SMALL)
        stream.grids = visual_grids(vlm, inputs, int(visual_mask(vlm, inputs).sum()))
        in_turn = [CellsInTurn(inputs["input_ids"].shape[1])] if question.is_lab else []
        with watched(vlm) as stream.watcher:
            found = probe(
                self._model,
                inputs,
                prompt=shown,
                decode=self._processor.tokenizer.decode,
                images=[picture_of(self._processor, question.image)],
                max_new_tokens=2 * NUM_CELLS - 1 if question.is_lab else question.max_new_tokens,
                generate_kwargs={"streamer": stream, "logits_processor": LogitsProcessorList(in_turn)},
                progress=stream.check,
            )
        return dataclasses.replace(found, model_name=question.model)

    def _text_between(self, question: Question) -> str:
        if not question.text_tokens:
            return ""
        paragraphs = held_out_text() if question.is_lab else read_paragraphs()
        return Distractors(self._processor.tokenizer, question.text_tokens, paragraphs).draw("app")


class _Stopped(Exception):
    """The model was stopped."""


class _Stream(TextIteratorStreamer):
    """The text of one answer after another, and where the model looks meanwhile.

    The model that writes into it stops when `stop` is set.
    """

    def __init__(self, tokenizer: Any, stop: threading.Event):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop
        self.picture = b""
        self.grids: list[tuple[int, int]] = []
        self.watcher = Watcher()
        self._seen: list[list[Glance]] = [[]]  # by answer

    def put(self, value: torch.Tensor) -> None:
        """As transformers does."""
        self.check()
        glance = self.watcher.glance()
        if glance is not None:
            self._seen[-1].append(glance)
        super().put(value)

    def end(self) -> None:
        """As transformers does."""
        self._seen.append([])
        super().end()

    def looks(self, names: Sequence[str]) -> Looks | None:
        """Where the model looked, by the names of the answers. The last of them is written first."""
        written = dict(zip(reversed(names), self._seen))
        seen = {name: list(written.get(name, [])) for name in names}
        return Looks(self.picture, self.grids, seen) if any(seen.values()) else None

    def check(self, *_: Any) -> None:
        """Stop the model if need be; takes the arguments of a `Progress`."""
        if self.stop.is_set():
            raise _Stopped

    def finish(self) -> None:
        """End all answers that somebody may still wait for, two at most."""
        for _ in range(2):
            self.text_queue.put(self.stop_signal)


def _digits_right(question: Question, answers: dict[str, str]) -> dict[str, int]:
    if question.seed is None:
        return {}
    if question.is_lab:
        _, first, expected = ask_in_turn(question.seed)
        return {name: cells_right(f"{first}{text}", f"{first}{expected}") for name, text in answers.items()}
    if question.prompt == ALL_CELLS:
        ((_, _, expected),) = ask_in_words(True, 1, question.seed)  # about the same mosaic
        return {name: digits_right(text, expected) for name, text in answers.items()}
    return {}

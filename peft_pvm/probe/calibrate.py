"""Proposes a limit for DIPE: how well a model answers on chats of the user's own, by the length of text in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from ..methods.dipe import DIPEConfig
from ..tokens.families import VisionLanguageModel, find_vlm
from ..tuners.active import attached, base_of
from ..utils.distractors import Distractors, into_messages, read_paragraphs
from .observers import undisturbed
from .rows import Chat, Lesson, teach


LENGTHS = (0, 256, 1024, 4096)
MAX_DISTANCES = (0, 32, 64, 128, 256, 512)
NEGLIGIBLE = 0.01  # nats: what changes the probability of a token of an answer by one percent

Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


@dataclass(frozen=True)
class Answers:
    """How well the rows were answered under one limit after one length of text.

    Attributes:
        losses: The mean of -log p over the tokens of each row's answer, in nats.
        right: Whether each token of the row's answer was the model's first choice.
    """

    losses: list[float]
    right: list[bool]

    @property
    def loss(self) -> float:
        """The mean over rows."""
        return fmean(self.losses)

    @property
    def accuracy(self) -> float:
        """The share of rows that are right."""
        return fmean(self.right)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        max_distance: The proposed limit; `None`: leave DIPE off.
        reason: Why, in a sentence.
        answers: By limit, where `None` stands for the model without DIPE, and by length of the text in tokens.
    """

    max_distance: int | None
    reason: str
    answers: dict[int | None, dict[int, Answers]]

    def loss(self, max_distance: int | None) -> float:
        """The loss under one limit, mean over rows and lengths, in nats."""
        return fmean(_by_row(self.answers[max_distance]))

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        answers = [
            {"max_distance": limit, "length": length, "losses": seen.losses, "right": seen.right}
            for limit, by_length in self.answers.items()
            for length, seen in by_length.items()
        ]
        return {"max_distance": self.max_distance, "reason": self.reason, "answers": answers}


def calibrate(
    model: nn.Module,
    processor: Any,
    chats: Sequence[Chat],
    lengths: Sequence[int] | None = None,
    max_distances: Sequence[int] = MAX_DISTANCES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Measure with which limit of DIPE's distance a model answers best when text comes between image and question.

    Each answer is given to the model after its question, and not generated. The model, with the adapters that it has,
    is left as it was. The best limit is the one with the least loss, averaged over lengths. Other limits count as just
    as good if their loss differs from this by less than a standard error, taken over rows, or by less than a hundredth
    of a nat. Among these, the proposal is what changes the model least: no DIPE if that is among them, otherwise the
    largest limit.

    Args:
        model: A vision-language model whose text model has rotary positions.
        processor: Its processor, with a chat template.
        chats: What `read_chats` returns, two or more.
        lengths: Tokens of text between image and question. `None`: those of 0, 256, 1,024 and 4,096 for which the
            model has positions.
        max_distances: The limits to try.
        seed: Decides the text.
        progress: Called with what is being done, how many steps of it are done and how many there are.

    Raises:
        ValueError: There are fewer than two chats, a length needs more positions than the model has, or DIPE cannot be
            attached.
    """
    if len(chats) < 2:
        raise ValueError(
            f"Calibrating takes at least 2 rows, of which a standard error can be told, not {len(chats)}."
        )
    vlm = find_vlm(base_of(model))
    lengths = _fitting(lengths, vlm, max(teach(processor, chat).inputs["input_ids"].shape[1] for chat in chats))
    paragraphs = read_paragraphs()
    drawn = {length: Distractors(processor.tokenizer, length, paragraphs, seed) for length in lengths if length}

    def lessons(number: int, chat: Chat) -> dict[int, Lesson]:
        texts = {length: drawn[length].draw(f"row {number}", [chat.answer]) if length else "" for length in lengths}
        with_text = {
            length: replace(chat, prompt=into_messages(chat.prompt, text)) if text else chat
            for length, text in texts.items()
        }
        return {length: teach(processor, one) for length, one in with_text.items()}

    rows = (lessons(number, chat) for number, chat in enumerate(chats))
    return calibrated(measure(model, rows, len(chats), max_distances, progress))


def _fitting(lengths: Sequence[int] | None, vlm: VisionLanguageModel, longest: int) -> list[int]:
    """The lengths of text that fit into the model's positions beside the longest chat."""
    positions = getattr(vlm.text_config, "max_position_embeddings", None)
    room = math.inf if positions is None else positions - longest
    if lengths is None:
        return [length for length in LENGTHS if length <= max(room, 0)]
    if too_long := [length for length in lengths if length > room]:
        raise ValueError(
            f"Texts of {too_long} tokens are too long: the model has {positions:,} positions, and the longest of the "
            f"chats takes {longest:,} of them."
        )
    return sorted(set(lengths))


@torch.no_grad()
def measure(
    model: nn.Module,
    rows: Iterable[Mapping[int, Lesson]],
    num_rows: int,
    max_distances: Sequence[int],
    progress: Progress | None = None,
) -> dict[int | None, dict[int, Answers]]:
    """How well a model answers without DIPE, and with each of some limits.

    Args:
        model: The model, with or without adapters, which go on acting.
        rows: For each row, its prompt and answer by length of the text in between.
        num_rows: How many rows there are.
        max_distances: The limits.
        progress: As in `calibrate`.

    Returns:
        By limit, where `None` stands for the model as it is, and by length.
    """
    vlm = find_vlm(base_of(model))
    limits: list[int | None] = [None, *sorted(set(max_distances), reverse=True)]
    answers: dict[int | None, dict[int, Answers]] = {limit: {} for limit in limits}
    with undisturbed(vlm):
        for number, row in enumerate(rows):
            if progress is not None:
                progress("reading rows", number, num_rows)
            for limit in limits:
                with nullcontext() if limit is None else attached(model, DIPEConfig(max_distance=limit)):
                    for length, lesson in row.items():
                        loss, right = _answer(vlm, lesson)
                        seen = answers[limit].setdefault(length, Answers([], []))
                        seen.losses.append(loss)
                        seen.right.append(right)
    return answers


def _answer(vlm: VisionLanguageModel, lesson: Lesson) -> tuple[float, bool]:
    """The mean loss of an answer's tokens, and whether each of them is the first choice."""
    model: Any = vlm.model
    inputs = lesson.on(model)
    targets = inputs["input_ids"][0, -lesson.num_answer_tokens :]
    logits = model(**inputs, use_cache=False, logits_to_keep=lesson.num_answer_tokens + 1).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())


def calibrated(answers: Mapping[int | None, Mapping[int, Answers]]) -> Calibration:
    """The limit that follows from measured answers.

    Args:
        answers: What `measure` returns, of two or more rows.
    """
    losses = {limit: _by_row(by_length) for limit, by_length in answers.items()}
    best = min(losses, key=lambda limit: fmean(losses[limit]))
    by_change = sorted(losses, key=lambda limit: -math.inf if limit is None else -limit)
    chosen = next(limit for limit in by_change if _is_tie(losses[limit], losses[best]))
    kept = {limit: dict(by_length) for limit, by_length in answers.items()}
    return Calibration(chosen, _reason(chosen, kept), kept)


def _by_row(answers: Mapping[int, Answers]) -> list[float]:
    return [fmean(row) for row in zip(*(at_length.losses for at_length in answers.values()))]


def _is_tie(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the rows' losses are as good as the best, as far as they tell."""
    differences = [loss - least for loss, least in zip(losses, best)]
    return fmean(differences) <= max(NEGLIGIBLE, stdev(differences) / math.sqrt(len(differences)))


def _reason(chosen: int | None, answers: Mapping[int | None, Mapping[int, Answers]]) -> str:
    base = answers[None]
    near, far = min(base), max(base)
    change = f"{base[near].loss:.3f} nats after {near:,} tokens of text, {base[far].loss:.3f} after {far:,}"
    if chosen is not None:
        gained = fmean(_by_row(base)) - fmean(_by_row(answers[chosen]))
        return (
            f"max_distance={chosen} lowers the loss of an answer by {gained:.3f} nats, mean over the lengths. It is "
            "the largest of the limits that do as well, so it changes the model least."
        )
    if _is_tie(base[far].losses, base[near].losses):
        return f"Leave DIPE off: the model does not lose the image at these lengths (loss {change})."
    return f"Leave DIPE off: the model answers worse after more text (loss {change}), but no limit helps it."

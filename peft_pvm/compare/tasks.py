"""What a comparison asks: questions about images with known answers, and how an answer is scored."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..utils.distractors import into_messages


ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
# Marks that mean nothing in an answer. A point or comma inside a number, and a sign before one, do.
MARKS = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|-(?!\d)|[^\w\s.,-]")


@dataclass(frozen=True, eq=False)
class Question:
    """A question about images.

    Attributes:
        name: Tells it from the others of its task. A question of the same name under another seed is the same one.
        images: The images.
        prompt: The chat up to the answer, each message with `role` and `content`, a list of parts with `type`.
        answers: What is accepted as right.
    """

    name: str
    images: Sequence[Any]
    prompt: Sequence[dict[str, Any]]
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """Questions, and how their answers are scored.

    Attributes:
        name: What reports call it.
        draw: Gives the questions of a seed.
        score: How much of an answer is right, from 0 to `asked`, given what the model wrote and the question.
        scored: How, in a sentence.
        asked: What `score` is out of.
        ending: What comes between the text and the question.
        paragraphs: What the text is made of; `None`: Python's help topics.
        max_new_tokens: Length of an answer at most; `None`: that of the longest right one, and some more.
    """

    name: str
    draw: Callable[[int], list[Question]]
    score: Callable[[str, Question], int]
    scored: str
    asked: int = 1
    ending: str = "\n\n"
    paragraphs: Sequence[str] | None = None
    max_new_tokens: int | None = None

    def messages(self, question: Question, text: str) -> list[dict[str, Any]]:
        """The chat of a question with a text after its last image."""
        return into_messages(question.prompt, text, self.ending) if text else list(question.prompt)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question as it is asked.

    Attributes:
        length: Tokens of text between images and question.
        seed: Decides the text.
        question: The question.
        messages: The chat, with the text.
    """

    length: int
    seed: int
    question: Question
    messages: Sequence[dict[str, Any]]

    @property
    def key(self) -> tuple[int, int, str]:
        """Length, seed and name of the question."""
        return self.length, self.seed, self.question.name


def normalised(answer: str) -> str:
    """An answer as exact match compares it, much as VQA's evaluation does.

    Letter case, punctuation, articles and spaces do not count, and number words up to ten are digits. A number keeps
    its decimal point.

    Example:
        >>> normalised(" The  two cats. "), normalised("3.5, or so")
        ('2 cats', '3.5 or so')
    """
    text = MARKS.sub(" ", unicodedata.normalize("NFKC", answer).lower())
    words = [word for word in text.split() if word not in ARTICLES]
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in words)


def exact_match(answer: str, question: Question) -> int:
    """1 if an answer is, normalised, one of those that are accepted, else 0."""
    return int(normalised(answer) in map(normalised, question.answers))


EXACT_MATCH = (
    "An answer counts if it is one of the accepted ones, word for word; letter case, punctuation, articles and spaces "
    "do not count, and number words up to ten are digits."
)


def file_task(name: str, questions: Sequence[Question]) -> Task:
    """A task of questions that are the same under every seed.

    Args:
        name: What reports call it.
        questions: The questions.
    """
    return Task(name, lambda seed: list(questions), exact_match, EXACT_MATCH)

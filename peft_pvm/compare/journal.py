"""Answers on the disk, each as soon as it is there: an interrupted comparison goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..folders.data_file import holding
from ..folders.replacing import write_file
from ..utils.text import quoted
from .tasks import Asked


@dataclass(frozen=True)
class Answer:
    """What a contender answered to one question.

    Attributes:
        contender: Its name.
        length: Tokens of text between image and question.
        seed: Of the questions, the text and sampling.
        question: The question's name.
        expected: The first of the accepted answers.
        answer: What the model wrote.
        right: How much of it is right.
        tokens: How many tokens it wrote.
        token_ids: These tokens. `None`: they were not recorded, as in files of earlier versions.
    """

    contender: str
    length: int
    seed: int
    question: str
    expected: str
    answer: str
    right: int
    tokens: int
    token_ids: Sequence[int] | None = None


class Journal:
    """A JSON Lines file: what is compared, what each contender is, its answers and times, in the order of writing.

    Args:
        path: The file, read if it is there. A last line that was not finished is dropped.
        about: What decides answers and times; a file about anything else is refused.

    Attributes:
        answers: By contender, length, seed and question.
        times: Of some questions, by length, seed and question: how many seconds each contender took in one round of
            turns, from the prompt, as tensors, to the last token; `None` if it refused. On a CPU, the CPU time of all
            threads.
        settings: By contender, what it was when it last entered.

    Raises:
        ValueError: The file is damaged, or about something else.
    """

    def __init__(self, path: str | os.PathLike, about: Mapping[str, Any]):
        self.path = Path(path)
        self.answers: dict[tuple[str, int, int, str], Answer] = {}
        self.times: dict[tuple[int, int, str], Mapping[str, float | None]] = {}
        self.settings: dict[str, Any] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if not whole:
            write_file(self.path, _line({"about": about}))
            return
        with holding(self.path, "what peft-pvm compare writes"):
            found = dict(json.loads(whole[0])["about"])
            for line in whole[1:]:
                entry = json.loads(line)
                if "settings" in entry:
                    self.settings[str(entry["contender"])] = entry["settings"]
                elif "answer" in entry:
                    entry.pop("seconds", None)  # earlier versions timed every answer, but not in turns
                    self._take(Answer(**entry))
                else:
                    self.times[entry["length"], entry["seed"], entry["question"]] = dict(entry["times"])
        if len(whole) < len(lines):
            write_file(self.path, "".join(whole))
        for name in [*about, *(name for name in found if name not in about)]:
            self._compare(f"answers with {name}", found.get(name), about.get(name))

    def enter(self, contender: str, settings: Mapping[str, Any]) -> None:
        """Note what a contender is. ValueError: under this name, answers of another one are there."""
        if self.settings.get(contender) == settings:
            return
        if any(name == contender for name, *_ in self.answers):
            self._compare(f"answers of {contender} with", self.settings.get(contender), settings)
        self.settings[contender] = settings
        self._append({"contender": contender, "settings": settings})

    def find(self, contender: str, asked: Asked) -> Answer | None:
        """An answer that is there. ValueError: it is to another question of this name."""
        answer = self.answers.get((contender, *asked.key))
        if answer is not None:
            name, expected = asked.question.name, asked.question.answers[0]
            self._compare(f"question {name} with the answer", answer.expected, expected)
        return answer

    def add(self, answer: Answer) -> None:
        """Keep an answer, at once."""
        self._take(answer)
        self._append(asdict(answer))

    def add_times(self, asked: Asked, times: Mapping[str, float | None]) -> None:
        """Keep how many seconds contenders took in a round of turns, at once."""
        self.times[asked.key] = times
        length, seed, question = asked.key
        self._append({"length": length, "seed": seed, "question": question, "times": times})

    def _take(self, answer: Answer) -> None:
        self.answers[answer.contender, answer.length, answer.seed, answer.question] = answer

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))

    def _compare(self, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise ValueError(
                f"{self.path} has {what} {quoted(found)}, but these would be with {quoted(wanted)}. Write to another "
                "folder with --out, or remove the file."
            )


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"

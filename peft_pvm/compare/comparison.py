"""A comparison: what each contender answered, question by question, and what can be told from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from ..folders.data_file import holding, read_json
from .contenders import BASE, Contender
from .journal import Answer
from .statistics import UNCHANGED, Estimate, holm, sign_flip_p, verdict
from .tasks import Asked


TIMED = 3  # questions of each length whose answers are timed


@dataclass(frozen=True)
class Cell:
    """What a contender answered at one length, seed by seed and question by question, the same for all contenders.

    Attributes:
        right: How much of each answer is right.
        tokens: How many each has.
        seconds: What the first of them took, in turns with the other contenders; empty if it refused while times were
            taken.
        changed: Whether its tokens differ from those of the base's answer. `None`: that was not recorded, as in files
            of earlier versions.
    """

    right: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    changed: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, answers: Sequence[Answer], of_base: Sequence[Answer], times: Sequence[float]) -> Cell:
        """Make it from answers in order, the base's answers to the same questions, and the times of the first."""
        right, tokens = (tuple(getattr(answer, name) for answer in answers) for name in ("right", "tokens"))
        seconds = tuple(float(f"{one:.4g}") for one in times)
        if any(answer.token_ids is None for answer in (*answers, *of_base)):
            return cls(right, tokens, seconds)
        changed = tuple(mine.token_ids != base.token_ids for mine, base in zip(answers, of_base))
        return cls(right, tokens, seconds, changed)

    @property
    def num_changed(self) -> int | None:
        """How many answers differ from the base's."""
        return None if self.changed is None else sum(self.changed)

    @property
    def milliseconds_of_a_token(self) -> float | None:
        """The median over answers that were timed. The prompt's time is in it."""
        times = [1000 * seconds / max(tokens, 1) for seconds, tokens in zip(self.seconds, self.tokens)]
        return median(times) if times else None


@dataclass(frozen=True)
class Finding:
    """What can be told of a contender at one length.

    Attributes:
        accuracy: Over questions.
        difference: To the base, paired by question.
        p: Of the difference, by the exact sign-flip test.
        corrected: The same by Holm's method, over all contenders and lengths.
        verdict: What follows.
        slowdown: The time of an answer, as a multiple of the base's: the median over answers that were timed.
        changed: How many answers differ from the base's; `None`: not recorded.
    """

    accuracy: Estimate
    difference: Estimate
    p: float
    corrected: float
    verdict: str
    slowdown: float | None
    changed: int | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        about: Model, task, settings and machine.
        contenders: The settings of each, by name, in order.
        asked: Seed and name of each question, in order.
        cells: By contender and length.
        refused: By contender that refused, the reason.
        idle: By contender that has nothing to do on this model, the reason.
    """

    about: Mapping[str, Any]
    contenders: Mapping[str, Mapping[str, Any]]
    asked: Sequence[tuple[int, str]]
    cells: Mapping[str, Mapping[int, Cell]]
    refused: Mapping[str, str]
    idle: Mapping[str, str]

    @classmethod
    def of(
        cls,
        about: Mapping[str, Any],
        entered: Sequence[Contender],
        asked: Sequence[Asked],
        answers: Mapping[tuple[str, int, int, str], Answer],
        times: Mapping[tuple[int, int, str], Mapping[str, float | None]],
        refused: Mapping[str, str],
        idle: Mapping[str, str],
    ) -> Comparison:
        """Make it from single answers and their times. A length that a contender did not finish is left out."""
        lengths = sorted({one.length for one in asked})
        by_length = {length: [one.key for one in asked if one.length == length] for length in lengths}
        cells: dict[str, dict[int, Cell]] = {contender.name: {} for contender in entered}
        for length, keys in by_length.items():
            of_base = _found(answers, BASE, keys)
            for name, of_contender in cells.items():
                if len(mine := _found(answers, name, keys)) == len(keys):
                    seconds = [times.get(key, {}).get(name) for key in keys[:TIMED]]
                    known = [one for one in seconds if one is not None]
                    of_contender[length] = Cell.of(mine, of_base, known if len(known) == len(seconds) else [])
        questions = [(seed, name) for _, seed, name in by_length[lengths[0]]]
        settings = {contender.name: contender.settings() for contender in entered}
        return cls(about, settings, questions, cells, refused, idle)

    @property
    def lengths(self) -> list[int]:
        """The lengths of text of all contenders, in tokens."""
        return sorted({length for by_length in self.cells.values() for length in by_length})

    @property
    def num_questions(self) -> int:
        """How many different questions there are. Those of one name under several seeds are the same question."""
        return len({name for _, name in self.asked})

    @property
    def tests(self) -> int:
        """How many differences to the base are tested."""
        return len(self.findings) - len(self.cells[BASE])

    def changed(self, contender: str) -> int | None:
        """How many answers differ from the base's, over all lengths. `None`: not recorded, or there are none."""
        found = [cell.num_changed for cell in self.cells[contender].values()]
        return sum(found) if found and None not in found else None  # type: ignore[arg-type]

    def accuracies(self, contender: str, lengths: Sequence[int]) -> list[float]:
        """The accuracy of each question, from 0 to 1: the mean over seeds and lengths."""
        by_length = [self._sums(contender, length) for length in lengths]
        most = len(self.asked) / self.num_questions * self.about["asked"]
        return [fmean(sums) / most for sums in zip(*by_length)]

    def slowdown(self, contender: str, lengths: Sequence[int]) -> float | None:
        """The time of an answer as a multiple of the base's to the same question: the median over timed answers.

        `None` if there are none at one of the lengths.
        """
        ratios: list[float] = []
        for length in lengths:
            mine, base = (self.cells[name][length].seconds for name in (contender, BASE))
            if not mine:
                return None
            ratios += [own / of_base for own, of_base in zip(mine, base, strict=True)]
        return median(ratios)

    @cached_property
    def findings(self) -> dict[tuple[str, int], Finding]:
        """What can be told of each contender, by contender and length, the base included."""
        keys = [(name, length) for name, by_length in self.cells.items() for length in by_length]
        tested = [key for key in keys if key[0] != BASE]
        p_values = [sign_flip_p(self._differences(*key)) for key in tested]
        p_of = {key: (p, corrected) for key, p, corrected in zip(tested, p_values, holm(p_values))}
        return {key: self._finding(*key, *p_of.get(key, (1.0, 1.0))) for key in keys}

    def _finding(self, name: str, length: int, p: float, corrected: float) -> Finding:
        mine, base = (self.accuracies(one, [length]) for one in (name, BASE))
        difference = Estimate.of([a - b for a, b in zip(mine, base)])
        said = UNCHANGED if self.changed(name) == 0 else verdict(corrected, difference.mean)
        changed, slowdown = self.cells[name][length].num_changed, self.slowdown(name, [length])
        return Finding(Estimate.of(mine), difference, p, corrected, said, slowdown, changed)

    def _differences(self, name: str, length: int) -> list[int]:
        """How much more of each question is right than with the base, over all seeds together."""
        return [mine - base for mine, base in zip(self._sums(name, length), self._sums(BASE, length))]

    def _sums(self, name: str, length: int) -> list[int]:
        """How much of each question is right, over its seeds together."""
        sums: dict[str, int] = {}
        for (_, question), right in zip(self.asked, self.cells[name][length].right):
            sums[question] = sums.get(question, 0) + right
        return list(sums.values())

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds: all numbers, and what is told from them."""
        findings = [
            {
                "contender": name,
                "length": length,
                "accuracy": found.accuracy.mean,
                "standard error": found.accuracy.standard_error,
                "difference": found.difference.mean,
                "its standard error": found.difference.standard_error,
                "p": found.p,
                "p, Holm": found.corrected,
                "verdict": None if name == BASE else found.verdict,
                "answers changed": found.changed,
                "time, base = 1": found.slowdown,
            }
            for (name, length), found in self.findings.items()
        ]
        cells = {
            name: {
                str(length): {field.name: getattr(cell, field.name) for field in dataclasses.fields(Cell)}
                for length, cell in by_length.items()
            }
            for name, by_length in self.cells.items()
        }
        return {
            "about": self.about,
            "contenders": self.contenders,
            "refused": self.refused,
            "nothing to do": self.idle,
            "findings": findings,
            "questions": self.asked,
            "answers": cells,
        }

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read what `save` wrote as JSON.

        Raises:
            OSError: There is no such file.
            ValueError: It holds something else.
        """
        content = read_json(path)
        with holding(path, "what peft-pvm compare writes"):
            asked = [(int(seed), str(name)) for seed, name in content["questions"]]
            cells = {
                str(name): {int(length): _cell(cell, len(asked)) for length, cell in by_length.items()}
                for name, by_length in content["answers"].items()
            }
            refused, idle = (
                {str(name): str(reason) for name, reason in reasons.items()}
                for reasons in (content["refused"], content.get("nothing to do", {}))
            )
            loaded = cls(dict(content["about"]), dict(content["contenders"]), asked, cells, refused, idle)
            _ = loaded.findings  # takes everything apart
        return loaded


def _found(
    answers: Mapping[tuple[str, int, int, str], Answer], contender: str, keys: Sequence[tuple[int, int, str]]
) -> list[Answer]:
    return [answer for key in keys if (answer := answers.get((contender, *key))) is not None]


def _cell(content: Mapping[str, Any], answers: int) -> Cell:
    right, tokens = (tuple(map(int, content[name])) for name in ("right", "tokens"))
    changed = None if content.get("changed") is None else tuple(map(bool, content["changed"]))
    cell = Cell(right, tokens, tuple(map(float, content["seconds"])), changed)
    lists = [cell.right, cell.tokens, *([] if changed is None else [changed])]
    if {len(values) for values in lists} != {answers} or len(cell.seconds) not in (0, min(TIMED, answers)):
        raise ValueError("a list has another length than the questions")
    return cell

"""A finding about the real base: what it is measured with, and the JSON file that keeps each number at once."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from peft_pvm.demo.mosaic import Batch, Split
from peft_pvm.demo.questions import Turn
from peft_pvm.demo.train import step_generator
from peft_pvm.env import environment
from peft_pvm.folders.base_checkpoint import SINGLE
from peft_pvm.folders.data_file import holding, read_json, write_json
from peft_pvm.utils.terminal import say

from ...base import fingerprint
from ..arithmetic import BF16, bf16
from ..runs import load_base, load_questions


MEASURED_TO_ITS_END = "a finding that python -m experiments real-findings measured to its end"
ABOUT = ("finding", "base", "split", "seed", "rows")
Cell = dict[str, Any]  # what was measured under one condition
Cells = dict[str, dict[str, Cell]]  # by case, such as a method, and by condition, such as tokens of text


@dataclass
class Study:
    """What one finding is measured with. Every cell is written as soon as it is there, and is not measured again.

    Args:
        finding: Its name.
        base: Folder of the real base.
        path: The JSON file, read if it is there.
        rows: Rows of nine questions in a cell, or what the finding counts instead.
        split: Where digits and text come from.
        seed: Decides them.
        adapters: Folders of adapters, or several with `+` between, for a finding that tests adapters.
        gguf: The GGUF file of the language model under the base, for a finding that compares with it.

    Attributes:
        cells: What was measured.

    Raises:
        FileNotFoundError: There is no such base.
        ValueError: The base or the file cannot be read, or the file is about something else.
    """

    finding: str
    base: str | os.PathLike
    path: Path
    rows: int
    split: Split = "test"
    seed: int = 0
    adapters: tuple[str, ...] = ()
    gguf: Path | None = None
    cells: Cells = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.questions = load_questions(self.base)
        about = (self.finding, fingerprint(Path(self.base, SINGLE)), self.split, self.seed, self.rows)
        self.about = dict(zip(ABOUT, about))
        self._arithmetic = bf16()
        self._read()

    def _read(self) -> None:
        """Take up the cells in the file, of which another process may have added some since."""
        if self.path.is_file():
            recorded = read_finding(self.path)
            self._refuse_others(recorded.about, self.about)
            self._arithmetic = {BF16: recorded.environment.get(BF16, "unknown")}
            for case, cells in recorded.cells.items():
                self.cells[case] = {**cells, **self.cells.get(case, {})}

    def clear(self) -> None:
        """Forget all cells, also those in the file."""
        self.cells.clear()
        self.path.unlink(missing_ok=True)

    @functools.cached_property
    def model(self) -> LlavaForConditionalGeneration:
        """The base, read once it is needed, without adapters."""
        return self.fresh_model()

    def fresh_model(self) -> LlavaForConditionalGeneration:
        """The base, read anew."""
        return load_base(self.base)

    def draw(self, row: int, text_tokens: int = 0, split: Split | None = None) -> Batch:
        """A row of the task look-up, the same that `real-eval` asks; its targets are the nine digits.

        Args:
            row: Its number.
            text_tokens: Tokens of text between image and question.
            split: Another one than the study's.
        """
        generator = step_generator(self.seed, row)
        turn = Turn(text_tokens=text_tokens)
        return self.questions.only_digits(self.questions.draw(split or self.split, 1, [turn], generator))

    def cells_of(self, batch: Batch) -> torch.Tensor:
        """Which cell each digit of a row is in, by the place named before it: `(9,)`."""
        ids, asked = batch.inputs["input_ids"][0], batch.inputs["logits_to_keep"]
        named = torch.stack([ids[asked - 2], ids[asked - 1]], 1)  # row, column, space: then comes the digit
        return (named[:, None] == self.questions.places).all(-1).nonzero()[:, 1]

    def measured(self, case: str, condition: object, measure: Callable[[], Cell]) -> Cell:
        """A cell: from the file, or measured and written.

        Args:
            case: Such as a method.
            condition: Such as a number of tokens.
            measure: Measures it.

        Raises:
            ValueError: It is not in the file, whose cells were computed in another way: cells are compared to the bit.
        """
        cells = self.cells.setdefault(case, {})
        if str(condition) not in cells:
            self._refuse_others(self._arithmetic, bf16())
            start = time.process_time()
            cell = measure()
            cells[str(condition)] = {**cell, "CPU seconds": round(time.process_time() - start, 1)}
            self._read()
            self._refuse_others(self._arithmetic, bf16())
            write_json(self.path, {**self.about, "measured": self.cells, "environment": {**environment(), **bf16()}})
            say(f"{self.finding}: {case}, {condition}", err=True)
        return cells[str(condition)]

    def _refuse_others(self, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for name, wanted in here.items():
            if recorded[name] != wanted:
                raise ValueError(
                    f"{self.path} was measured with {name} {recorded[name]!r}, but this would be with {wanted!r}. "
                    "Write to another folder with --results, or remove the file."
                )


@dataclass(frozen=True)
class Recorded:
    """A finding as its file holds it.

    Attributes:
        about: What it is about: finding, base, split, seed, rows.
        cells: What was measured.
        environment: The versions and the machine of the last cell; the arithmetic of all.
    """

    about: dict[str, Any]
    cells: Cells
    environment: dict[str, str]


def read_finding(path: str | os.PathLike) -> Recorded:
    """What a study has written.

    Args:
        path: Its file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    content = read_json(path)
    with holding(path, "what python -m experiments real-findings writes"):
        about = {name: content[name] for name in ABOUT}
        cells = {
            case: {name: dict(cell) for name, cell in conditions.items()}
            for case, conditions in content["measured"].items()
        }
        return Recorded(about, cells, dict(content["environment"]))

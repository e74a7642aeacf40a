"""The lab's questions one by one, for models that generate: what some cells of a mosaic hold, or all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LogitsProcessor

from .for_trainers import cell_token, digit_token
from .mosaic import FIRST_QUERY, GRID, NUM_CELLS, Split, draw_pictures, load_material
from .questions import PLACES, ask, tell
from .train import step_generator


if TYPE_CHECKING:
    from PIL.Image import Image


ROUNDS = 6  # in which the tiny model writes a mosaic out
CELL, DIGIT_OF_CELL = re.compile(r"\[cell (\d)\]"), re.compile(r"\[digit (\d)\]")
TOLD = re.compile(r"\[cell (\d)\]\[digit (\d)\]")  # in the tiny model's tokens
DIGIT = re.compile(r"(?<!\d)\d(?!\d)")  # in words


class CellQuestion(NamedTuple):
    """A question about a mosaic.

    Attributes:
        image: The mosaic.
        question: The question.
        answer: The right answer.
    """

    image: Image
    question: str
    answer: str


def ask_in_tokens(transcription: bool, rows: int, seed: int, split: Split = "test") -> list[CellQuestion]:
    """Questions in the tokens of the tiny model: one cell a mosaic, or cell after cell, round after round.

    Args:
        transcription: Whether all cells are written out, `ROUNDS` times. The first query is given.
        rows: Mosaics.
        seed: Decides them.
        split: Where digits come from.
    """

    def write(digits: list[int], generator: torch.Generator) -> tuple[str, str]:
        first = int(torch.randint(NUM_CELLS, (), generator=generator))
        cells = [(first + step) % NUM_CELLS for step in range(ROUNDS * NUM_CELLS if transcription else 1)]
        written = "".join(cell_token(cell) + digit_token(digits[cell]) for cell in cells)
        return cell_token(first), written.removeprefix(cell_token(first))

    return [_question(row, seed, split, write) for row in range(rows)]


def ask_in_turn(seed: int, split: Split = "test") -> CellQuestion:
    """A question about all cells of a mosaic in the tokens of the tiny model, for `generate` with `CellsInTurn`.

    Args:
        seed: Decides the mosaic.
        split: Where digits come from.
    """

    def write(digits: list[int], generator: torch.Generator) -> tuple[str, str]:
        written = "".join(cell_token(cell) + digit_token(digit) for cell, digit in enumerate(digits))
        return cell_token(0), written.removeprefix(cell_token(0))

    return _question(0, seed, split, write)


class CellsInTurn(LogitsProcessor):
    """Asks the tiny model for the next cell, in the order of reading, as soon as it has answered.

    Args:
        prompt_length: Tokens of the prompt, which asks for the first cell.
    """

    def __init__(self, prompt_length: int):
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the scores of answers `(batch, vocab_size)` as they are, and allow nothing but the query elsewhere."""
        written = input_ids.shape[1] - self.prompt_length
        if written % 2 == 0:
            return scores
        query = FIRST_QUERY + (written + 1) // 2 % NUM_CELLS
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([query], device=scores.device), 0.0)


def laid_out(answer: str) -> str:
    """The digits of an answer to `ask_in_turn` as they lie in the mosaic, without a token that is not written out yet.

    Example:
        >>> print(laid_out("[digit 3][cell 1][digit 5][cell 2][digit 2][cell 3][digit 0][cell"))
        3 5 2
        0
    """
    answer = re.sub(r"\[[^]]*$", "", answer)
    spaced = CELL.sub(lambda query: " " if int(query[1]) % GRID else "\n", answer)
    return DIGIT_OF_CELL.sub(r"\1", spaced)


def ask_in_words(transcription: bool, rows: int, seed: int, split: Split = "test") -> list[CellQuestion]:
    """Questions in natural language: all nine cells of a mosaic, in an order that is drawn, or row by row.

    Args:
        transcription: Whether the order is that of reading.
        rows: Mosaics.
        seed: Decides them.
        split: Where digits come from.
    """

    def write(digits: list[int], generator: torch.Generator) -> tuple[str, str]:
        drawn = torch.randperm(NUM_CELLS, generator=generator).tolist()
        cells = range(NUM_CELLS) if transcription else drawn
        places = [PLACES[cell] for cell in cells]
        return f"\n{ask(places)}", f"Digits: {tell(places, [digits[cell] for cell in cells])}"

    return [_question(row, seed, split, write) for row in range(rows)]


Write = Callable[[list[int], torch.Generator], tuple[str, str]]  # question and answer about these digits


def _question(row: int, seed: int, split: Split, write: Write) -> CellQuestion:
    from PIL.Image import fromarray

    generator = step_generator(seed, row)
    pictures = draw_pictures(split, 1, 0, 1, generator)
    image = fromarray((pictures.mosaics[0].permute(1, 2, 0) * 255).round().byte().numpy())
    return CellQuestion(image, *write(pictures.digits[0, 0].tolist(), generator))


def cells_right(written: str, expected: str) -> int:
    """How many cells are followed by the right digit, also out of turn: a model that loses count can still look.

    Args:
        written: Question and answer, in the tiny model's tokens.
        expected: The same with the right answer.

    Example:
        >>> cells_right("[cell 0][digit 3][cell 2][digit 5]", "[cell 0][digit 3][cell 1][digit 4]")
        1
    """
    digits = dict(TOLD.findall(expected))
    return sum(digits.get(cell) == digit for cell, digit in TOLD.findall(written))


def digits_right(answer: str, expected: str) -> int:
    """How many digits of an answer in words are those expected, place by place.

    Example:
        >>> digits_right("Digits: top left 3, top right 5", "Digits: top left 3, top right 4")
        1
    """
    return sum(found == wanted for found, wanted in zip(DIGIT.findall(answer), DIGIT.findall(expected)))


def held_out_text(split: Split = "test") -> list[str]:
    """The paragraphs of a split's text, which the lab's models were not trained on."""
    return bytes(load_material(split).text.tolist()).decode().split("\n\n")

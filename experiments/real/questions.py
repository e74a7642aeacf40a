"""The mosaic task in natural language: which digits are at top left, ...? Rows of chats, in the tokens of a model."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from peft_pvm.cli.refusals import reading
from peft_pvm.demo.mosaic import CHANNELS, GRID, NUM_CELLS, NUM_DIGITS, Batch, Split, draw_pictures, load_material


PLACEHOLDER = "<empty_output>"  # of SmolLM2's special tokens, one for which its instruction tuning had no use
END_OF_TURN = "<|im_end|>"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)  # of the cells, in reading order
TOKENS_PER_ANSWER = 5  # " top", " left", " ", "2", ","


class Questions:
    """The task as one tokenizer writes it.

    Args:
        tokenizer: It must know the placeholder, and have one token for every word of an answer.

    Attributes:
        visual: The id of the placeholder.
        digits: The tokens of the ten digits, `(10,)`.
        places: The tokens of each cell's row and column, `(9, 2)`.

    Raises:
        ValueError: The tokenizer does not fit.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.visual = self._single(PLACEHOLDER)
        self.digits = torch.tensor([self._single(str(digit)) for digit in range(NUM_DIGITS)])
        self.places = torch.tensor([[self._single(f" {word}") for word in place.split()] for place in PLACES])
        for token in (" ", ",", END_OF_TURN):
            self._single(token)

    @classmethod
    def of(cls, base: str | os.PathLike) -> Questions:
        """The task as a base writes it.

        Args:
            base: Folder of the base.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: Its tokenizer does not fit.
        """
        if not os.path.isdir(base):
            raise FileNotFoundError(f"There is no folder {base}. Make the base first: make real-base")
        with reading("the real base", base):
            return cls(AutoTokenizer.from_pretrained(base))

    def draw(
        self, split: Split, rows: int, text_tokens: int, generator: torch.Generator, augmented: bool = False
    ) -> Batch:
        """Draw rows of mosaic, text and a question after all nine cells, in an order that is drawn, with the answer.

        Args:
            split: Where digits and text come from.
            rows: Number of rows.
            text_tokens: Tokens of text between image and question.
            generator: All that is drawn comes from it.
            augmented: Move digits by a pixel and add noise, so that training has more than the split's images.

        Returns:
            The targets are the whole answer with its end of turn, `(rows, 45)`; `DIGITS` are those that tell digits.

        Raises:
            ValueError: There is not so much text in the split.
        """
        pictures = draw_pictures(split, rows, 0, 1, generator)
        mosaics = augment(pictures.mosaics, generator) if augmented else pictures.mosaics
        cells = torch.rand(rows, NUM_CELLS, generator=generator).argsort(1)
        told = pictures.digits[:, 0].gather(1, cells)
        image = [*self._ids("<|im_start|>user\n"), *[self.visual] * NUM_CELLS]
        dialogue = [self._ids(_dialogue(*row)) for row in zip(cells.tolist(), told.tolist())]
        text = self.draw_text(split, rows, text_tokens, generator)
        input_ids = torch.cat([torch.tensor(image).expand(rows, -1), text, torch.tensor(dialogue)], 1)
        answer = NUM_CELLS * TOKENS_PER_ANSWER  # the last comma's place is the end of turn's
        length = input_ids.shape[1] - 1
        inputs = {
            "input_ids": input_ids[:, :-1],
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
            "pixel_values": mosaics * 2 - 1,
            "logits_to_keep": torch.arange(length - answer, length),
        }
        return Batch(inputs, input_ids[:, -answer:])

    def draw_text(self, split: Split, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw pieces of a split's text, `(rows, length)` tokens.

        Raises:
            ValueError: There is not so much.
        """
        text = self._text(split)
        if length > len(text):
            raise ValueError(f"text_tokens is {length}, but the text of {split!r} has only {len(text)} tokens.")
        starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
        return text[starts + torch.arange(length)]

    @functools.cache  # noqa: B019  there are few of these objects, and they live as long as a command
    def _text(self, split: Split) -> torch.Tensor:
        """Python's help topics of one split, as tokens."""
        return torch.tensor(self._ids(bytes(load_material(split).text.tolist()).decode()))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _single(self, text: str) -> int:
        ids = self._ids(text)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"{text!r} must be one token of the language model, but its tokenizer makes {ids} of it.")
        return ids[0]


DIGITS = slice(3, None, TOKENS_PER_ANSWER)  # among the targets


def only_digits(batch: Batch) -> Batch:
    """The same rows with the digits alone as targets, `(rows, 9)`."""
    inputs = {**batch.inputs, "logits_to_keep": batch.inputs["logits_to_keep"][DIGITS]}
    return Batch(inputs, batch.targets[:, DIGITS])


def ask(cells: list[int]) -> str:
    """The question after some cells."""
    return f"Which digits are at {', '.join(PLACES[cell] for cell in cells)}?"


def tell(cells: list[int], digits: list[int]) -> str:
    """The answer to it."""
    return f"Digits: {', '.join(f'{PLACES[cell]} {digit}' for cell, digit in zip(cells, digits))}"


def _dialogue(cells: list[int], digits: list[int]) -> str:
    return f"\n{ask(cells)}{END_OF_TURN}\n<|im_start|>assistant\n{tell(cells, digits)}{END_OF_TURN}"


def augment(mosaics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move every second digit by at most a pixel in each direction, and add noise to all.

    Args:
        mosaics: `(rows, 3, height, width)`, from 0 to 1, grey.
        generator: What is drawn comes from it.
    """
    side = mosaics.shape[-1] // GRID
    tiles = mosaics[:, 0].unfold(1, side, side).unfold(2, side, side).flatten(0, 2)  # (rows * 9, side, side)
    shifted = F.pad(tiles, (1, 1, 1, 1)).unfold(1, side, 1).unfold(2, side, 1).flatten(1, 2)
    unmoved = shifted.shape[1] // 2
    shifts = torch.randint(shifted.shape[1], (len(tiles),), generator=generator)
    shifts = torch.where(torch.rand(len(tiles), generator=generator) < 0.5, shifts, unmoved)
    tiles = shifted[torch.arange(len(tiles)), shifts]
    tiles = (tiles + 0.08 * torch.randn(tiles.shape, generator=generator)).clamp(0, 1)
    rows = tiles.unflatten(0, (-1, GRID, GRID)).transpose(2, 3).flatten(3).flatten(1, 2)
    return rows[:, None].expand(-1, CHANNELS, -1, -1)

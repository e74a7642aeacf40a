"""The mosaic task in natural language: which digits are at top left, ...? Rows of chats, in the tokens of a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from .mosaic import GRID, NUM_CELLS, NUM_DIGITS, Batch, Pictures, Split, draw_pictures, load_material


PLACEHOLDER = "<empty_output>"  # of SmolLM2's special tokens, one for which its instruction tuning had no use
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
COLOURS = ("red", "green", "blue")  # of the pictures in a chat with several; a single one is grey
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)  # of the cells, in reading order


@dataclass(frozen=True)
class Turn:
    """One turn of a chat: pictures, text, and a question about cells of a picture of this turn or an earlier one.

    Attributes:
        shown: Number of new pictures.
        text_tokens: Tokens of text between them and the question.
        cells: Number of cells that are asked for.
        interfering: Whether the text tells of other pictures in the words of an answer; otherwise it is about Python.
        in_words: Whether the new pictures are told in words, and not shown.
    """

    shown: int = 1
    text_tokens: int = 0
    cells: int = NUM_CELLS
    interfering: bool = False
    in_words: bool = False


@dataclass(frozen=True)
class Said:
    """What a turn of one chat says, but for its text.

    Attributes:
        pictures: The new pictures in words.
        question: The question.
        answer: The answer.
    """

    pictures: str
    question: str
    answer: str


class Questions:
    """The task as one tokenizer writes it.

    Args:
        tokenizer: It must know the placeholder, and have one token for every word of an answer.

    Attributes:
        visual: The id of the placeholder.
        digits: The tokens of the ten digits, `(10,)`.
        places: The tokens of each cell's row and column, `(9, 2)`.
        colours: The tokens of the three colours, `(3,)`.

    Raises:
        ValueError: The tokenizer does not fit.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.visual = self._single(PLACEHOLDER)
        self.digits = torch.tensor([self._single(str(digit)) for digit in range(NUM_DIGITS)])
        self.places = torch.tensor([[self._single(f" {word}") for word in place.split()] for place in PLACES])
        self.colours = torch.tensor([self._single(f" {colour}") for colour in COLOURS])
        for token in (" ", ",", START_OF_TURN, END_OF_TURN):
            self._single(token)

    @classmethod
    def of(cls, base: str | os.PathLike) -> Questions:
        """The task as a base writes it.

        Args:
            base: Folder of the base.

        Raises:
            FileNotFoundError: There is no such folder.
            OSError: Its tokenizer cannot be read.
            ValueError: Its tokenizer does not fit.
        """
        if not os.path.isdir(base):
            raise FileNotFoundError(f"There is no folder {base}. Make the base first: make real-base")
        return cls(AutoTokenizer.from_pretrained(base))

    def draw(
        self,
        split: Split,
        rows: int,
        turns: Sequence[Turn],
        generator: torch.Generator,
        augmented: bool = False,
        on_text: bool = False,
    ) -> Batch:
        """Draw rows of chats. With one generator, chats that differ only in their text show and ask the same.

        Args:
            split: Where digits and text come from.
            rows: Number of rows.
            turns: The shape of the chats.
            generator: All that is drawn comes from it.
            augmented: Move digits by a pixel and add noise, so that training has more than the split's images.
            on_text: Text and questions are targets too.

        Returns:
            The targets are the answers with their ends of turn, or with `on_text` all tokens but the visual ones and
            the first, `(rows, tokens)`.

        Raises:
            ValueError: There is not so much text in the split, or a turn asks for more cells than are left.
        """
        pictures = draw_pictures(split, rows, 0, sum(turn.shown for turn in turns), generator)
        mosaics = augment(pictures.mosaics, generator) if augmented else pictures.mosaics
        mosaics = mosaics[torch.tensor([not turn.in_words for turn in turns for _ in range(turn.shown)] * rows)]
        chats = [converse(turns, pictures, row, generator) for row in range(rows)]
        texts = [self.draw_text(split, rows, turn, generator).tolist() for turn in turns]
        tokens = [list(self._tokens(turns, chat, [text[row] for text in texts])) for row, chat in enumerate(chats)]
        input_ids = torch.tensor([[token for token, _ in row] for row in tokens])
        if on_text:
            counts = input_ids[0] != self.visual
            counts[0] = False  # nothing comes before it
        else:
            counts = torch.tensor([is_answer for _, is_answer in tokens[0]])
        targets = counts.nonzero()[:, 0]
        inputs = {
            "input_ids": input_ids[:, :-1],
            "attention_mask": torch.ones_like(input_ids[:, :-1]),
            "logits_to_keep": targets - 1,
        }
        if len(mosaics):
            inputs["pixel_values"] = mosaics * 2 - 1
        return Batch(inputs, input_ids[:, targets])

    def draw_text(self, split: Split, rows: int, turn: Turn, generator: torch.Generator) -> torch.Tensor:
        """Draw the text of a turn, `(rows, text_tokens)` tokens.

        Raises:
            ValueError: There is not so much in the split.
        """
        length = turn.text_tokens
        if turn.interfering:
            return torch.tensor([self._of_other_pictures(length, generator) for _ in range(rows)]).view(rows, length)
        text = self._text(split)
        if length > len(text):
            raise ValueError(f"text_tokens is {length}, but the text of {split!r} has only {len(text)} tokens.")
        starts = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
        return text[starts + torch.arange(length)]

    def only_digits(self, batch: Batch) -> Batch:
        """The same rows with only the digits as targets, `(rows, cells asked for)`."""
        digits = torch.isin(batch.targets[0], self.digits)
        inputs = {**batch.inputs, "logits_to_keep": batch.inputs["logits_to_keep"][digits]}
        return Batch(inputs, batch.targets[:, digits])

    def _tokens(
        self, turns: Sequence[Turn], chat: Sequence[Said], texts: Sequence[list[int]]
    ) -> Iterator[tuple[int, bool]]:
        """The tokens of a chat, and whether each belongs to an answer."""
        opening = f"{START_OF_TURN}user\n"
        for turn, said, text in zip(turns, chat, texts):
            pictures = self._ids(said.pictures) if turn.in_words else [self.visual] * (turn.shown * NUM_CELLS)
            asked = [*self._ids(opening), *pictures, *text]
            asked += self._ids(f"\n{said.question}{END_OF_TURN}\n{START_OF_TURN}assistant\n")
            yield from ((token, False) for token in asked)
            yield from ((token, True) for token in self._ids(f"{said.answer}{END_OF_TURN}"))
            opening = f"\n{START_OF_TURN}user\n"

    def _of_other_pictures(self, length: int, generator: torch.Generator) -> list[int]:
        """Text that tells of pictures that are not there, to its end."""
        tokens: list[int] = []
        while len(tokens) < length:
            places = [PLACES[cell] for cell in torch.randperm(NUM_CELLS, generator=generator)]
            digits = torch.randint(NUM_DIGITS, (NUM_CELLS,), generator=generator).tolist()
            tokens += self._ids(f"Another picture has {tell(places, digits)}.\n")
        return tokens[len(tokens) - length :]

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


def converse(turns: Sequence[Turn], pictures: Pictures, row: int, generator: torch.Generator) -> list[Said]:
    """Draw what is asked about the pictures of a chat, and answer it. No cell of a picture is asked for twice.

    Args:
        turns: The shape of the chat.
        pictures: The pictures of all rows.
        row: Which row the chat is.
        generator: Decides pictures and cells.

    Raises:
        ValueError: A turn asks for more cells than are left of any picture.
    """
    digits, colours = pictures.digits[row].tolist(), pictures.colours[row].tolist()
    left: list[list[int]] = []  # of each picture so far, the cells that nobody has asked for
    chat = []
    for turn in turns:
        left += [torch.randperm(NUM_CELLS, generator=generator).tolist() for _ in range(turn.shown)]
        eligible = [picture for picture, cells in enumerate(left) if len(cells) >= turn.cells]
        if not eligible:
            raise ValueError(f"{turn} asks for more cells than are left of any picture.")
        picture = eligible[int(torch.randint(len(eligible), (), generator=generator))]
        cells, left[picture] = left[picture][: turn.cells], left[picture][turn.cells :]
        names = [f"{COLOURS[colour]} " if len(digits) > 1 else "" for colour in colours]
        places = [f"{names[picture]}{PLACES[cell]}" for cell in cells]
        answer = f"Digits: {tell(places, [digits[picture][cell] for cell in cells])}"
        new = range(len(left) - turn.shown, len(left))
        in_words = " ".join(f"The {names[one]}picture has {tell(PLACES, digits[one])}." for one in new)
        chat.append(Said(in_words, ask(places), answer))
    return chat


def ask(places: Sequence[str]) -> str:
    """The question about the digits at some places, like "top left", or "red top left" where there are several."""
    return f"Which digits are at {', '.join(places)}?"


def tell(places: Sequence[str], digits: Sequence[int]) -> str:
    """What the digits at some places are."""
    return ", ".join(f"{place} {digit}" for place, digit in zip(places, digits))


def augment(mosaics: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move every second digit by at most a pixel in each direction, and add noise to all.

    Args:
        mosaics: `(pictures, 3, height, width)`, from 0 to 1, each in one colour.
        generator: What is drawn comes from it.
    """
    side = mosaics.shape[-1] // GRID
    tiles = mosaics.amax(1).unfold(1, side, side).unfold(2, side, side).flatten(0, 2)  # (pictures * 9, side, side)
    shifted = F.pad(tiles, (1, 1, 1, 1)).unfold(1, side, 1).unfold(2, side, 1).flatten(1, 2)
    unmoved = shifted.shape[1] // 2
    shifts = torch.randint(shifted.shape[1], (len(tiles),), generator=generator)
    shifts = torch.where(torch.rand(len(tiles), generator=generator) < 0.5, shifts, unmoved)
    tiles = shifted[torch.arange(len(tiles)), shifts]
    tiles = (tiles + 0.08 * torch.randn(tiles.shape, generator=generator)).clamp(0, 1)
    moved = tiles.unflatten(0, (-1, GRID, GRID)).transpose(2, 3).flatten(3).flatten(1, 2)
    colour = mosaics.amax((2, 3)) > 0  # (pictures, 3)
    return moved[:, None] * colour[:, :, None, None]

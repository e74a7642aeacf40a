"""The task "visual recall": mosaics of handwritten digits, then English text, then: which digit does cell c hold?

Its long form, transcription, has the model write out the cells of a mosaic one by one, over and over.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ..utils.extras import require


GRID = 3  # cells along a side of the mosaic
NUM_CELLS = GRID * GRID
NUM_DIGITS = 10
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE, CHANNELS = 4, 2, 2, 3  # one merged token is one cell of 8 x 8 pixels
NUM_BYTES = 256
PAD, IMAGE, VIDEO, VISION_START, VISION_END = range(NUM_BYTES, NUM_BYTES + 5)
NUM_COLOURS = CHANNELS
FIRST_QUERY = NUM_BYTES + 5  # one token per cell asks for it, of a grey mosaic and of one of each colour
FIRST_ANSWER = FIRST_QUERY + (1 + NUM_COLOURS) * NUM_CELLS  # one token per digit
VOCAB_SIZE = FIRST_ANSWER + NUM_DIGITS
IMAGE_LENGTH = NUM_CELLS + 2  # tokens of one mosaic, vision start and vision end included

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, eq=False)
class Material:
    """What questions are made from.

    Attributes:
        images: Digits, `(num_images, 8, 8)`, float32, from 0 to 1.
        labels: The digit each shows, `(num_images,)`, int64.
        text: English prose, `(num_bytes,)`, int64, one byte each.
    """

    images: torch.Tensor
    labels: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of mosaics, text and dialogue.

    Attributes:
        inputs: Keyword arguments of a Qwen3-VL forward, with `logits_to_keep`: the model returns logits only at the
            tokens before the targets, `(rows, targets, vocab_size)`.
        targets: The tokens that are right there, `(rows, targets)`, int64.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device."""
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.targets.to(device))

    def parts(self, tokens: int) -> list[Batch]:
        """The same rows as several batches, each of at most so many tokens and at least one row.

        Args:
            tokens: Their number, padding included.
        """
        rows, length = self.inputs["input_ids"].shape
        at_once = max(1, tokens // length)
        if at_once >= rows:
            return [self]
        of_all_rows = {"logits_to_keep": self.inputs["logits_to_keep"]}
        split = {
            name: tensor.split(at_once * (len(tensor) // rows))  # of pictures, each row has as many
            for name, tensor in self.inputs.items()
            if name not in of_all_rows
        }
        return [
            Batch({name: parts[part] for name, parts in split.items()} | of_all_rows, targets)
            for part, targets in enumerate(self.targets.split(at_once))
        ]


def split_of(content: bytes) -> Split:
    """The split that a piece of material belongs to: about one in five to "test", one in ten to "validation".

    It depends only on the content, so that no image and no text can be in two, and a topic that a later Python adds
    does not move the others.
    """
    remainder = zlib.crc32(content) % 10
    return "test" if remainder in (0, 5) else "validation" if remainder == 1 else "train"


@functools.cache
def load_material(split: Split) -> Material:
    """The digits of scikit-learn and the text of Python's help topics, one part of a fixed split.

    Args:
        split: "train", "validation" (to choose settings by) or "test". Images are split one by one, text topic by
            topic.

    Raises:
        ValueError: Another split.
        ImportError: scikit-learn is not installed.
    """
    if split not in get_args(Split):
        raise ValueError(f"The split is {split!r}, but must be one of {get_args(Split)}.")
    require("lab", "sklearn")
    from sklearn.datasets import load_digits  # here: training scripts import this module only for its token ids

    digits = load_digits()
    chosen = [split_of(image.tobytes()) == split for image in digits.images]
    texts = sorted(set(topics.values()))  # a few topics share one
    text = "\n\n".join(text for text in texts if split_of(text.encode()) == split)
    return Material(
        torch.from_numpy(digits.images[chosen]).float() / 16,
        torch.from_numpy(digits.target[chosen]).long(),
        torch.tensor(list(text.encode())),
    )


def patchify(mosaics: torch.Tensor) -> torch.Tensor:
    """Cut images into the flat patches that Qwen3-VL takes, as `Qwen2VLImageProcessor` orders them.

    Patches come one merge block after the other; inside a patch, channels come first and every frame comes twice,
    since the model takes frames in pairs.

    Args:
        mosaics: `(images, 3, height, width)`, float32, from 0 to 1, both sides multiples of 8.

    Returns:
        `(images * height * width / 16, 96)`, from -1 to 1: pixels are normalised with mean 0.5 and deviation 0.5.
    """
    images, channels, height, width = mosaics.shape
    block = PATCH_SIZE * MERGE_SIZE
    patches = (mosaics * 2 - 1).reshape(
        images, channels, height // block, MERGE_SIZE, PATCH_SIZE, width // block, MERGE_SIZE, PATCH_SIZE
    )
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]
    patches = patches.expand(*patches.shape[:6], TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
    return patches.flatten(5).flatten(0, 4)


def make_questions(
    split: Split, rows: int, distractor_length: int, questions: int, generator: torch.Generator, images: int = 1
) -> Batch:
    """Draw mosaics, text and questions.

    A row is: the mosaics, each vision start, 9 image tokens and vision end; the distractor; then query, answer, query,
    answer, ..., query. One mosaic is grey. Several have a colour each, drawn at random, and a query names colour and
    cell. The cells asked for in a row are distinct, so no answer gives another away.

    Args:
        split: Where digits and text come from.
        rows: Number of rows.
        distractor_length: Bytes of text between the mosaics and the first question.
        questions: Questions a row, 1 to 9.
        generator: All that is drawn comes from it.
        images: Mosaics a row, 1 to 3.

    Raises:
        ValueError: A number out of its range.
    """
    _check_range("questions", questions, 1, NUM_CELLS)
    pictures = draw_pictures(split, rows, distractor_length, images, generator)
    cells = torch.rand(rows, NUM_CELLS, generator=generator).argsort(1)[:, :questions]
    asked = torch.randint(images, (rows, questions), generator=generator)
    answers = FIRST_ANSWER + pictures.digits[torch.arange(rows)[:, None], asked, cells]
    queries = FIRST_QUERY + cells
    if images > 1:
        queries = queries + (1 + pictures.colours.gather(1, asked)) * NUM_CELLS
    dialogue = torch.stack([queries, answers], 2).flatten(1)[:, :-1]
    first = images * IMAGE_LENGTH + distractor_length
    return Batch(_inputs(pictures, dialogue, first + 2 * torch.arange(questions)), answers)


def make_transcriptions(
    split: Split, rows: int, distractor_length: int, written_cells: int, generator: torch.Generator
) -> Batch:
    """Draw grey mosaics and text, and write out the cells: query, answer, query, answer, ..., answer.

    The first cell of a row is drawn; every other one is the next in reading order, and the first follows the last.
    The targets are all tokens after the first query, `(rows, 2 * written_cells - 1)`.

    Args:
        split: Where digits and text come from.
        rows: Number of rows.
        distractor_length: Bytes of text between the mosaic and the first query.
        written_cells: Cells a row, at least 1. From the tenth on, the answer is in the text before.
        generator: All that is drawn comes from it.

    Raises:
        ValueError: A number out of its range.
    """
    _check_range("written_cells", written_cells, 1)
    pictures = draw_pictures(split, rows, distractor_length, 1, generator)
    cells = (torch.randint(NUM_CELLS, (rows, 1), generator=generator) + torch.arange(written_cells)) % NUM_CELLS
    answers = FIRST_ANSWER + pictures.digits[:, 0].gather(1, cells)
    dialogue = torch.stack([FIRST_QUERY + cells, answers], 2).flatten(1)
    first = IMAGE_LENGTH + distractor_length
    inputs = _inputs(pictures, dialogue[:, :-1], torch.arange(first, first + 2 * written_cells - 1))
    return Batch(inputs, dialogue[:, 1:])


@dataclass(frozen=True, eq=False)
class Pictures:
    """The part of a batch before the dialogue.

    Attributes:
        mosaics: `(rows * images, 3, height, width)`.
        digits: In each cell, row by row from the top left, `(rows, images, 9)`.
        colours: Of each mosaic, `(rows, images)`; without meaning where there is one.
        input_ids: The mosaics' tokens and the text, `(rows, length)`.
    """

    mosaics: torch.Tensor
    digits: torch.Tensor
    colours: torch.Tensor
    input_ids: torch.Tensor


def draw_pictures(
    split: Split, rows: int, distractor_length: int, images: int, generator: torch.Generator
) -> Pictures:
    """Draw mosaics and text; the arguments are those of `make_questions`.

    Raises:
        ValueError: A number out of its range.
    """
    material = load_material(split)
    longest = len(material.text)
    _check_range("rows", rows, 1)
    _check_range("distractor_length", distractor_length, 0, longest)
    _check_range("images", images, 1, NUM_COLOURS)

    chosen = torch.randint(len(material.labels), (rows, images, NUM_CELLS), generator=generator)
    tiles = material.images[chosen].flatten(0, 1).unflatten(1, (GRID, GRID))
    mosaics = tiles.transpose(2, 3).flatten(3).flatten(1, 2)[:, None].expand(-1, CHANNELS, -1, -1)
    colours = torch.rand(rows, NUM_COLOURS, generator=generator).argsort(1)[:, :images]
    if images > 1:
        mosaics = mosaics * F.one_hot(colours.flatten(), NUM_COLOURS)[:, :, None, None]

    starts = torch.randint(longest - distractor_length + 1, (rows, 1), generator=generator)
    text = material.text[starts + torch.arange(distractor_length)]
    tokens = torch.tensor([VISION_START, *[IMAGE] * NUM_CELLS, VISION_END]).repeat(images).expand(rows, -1)
    return Pictures(mosaics, material.labels[chosen], colours, torch.cat([tokens, text], 1))


def _inputs(pictures: Pictures, dialogue: torch.Tensor, logits_to_keep: torch.Tensor) -> dict[str, torch.Tensor]:
    input_ids = torch.cat([pictures.input_ids, dialogue], 1)
    side = GRID * MERGE_SIZE
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": patchify(pictures.mosaics),
        "image_grid_thw": torch.tensor([[1, side, side]]).expand(len(pictures.mosaics), -1),
        "logits_to_keep": logits_to_keep,
    }


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}, but must be at least {low}" + (f" and at most {high}." if high else "."))

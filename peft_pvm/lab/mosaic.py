"""The task "visual recall": a mosaic of handwritten digits, then English text, then: which digit does cell c hold?"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Literal, get_args

import torch
from sklearn.datasets import load_digits


GRID = 3  # cells along a side of the mosaic
NUM_CELLS = GRID * GRID
NUM_DIGITS = 10
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE, CHANNELS = 4, 2, 2, 3  # one merged token is one cell of 8 x 8 pixels
NUM_BYTES = 256
PAD, IMAGE, VIDEO, VISION_START, VISION_END = range(NUM_BYTES, NUM_BYTES + 5)
FIRST_QUERY = NUM_BYTES + 5  # one token per cell asks for it
FIRST_ANSWER = FIRST_QUERY + NUM_CELLS  # one token per digit
VOCAB_SIZE = FIRST_ANSWER + NUM_DIGITS
PREFIX_LENGTH = NUM_CELLS + 2

Split = Literal["train", "test"]


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
    """Questions about mosaics, one mosaic a row.

    Attributes:
        inputs: Keyword arguments of a Qwen3-VL forward, `logits_to_keep` included: the logits come at the query
            tokens, `(rows, questions, vocab_size)`.
        answers: The right answer tokens, `(rows, questions)`, int64.
        cells: The cells asked for, `(rows, questions)`, int64, row by row from the top left.
    """

    inputs: dict[str, torch.Tensor]
    answers: torch.Tensor
    cells: torch.Tensor


def is_held_out(content: bytes) -> bool:
    """Whether a piece of material belongs to the test split: about one in five does.

    It depends on the content alone, so that no image can be on both sides, and a topic that a later Python adds does
    not move the others.
    """
    return zlib.crc32(content) % 5 == 0


@functools.cache
def load_material(split: Split) -> Material:
    """The digits of scikit-learn and the text of Python's help topics, one side of a fixed split.

    Args:
        split: "train" or "test". Images are split one by one, text topic by topic.

    Raises:
        ValueError: Another split.
    """
    if split not in get_args(Split):
        raise ValueError(f"The split is {split!r}, but must be one of {get_args(Split)}.")
    wanted = split == "test"
    digits = load_digits()
    chosen = [is_held_out(image.tobytes()) == wanted for image in digits.images]
    text = "\n\n".join(topics[topic] for topic in sorted(topics) if is_held_out(topic.encode()) == wanted)
    return Material(
        torch.from_numpy(digits.images[chosen]).float() / 16,
        torch.from_numpy(digits.target[chosen]).long(),
        torch.tensor(list(text.encode())),
    )


def patchify(mosaics: torch.Tensor) -> torch.Tensor:
    """Cut images into the flat patches that Qwen3-VL takes, as `Qwen2VLImageProcessor` orders them.

    Patches come one merge block after the other; inside a patch, channels come first and every frame stands twice,
    since the model takes frames in pairs.

    Args:
        mosaics: `(rows, height, width)`, float32, from 0 to 1, both sides multiples of 8.

    Returns:
        `(rows * height * width / 16, 96)`, from -1 to 1: pixels are normalised with mean 0.5 and deviation 0.5.
    """
    rows, height, width = mosaics.shape
    block = PATCH_SIZE * MERGE_SIZE
    patches = (mosaics * 2 - 1).reshape(
        rows, height // block, MERGE_SIZE, PATCH_SIZE, width // block, MERGE_SIZE, PATCH_SIZE
    )
    patches = patches.permute(0, 1, 4, 2, 5, 3, 6)[..., None, None, :, :]
    patches = patches.expand(*patches.shape[:5], CHANNELS, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
    return patches.flatten(5).flatten(0, 4)


def make_batch(split: Split, rows: int, distractor_length: int, questions: int, generator: torch.Generator) -> Batch:
    """Draw mosaics, text and questions.

    A row is: vision start, 9 image tokens, vision end, the distractor, then query, answer, query, answer, ..., query.
    The cells of a row are distinct, so no answer given in the row tells another.

    Args:
        split: Where digits and text come from, "train" or "test".
        rows: Number of mosaics.
        distractor_length: Bytes of text between the mosaic and the first question.
        questions: Questions a row, 1 to 9.
        generator: All that is drawn comes from it.

    Raises:
        ValueError: A number out of its range.
    """
    material = load_material(split)
    longest = len(material.text)
    for name, value, low, high in (
        ("rows", rows, 1, None),
        ("distractor_length", distractor_length, 0, longest),
        ("questions", questions, 1, NUM_CELLS),
    ):
        if value < low or (high is not None and value > high):
            raise ValueError(
                f"{name} is {value}, but must be at least {low}" + (f" and at most {high}." if high else ".")
            )

    chosen = torch.randint(len(material.labels), (rows, NUM_CELLS), generator=generator)
    digits = material.labels[chosen]
    tiles = material.images[chosen].unflatten(1, (GRID, GRID))
    mosaics = tiles.transpose(2, 3).flatten(3).flatten(1, 2)

    starts = torch.randint(longest - distractor_length + 1, (rows, 1), generator=generator)
    distractors = material.text[starts + torch.arange(distractor_length)]
    cells = torch.rand(rows, NUM_CELLS, generator=generator).argsort(1)[:, :questions]
    answers = FIRST_ANSWER + digits.gather(1, cells)
    dialogue = torch.stack([FIRST_QUERY + cells, answers], 2).flatten(1)[:, :-1]
    prefix = torch.tensor([VISION_START, *[IMAGE] * NUM_CELLS, VISION_END]).expand(rows, -1)
    input_ids = torch.cat([prefix, distractors, dialogue], 1)
    side = mosaics.shape[1] // PATCH_SIZE
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": patchify(mosaics),
        "image_grid_thw": torch.tensor([[1, side, side]]).expand(rows, -1),
        "logits_to_keep": PREFIX_LENGTH + distractor_length + 2 * torch.arange(questions),
    }
    return Batch(inputs, answers, cells)

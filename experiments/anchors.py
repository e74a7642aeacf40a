"""DIPE by run and by image, measured: the tiny model with several mosaics, and in a chat of several turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn

from peft_pvm.demo.mosaic import (
    FIRST_ANSWER,
    FIRST_QUERY,
    GRID,
    IMAGE,
    IMAGE_LENGTH,
    MERGE_SIZE,
    NUM_CELLS,
    Batch,
    Split,
    draw_pictures,
    patchify,
)
from peft_pvm.demo.recall import Accuracy, recall
from peft_pvm.demo.tiny_vlm import TRAINED_DISTANCE, load_tiny_vlm
from peft_pvm.demo.train import target_logits
from peft_pvm.env import environment
from peft_pvm.folders.data_file import write_json
from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.tuners.active import attached
from peft_pvm.utils.terminal import Terminal

from .base import fingerprint


LENGTHS = (0, 64, 256, 1024)  # bytes of each piece of text
ROWS_AT_ONCE = 4
ANCHORS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "DIPE": {"max_distance": 0},
    "limited, by run": {"max_distance": TRAINED_DISTANCE},
    "limited, by image": {"max_distance": TRAINED_DISTANCE, "anchor": "image"},
    "limited, each run": {"max_distance": TRAINED_DISTANCE, "anchor": "image", "image_gap": 1},
}


def make_chat(split: Split, rows: int, distractor_length: int, about: int, generator: torch.Generator) -> Batch:
    """Draw a chat of two turns: mosaic, text, a question about it; text, another mosaic, text, eight questions.

    Args:
        split: Where digits and text come from.
        rows: Number of rows.
        distractor_length: Bytes of each of the three pieces of text.
        about: Which mosaic the eight questions are about, 0 or 1. The early question asks for another cell of 0.
        generator: All that is drawn comes from it.
    """
    pictures = draw_pictures(split, rows, 3 * distractor_length, 2, generator)
    mosaics, text = pictures.input_ids.split([2 * IMAGE_LENGTH, 3 * distractor_length], 1)
    first, second = mosaics.chunk(2, 1)
    one, two, three = text.chunk(3, 1) if distractor_length else [text] * 3
    queries = FIRST_QUERY + (1 + pictures.colours[:, :, None]) * NUM_CELLS + torch.arange(NUM_CELLS)
    answers = FIRST_ANSWER + pictures.digits
    cells = torch.rand(rows, NUM_CELLS, generator=generator).argsort(1)
    early = torch.stack([queries[:, 0].gather(1, cells[:, :1]), answers[:, 0].gather(1, cells[:, :1])], 2).flatten(1)
    later = cells[:, 1:]
    targets = answers[:, about].gather(1, later)
    dialogue = torch.stack([queries[:, about].gather(1, later), targets], 2).flatten(1)[:, :-1]
    parts = [first, one, early, two, second, three]
    input_ids = torch.cat([*parts, dialogue], 1)
    begin = sum(part.shape[1] for part in parts)
    side = GRID * MERGE_SIZE
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
        "pixel_values": patchify(pictures.mosaics),
        "image_grid_thw": torch.tensor([[1, side, side]]).expand(len(pictures.mosaics), -1),
        "logits_to_keep": begin + 2 * torch.arange(later.shape[1]),
    }
    return Batch(inputs, targets)


@torch.no_grad()
def recall_in_chat(
    model: nn.Module, distractor_length: int, rows: int, about: int, split: Split, seed: int
) -> Accuracy:
    """Ask for eight cells of one mosaic at the end of a chat.

    Args:
        model: The tiny model, with or without an adapter, in eval mode.
        distractor_length: See `make_chat`.
        rows: Chats.
        about: See `make_chat`.
        split: Where digits and text come from.
        seed: Decides them: two models tested with the same one are asked the same.
    """
    generator = torch.Generator().manual_seed(seed)
    right: list[int] = []
    for start in range(0, rows, ROWS_AT_ONCE):
        batch = make_chat(split, min(ROWS_AT_ONCE, rows - start), distractor_length, about, generator)
        right += (target_logits(model, batch).argmax(-1) == batch.targets).sum(1).tolist()
    return Accuracy(tuple(right), NUM_CELLS - 1)


def compare_anchors(rows: int, split: Split, seed: int, out: str | os.PathLike) -> None:
    """Print tables of accuracies, one row for each anchor, and write them to a file.

    Args:
        rows: Rows of questions in every cell.
        split: Where digits and text come from.
        seed: Decides the questions.
        out: The JSON file.
    """
    start = time.perf_counter()
    model = load_tiny_vlm()
    forms: dict[str, Callable[[int], Accuracy]] = {
        "chat, about the first mosaic": lambda length: recall_in_chat(model, length, rows, 0, split, seed),
        "chat, about the second": lambda length: recall_in_chat(model, length, rows, 1, split, seed),
        "two mosaics": lambda length: recall(model, length, rows, 2, split, seed),
        "three mosaics": lambda length: recall(model, length, rows, 3, split, seed),
    }
    console, found = Terminal(), {}
    tables = {form: Table(form, *map(str, LENGTHS), title="By bytes of each piece of text") for form in forms}
    for name, fields in ANCHORS.items():
        with attached(model, *([] if fields is None else [DIPEConfig(**fields)])):
            found[name] = {form: {length: test(length) for length in LENGTHS} for form, test in forms.items()}
        for form, tested in found[name].items():
            tables[form].add_row(name, *(f"{cell.value:.3f} ± {cell.standard_error:.3f}" for cell in tested.values()))
    for table in tables.values():
        console.print(table)
    right = {
        name: {form: {str(n): list(cell.right) for n, cell in tested.items()} for form, tested in by_form.items()}
        for name, by_form in found.items()
    }
    asked = {form: next(iter(tested.values())).asked for form, tested in found["base"].items()}
    write_json(
        out,
        {
            "base": fingerprint(),
            "split": split,
            "seed": seed,
            "asked in a row": asked,
            "right in each row": right,
            "environment": environment(),
        },
    )
    seconds = time.perf_counter() - start
    console.print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, {seconds:.0f} s."
    )

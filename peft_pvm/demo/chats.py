"""Visual recall as chats with images, the form in which trainers take data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import fromarray

from ..folders.replacing import replacing
from . import mosaic
from .processor import cell_token, digit_token


Form = Literal["messages", "prompts"]

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES: dict[str, Features] = {
    "messages": Features({"images": List(Image()), "messages": _MESSAGES}),
    "prompts": Features({"images": List(Image()), "prompt": _MESSAGES, "solution": Value("string")}),
}


def make_chats(
    form: Form, rows: int, max_distractor_length: int = 256, split: mosaic.Split = "train", seed: int = 0
) -> Dataset:
    """Draw mosaics, text and questions, and write them as chats.

    Args:
        form: "messages": columns `images` and `messages`, a chat that asks for all nine cells, for `SFTTrainer`.
            "prompts": `images`, `prompt` and `solution`, one question a row, for `GRPOTrainer`.
        rows: Number of chats.
        max_distractor_length: Bytes of text before the first question, at most; their number is drawn uniformly.
        split: Where digits and text come from: "train", "validation" or "test".
        seed: Decides what is drawn.

    Raises:
        ValueError: Another form, or a number out of range.
    """
    if form not in get_args(Form):
        raise ValueError(f"The form is {form!r}, but must be one of {get_args(Form)}.")
    if rows < 1:
        raise ValueError(f"rows is {rows}, but must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    chats = [_chat(form, max_distractor_length, split, generator) for _ in range(rows)]
    return Dataset.from_list(chats, features=FEATURES[form])


def write_chats(data: Dataset, folder: str | os.PathLike, split: str = "train") -> None:
    """Save chats as a folder that `datasets.load_dataset` reads.

    Args:
        data: The chats.
        folder: The folder to write to.
        split: The split's name.
    """
    name = f"{split}.parquet"
    with replacing(folder, entry=name) as staged:
        data.to_parquet(staged / name)


def _chat(form: Form, max_distractor_length: int, split: mosaic.Split, generator: torch.Generator) -> dict[str, Any]:
    length = int(torch.randint(max_distractor_length + 1, (), generator=generator))
    pictures = mosaic.draw_pictures(split, 1, length, 1, generator)
    cells = torch.randperm(mosaic.NUM_CELLS, generator=generator).tolist()
    answers = [digit_token(int(pictures.digits[0, 0, cell])) for cell in cells]
    text = bytes(pictures.input_ids[0, mosaic.IMAGE_LENGTH :].tolist()).decode(errors="ignore")
    image = fromarray((pictures.mosaics[0].permute(1, 2, 0) * 255).round().byte().numpy())
    if form == "prompts":
        prompt = [{"role": "user", "content": text + cell_token(cells[0])}]
        return {"images": [image], "prompt": prompt, "solution": answers[0]}
    messages = list(_turns(text, cells, answers))
    return {"images": [image], "messages": messages}


def _turns(text: str, cells: list[int], answers: list[str]) -> Iterator[dict[str, str]]:
    for number, (cell, answer) in enumerate(zip(cells, answers)):
        yield {"role": "user", "content": ("" if number else text) + cell_token(cell)}
        yield {"role": "assistant", "content": answer}

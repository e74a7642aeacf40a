"""Long generation: the model is asked for all cells again and again, and its own answers stay in the context."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from peft_pvm.demo.mosaic import NUM_CELLS, Split, draw_pictures
from peft_pvm.demo.questions import COLUMNS, END_OF_TURN, ROWS, START_OF_TURN, Questions, Turn, converse
from peft_pvm.demo.train import step_generator
from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


TOLD = re.compile(rf"(({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})) (\d)")  # a place and its digit
ANSWER = f"\n{START_OF_TURN}assistant\n"


@torch.no_grad()
def transcribe(
    model: Any, questions: Questions, split: Split, rows: int, seed: int, longest: int
) -> Iterator[tuple[int, list[int]]]:
    """Ask for the nine cells of one picture round by round, each time in a new order. The picture is not repeated.

    Answers are generated greedily, as many tokens as a right one has. What the model once wrote stays in its context,
    so that it may copy from there, its mistakes too.

    Args:
        model: The base, with whatever acts on it, in eval mode.
        questions: The task.
        split: Where digits come from.
        rows: Pictures, asked about at once.
        seed: Decides pictures and orders.
        longest: No round begins with more tokens than this between picture and question.

    Yields:
        For each round, the tokens between picture and question, and how many of the nine digits each row has right.
        The first that an answer says of a place counts.
    """
    device, tokenizer = next(model.parameters()).device, questions.tokenizer
    generators = [step_generator(seed, row) for row in range(rows)]
    pictures = [draw_pictures(split, 1, 0, 1, generator) for generator in generators]
    inputs = {"pixel_values": torch.cat([shown.mosaics for shown in pictures]).to(device) * 2 - 1}
    ids = _ids(questions, [f"{START_OF_TURN}user\n"] * rows, device)
    ids = torch.cat([ids, ids.new_full((rows, NUM_CELLS), questions.visual)], 1)
    shown, opening = ids.shape[1], "\n"
    cache = DynamicCache(config=find_vlm(model).text_config)
    while (distance := ids.shape[1] - shown) <= longest:
        said = [converse([Turn()], picture, 0, g)[0] for picture, g in zip(pictures, generators)]
        asked = _ids(questions, [f"{opening}{turn.question}{END_OF_TURN}{ANSWER}" for turn in said], device)
        ids = torch.cat([ids, asked], 1)
        length = len(questions.tokenizer(said[0].answer, add_special_tokens=False).input_ids)
        ids = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=False,
            **{CACHE: cache},
            **inputs,
        )
        inputs = {}  # the cache holds the picture
        written = tokenizer.batch_decode(ids[:, -length:])
        yield distance, [_right(answer, turn.answer) for answer, turn in zip(written, said)]
        opening = f"{END_OF_TURN}\n{START_OF_TURN}user\n\n"


def _ids(questions: Questions, texts: list[str], device: torch.device) -> torch.Tensor:
    return torch.tensor(questions.tokenizer(texts, add_special_tokens=False).input_ids, device=device)


def _right(answer: str, expected: str) -> int:
    told = {place: digit for place, *_, digit in reversed(TOLD.findall(answer))}  # the first one stays
    return sum(told.get(place) == digit for place, *_, digit in TOLD.findall(expected))

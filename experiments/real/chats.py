"""The task of the real base as trainers and the commands of peft-pvm take it: chats with images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_pvm.demo.mosaic import Split, draw_pictures
from peft_pvm.demo.questions import Questions, Turn, converse
from peft_pvm.demo.train import step_generator


if TYPE_CHECKING:
    from datasets import Dataset


def make_real_chats(questions: Questions, rows: int, max_text: int, split: Split = "train", seed: int = 0) -> Dataset:
    """Draw mosaics, text and questions, and write them as chats, with columns `images` and `messages`.

    Args:
        questions: The task, in the base's tokens.
        rows: Number of chats.
        max_text: Tokens of text between image and question, at most; their number is drawn uniformly.
        split: Where digits and text come from.
        seed: Decides what is drawn.

    Raises:
        ValueError: There is not so much text in the split.
    """
    from datasets import Dataset

    return Dataset.from_list([_chat(questions, max_text, split, step_generator(seed, row)) for row in range(rows)])


def _chat(questions: Questions, max_text: int, split: Split, generator: torch.Generator) -> dict[str, Any]:
    from PIL.Image import fromarray

    turn = Turn(text_tokens=int(torch.randint(max_text + 1, (), generator=generator)))
    pictures = draw_pictures(split, 1, 0, turn.shown, generator)
    (said,) = converse([turn], pictures, 0, generator)
    text = questions.tokenizer.decode(questions.draw_text(split, 1, turn, generator)[0])
    messages = [
        {"role": "user", "content": f"{text}\n{said.question}"},
        {"role": "assistant", "content": said.answer},
    ]
    image = fromarray((pictures.mosaics[0].permute(1, 2, 0) * 255).round().byte().numpy())
    return {"images": [image], "messages": messages}

"""Text between the images and the question of chats that a model is trained on."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..utils.distractors import Distractors, check_tokens, has_visuals, into_messages, read_paragraphs


if TYPE_CHECKING:
    from datasets import Dataset


Lengths = Literal["uniform", "log-uniform"]


class TextBetween:
    """Puts text of a different length into every row, between the images and the question of its chat.

    If a question comes right after its image, a model does not learn to answer over a distance.

    Args:
        tokenizer: The model's tokenizer, or a processor that has one.
        max_tokens: The most tokens of text.
        lengths: How their number is drawn, from 0 to `max_tokens`: "uniform", or "log-uniform", which gives as many
            rows from 15 to 63 tokens as from 255 to 1,023.
        paragraphs: The paragraphs that texts are made of, from `read_paragraphs`. `None`: Python's help topics.
        seed: Together with the number of the row, it decides length and text.

    Raises:
        ValueError: A number is out of its range, or `lengths` is neither of the two.

    Example:
        data = TextBetween(processor, 1024).put_into(data)
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        lengths: Lengths = "uniform",
        paragraphs: Sequence[str] | None = None,
        seed: int = 0,
    ):
        if lengths not in get_args(Lengths):
            raise ValueError(f"lengths is {lengths!r}, but must be one of {get_args(Lengths)}.")
        check_tokens(max_tokens, "max_tokens")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.distractors = Distractors(tokenizer, max_tokens, paragraphs or read_paragraphs(), seed)
        self.lengths = lengths

    def put_into(self, data: Dataset) -> Dataset:
        """Put text into a whole data set. Its images are neither decoded nor written anew.

        Args:
            data: Rows as `__call__` takes them.

        Raises:
            ValueError: A row has no chat, or the paragraphs without answers do not suffice.
        """
        from datasets import Image, List

        features = data.features
        undecoded = {"image": Image(decode=False), "images": List(Image(decode=False))}
        for column in features.keys() & undecoded.keys():
            data = data.cast_column(column, undecoded[column])
        return data.map(self, with_indices=True, features=data.features).cast(features)

    def __call__(self, example: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The columns of a row that change, for `Dataset.map(..., with_indices=True)` and the like.

        Args:
            example: `messages`, or `prompt` with `completion` or `solution`; its images in `images` or `image`, or in
                the messages. A row without images stays as it is.
            index: Its number.

        Raises:
            ValueError: The row has no chat.
        """
        column = "messages" if example.get("messages") else "prompt"
        messages = example.get(column)
        if not messages or isinstance(messages, str):
            raise ValueError(f"Row {index} has no chat: 'messages', or a 'prompt' of messages.")
        length = self.draw_length(index)
        is_shown = has_visuals(messages)
        if not length or not (is_shown or example.get("images") or example.get("image")):
            return {column: messages}
        text = self.distractors.draw(str(index), _answers_in(example), length)
        return {column: into_messages(messages, text) if is_shown else _into_first_question(messages, text)}

    def draw_length(self, index: int) -> int:
        """How many tokens of text a row gets."""
        longest, draw = self.distractors.tokens, random.Random(f"{self.distractors.seed} length {index}")
        if self.lengths == "uniform":
            return draw.randint(0, longest)
        return int(math.exp(draw.uniform(0, math.log(longest + 1)))) - 1


def _answers_in(example: Mapping[str, Any]) -> list[str]:
    """What the assistant says in a row, and its solution."""
    chat = [*(example.get("messages") or []), *(example.get("completion") or [])]
    said = [_text_of(message["content"]) for message in chat if message["role"] == "assistant"]
    return [text for text in (*said, example.get("solution") or "") if re.search(r"\w", text)]


def _text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _into_first_question(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Put a text at the start of a chat's first question, before which its images are shown."""
    changed = [dict(message) for message in messages]
    first = next(message for message in changed if message["role"] == "user")
    content = first["content"]
    first["content"] = (
        f"{text}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": f"{text}\n\n"}, *content]
    )
    return changed

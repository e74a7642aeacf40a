"""Rows of a data set as a model is trained on them: a chat with images, followed by its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch


ANSWER = "[the answer stands here]"  # shows where a chat template puts an answer, and what comes before it


@dataclass(frozen=True, eq=False)
class Chat:
    """A chat with images that ends with an answer.

    Attributes:
        prompt: All messages before the answer, each with `role` and `content`, a list of parts with `type`.
        images: The images of the prompt, in order.
        answer: The last message, which is the assistant's, as text.
    """

    prompt: list[dict[str, Any]]
    images: list[Any]
    answer: str


@dataclass(frozen=True, eq=False)
class Lesson:
    """A prompt with its answer, as a model takes them.

    Attributes:
        inputs: What the model's processor gives for both, `input_ids` as `(1, seq_len)`.
        num_answer_tokens: How many tokens at the end are the answer.
    """

    inputs: dict[str, torch.Tensor]
    num_answer_tokens: int

    def on(self, model: Any) -> dict[str, torch.Tensor]:
        """The inputs on a model's device, pixels in its dtype."""
        return on_model(self.inputs, model)


def on_model(inputs: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Inputs on a model's device, pixels in its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def read_chats(rows: Iterable[Mapping[str, Any]], most: int) -> list[Chat]:
    """The first chats of a data set that have images.

    Args:
        rows: With `images` or one `image`, and either `messages` or `prompt` and `completion`. Messages are dicts of
            `role` and `content`, a text or a list of parts. If no part is an image, all images come before the first
            message of the user, as in TRL.
        most: The largest number of chats. Rows without images are skipped.

    Raises:
        ValueError: No row has an image. Or a row with images does not end with an answer of the assistant, or its
            messages have another number of images.
    """
    if most < 1:
        raise ValueError(f"The number of rows is {most}, but must be at least 1.")
    chats: list[Chat] = []
    for row in rows:
        if row.get("images") or row.get("image"):
            chats.append(_chat(row))
            if len(chats) == most:
                break
    if not chats:
        raise ValueError("No row of the data set has an image (columns `images` or `image`).")
    return chats


def _chat(row: Mapping[str, Any]) -> Chat:
    images = list(row.get("images") or [row["image"]])
    messages = row.get("messages") or [*_messages(row.get("prompt"), "user"), *_messages(row.get("completion"))]
    *prompt, last = [{"role": message["role"], "content": _parts(message["content"])} for message in messages] or [{}]
    answer = "".join(part["text"] for part in last.get("content", ()) if part["type"] == "text").strip()
    if not prompt or last["role"] != "assistant" or not answer:
        raise ValueError(
            "A row of the data set has an image but does not end with an answer of the assistant: give `messages`, or "
            f"`prompt` and `completion`. Its columns are {', '.join(map(repr, row))}."
        )
    parts = [part for message in prompt for part in message["content"]]
    num_placeholders = sum(part["type"] == "image" for part in parts)
    if not num_placeholders:
        first = next((message for message in prompt if message["role"] == "user"), prompt[0])
        first["content"] = [*({"type": "image"} for _ in images), *first["content"]]
    elif num_placeholders != len(images):
        raise ValueError(f"A row of the data set has {len(images)} images, but {num_placeholders} in its messages.")
    return Chat(prompt, images, answer)


def _messages(messages: Any, role: str = "assistant") -> Sequence[Mapping[str, Any]]:
    """Messages, of which there may be none, or one that is given as a text."""
    return [{"role": role, "content": messages}] if isinstance(messages, str) else messages or []


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
        for part in content or []
    ]


def teach(processor: Any, chat: Chat) -> Lesson:
    """A chat and its answer as a model takes them, the answer where the chat template puts it.

    Args:
        processor: The model's processor, with a chat template.
        chat: The chat.

    Raises:
        ValueError: The processor has no chat template, or does not leave the answer as it is.
    """
    _check_template(processor)
    answered = [*chat.prompt, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    before, found, _ = processor.apply_chat_template(answered).partition(ANSWER)
    text = before + chat.answer
    inputs, tokenizer = _processed(processor, chat.images, text), processor.tokenizer
    without, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, text))
    # A token may hold the end of what comes before and the beginning of the answer.
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(without, whole)))
    answer = whole[num_common:]
    if not found or inputs["input_ids"][0, -len(answer) :].tolist() != answer:
        raise ValueError(f"{type(processor).__name__} does not leave an answer in a chat as it is.")
    return Lesson(inputs, len(answer))


def ask(processor: Any, prompt: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A chat that waits for its answer, as `generate` takes it.

    Args:
        processor: The model's processor, with a chat template.
        prompt: All messages, as in `Chat`.
        images: Their images, in order.

    Raises:
        ValueError: The processor has no chat template.
    """
    _check_template(processor)
    return _processed(processor, images, processor.apply_chat_template(prompt, add_generation_prompt=True))


def _check_template(processor: Any) -> None:
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so that it is not known how a chat is to be written."
        )


def _processed(processor: Any, images: Sequence[Any], text: str) -> dict[str, torch.Tensor]:
    # The template writes the token with which texts begin, if there is one: the tokenizer need not.
    begun = {"add_special_tokens": False} if text.startswith(processor.tokenizer.bos_token or "\0") else {}
    return dict(processor(images=[images], text=[text], return_tensors="pt", **begun).items())

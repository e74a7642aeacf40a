"""The answer that is looked at: how it is generated, and how it is put behind its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import ModelOutput


Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    generate_kwargs: Mapping[str, Any],
    progress: Progress,
) -> list[int]:
    """The token ids of an answer, greedy unless told otherwise.

    Args:
        model: The transformers model.
        inputs: Of the prompt.
        max_new_tokens: Length at most.
        generate_kwargs: More arguments for its `generate`.
        progress: Told of every token.
    """
    arguments = {"do_sample": False, "num_beams": 1, **generate_kwargs, "return_dict_in_generate": False}
    streamer = None if arguments["num_beams"] > 1 else _CountingStreamer(progress, max_new_tokens)
    sequences = model.generate(**inputs, **{"streamer": streamer, **arguments}, max_new_tokens=max_new_tokens)
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


class _CountingStreamer:
    """Tells how many tokens have been generated."""

    def __init__(self, progress: Progress, max_new_tokens: int):
        self.progress, self.max_new_tokens = progress, max_new_tokens
        self.count = -1  # the prompt comes first

    def put(self, tokens: torch.Tensor) -> None:
        self.count += 1
        self.progress("generating", self.count, self.max_new_tokens)

    def end(self) -> None:
        self.progress("generating", self.max_new_tokens, self.max_new_tokens)


def extended(model: Any, inputs: Mapping[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """Inputs of a full forward over prompt and answer.

    Args:
        model: The transformers model. How masks and token types go on is its own business: it knows for `generate`.
        inputs: Of the prompt.
        token_ids: The answer.

    Returns:
        The inputs, `input_ids` as `(1, prompt + answer)`.
    """
    extras = dict(inputs)
    input_ids = extras.pop("input_ids")
    for _ in token_ids:
        extras = model._update_model_kwargs_for_generation(ModelOutput(), extras, num_new_tokens=1)
    answer = torch.tensor([list(token_ids)], dtype=input_ids.dtype, device=input_ids.device)
    return {**extras, "input_ids": torch.cat([input_ids, answer], 1)}

"""Several turns by `generate` on one KV cache equal a forward that computes the whole conversation at once."""

from __future__ import annotations

import torch
from forwards import GENERATE, TOLERANCE, difference, in_double, logits
from methods_under_test import Combination, Method
from tiny_vlms import TinyVLM

from peft_pvm.utils.packages import CACHE


# What the user says, and the name of the cache's argument: the older one works on all supported versions.
TURNS = {"t4 i t3": CACHE, "t5": "past_key_values", "i t4": CACHE, "t6": "past_key_values"}
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class Conversation:
    """A conversation on one KV cache, and what is needed to compute it again without a cache.

    Args:
        family: The model's family.
        model: The model, with or without adapters.
    """

    def __init__(self, family: TinyVLM, model: torch.nn.Module):
        self.family, self.model, self.base = family, model, model.get_base_model()
        self.input_ids = torch.empty(1, 0, dtype=torch.long)
        self.types = torch.empty(1, 0, dtype=torch.int)
        self.pixels: dict[str, torch.Tensor] = {}
        self.cache = None
        self.answers: list[torch.Tensor] = []
        self.answered_at: list[int] = []

    def take_turn(self, text: str, cache_name: str) -> None:
        """The user says something, and the model answers."""
        said = self.family.prompt(self.base, text)
        self._append(said["input_ids"], said.get("mm_token_type_ids"))
        pixels = {name: tensor for name, tensor in said.items() if name not in TEXT_INPUTS}
        pixels = in_double(pixels) if self.base.dtype == torch.float64 else pixels
        for name, tensor in pixels.items():
            known = [self.pixels[name]] if name in self.pixels else []
            self.pixels[name] = torch.cat([*known, tensor], int(self.family.pixels_by_row))
        inputs = self._text_inputs()
        if "image_grid_thw" in pixels:
            # generate would take the same grids for the positions of all images and the features of the new ones.
            inputs["position_ids"], self.base.model.rope_deltas = self._rope_index()
        answer = self.model.generate(**inputs, **pixels, **{cache_name: self.cache}, **GENERATE, do_sample=False)
        self.cache = answer[CACHE]
        length = self.input_ids.shape[1]
        self.answers += answer.logits
        self.answered_at += range(length - 1, answer.sequences.shape[1] - 1)
        self._append(answer.sequences[:, length:])

    def computed_at_once(self) -> torch.Tensor:
        """The logits that all answers came from, by one forward without a cache."""
        inputs = {**self._text_inputs(), **self.pixels}
        if "image_grid_thw" in self.pixels:
            inputs["position_ids"], _ = self._rope_index()
        return logits(self.model, inputs, use_cache=False)[0, self.answered_at]

    def _append(self, input_ids: torch.Tensor, types: torch.Tensor | None = None) -> None:
        self.input_ids = torch.cat([self.input_ids, input_ids], 1)
        self.types = torch.cat([self.types, torch.zeros_like(input_ids) if types is None else types], 1)

    def _text_inputs(self) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}
        if "image_grid_thw" in self.pixels:
            inputs["mm_token_type_ids"] = self.types
        if self.family.is_prefix_lm:
            inputs["token_type_ids"] = torch.ones_like(self.input_ids)
        return inputs

    def _rope_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        grids = self.pixels["image_grid_thw"]
        return self.base.model.get_rope_index(self.input_ids, mm_token_type_ids=self.types, image_grid_thw=grids)


def answered(family: TinyVLM, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of all answers: turn by turn, and at once."""
    conversation = Conversation(family, model)
    for text, cache_name in TURNS.items():
        conversation.take_turn(text, cache_name)
    return torch.cat(conversation.answers), conversation.computed_at_once()


def test_turns_equal_the_full_forward(family: TinyVLM, method: Method | Combination):
    model = method.attach(family.build_precise())
    with model.disable_adapter():
        off, off_at_once = answered(family, model)
    assert difference(off, off_at_once) < TOLERANCE, "the base's own turns differ: nothing is tested"
    on, on_at_once = answered(family, model)
    assert difference(on, on_at_once) < TOLERANCE
    answers = slice(1) if method.least_tokens == 1 else slice(None)  # from the second image on, there are enough
    assert difference(on[answers], off[answers]) > 100 * TOLERANCE

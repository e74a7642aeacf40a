"""A window that slides over what is decoded alone, behind a prompt that stays in sight, as in Unlimited-OCR."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures.readers import UNLIMITED_WINDOW
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS
from transformers import StaticCache

from peft_pvm.utils.packages import CACHE


PROMPT, WHOLE, WINDOW = "t4 i t3", "t4 i t3 i t9", 4


def _inputs(model, conversation: str = WHOLE, **piece: int) -> dict[str, torch.Tensor]:
    return UNLIMITED_WINDOW.inputs(model.get_base_model(), conversation, **piece)


def _decoded(model, cache=None) -> torch.Tensor:
    """The logits of the conversation: the prompt, then the second image, then token by token, on a cache."""
    prompt, length = (_inputs(model, conversation)["input_ids"].shape[1] for conversation in (PROMPT, WHOLE))
    pieces = []
    for start, stop in itertools.pairwise([0, prompt, *range(length - 8, length + 1)]):
        with torch.no_grad():
            output = model(**_inputs(model, start=start, stop=stop), **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


def _in_one(model) -> torch.Tensor:
    """The same without a cache, with a mask written out."""
    prompt = _inputs(model, PROMPT)["input_ids"].shape[1]
    inputs = _inputs(model)
    others = torch.arange(inputs["input_ids"].shape[1])
    own = others[:, None]
    mask = (others <= own) & ((others < prompt) | (own - others < WINDOW))
    masks = dict.fromkeys(("full_attention", "reference_sliding_attention"), mask[None, None])
    return logits(model, {**inputs, "attention_mask": masks}, use_cache=False)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_equals_one_forward_with_its_mask(method: str):
    """A second image comes after the prompt, and leaves the window again."""
    model = METHODS[method].attach(UNLIMITED_WINDOW.build())
    decoded = _decoded(model)
    assert difference(decoded, _in_one(model)) < TOLERANCE
    assert difference(decoded, logits(model, _inputs(model))) > 100 * TOLERANCE, "the window hides nothing"


@pytest.mark.parametrize("method", METHODS)
def test_a_static_cache_slides_in_the_same_way(method: str):
    model = METHODS[method].attach(UNLIMITED_WINDOW.build())
    cache = StaticCache(config=model.get_base_model().config.get_text_config(), max_cache_len=64)
    assert difference(_decoded(model, cache), _decoded(model)) < TOLERANCE

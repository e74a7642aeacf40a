"""A prompt whose placeholders bring no pixels is answered as text. That surprises, so it is said, once."""

from __future__ import annotations

import warnings

import pytest
import torch
from forwards import generate, logits, prefill
from methods_under_test import Combination, Method
from tiny_vlms import IMAGE, VIDEO, TinyVLM
from transformers import StaticCache

from peft_pvm.utils.packages import CACHE


MESSAGE = "no pixels came with it"
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


def without_pixels(family: TinyVLM, model: torch.nn.Module, *rows: str) -> dict[str, torch.Tensor]:
    inputs = family.inputs(model.get_base_model(), *rows)
    return {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}


def test_it_is_said_once_for_a_model(plain: TinyVLM, method: Method | Combination):
    for _ in range(2):  # models
        model = method.attach(plain.build())
        inputs = without_pixels(plain, model, "t4 i t6", "t9")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.disable_adapter():
                logits(model, inputs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                logits(model, inputs)
        assert len([warning for warning in said if MESSAGE in str(warning.message)]) == 1


def test_every_kind_of_placeholder(plain: TinyVLM, method: Method | Combination):
    """Also if features of another kind come."""
    model = method.attach(plain.build())
    inputs = plain.inputs(model.get_base_model(), "t4 i t6")
    if plain.video is None:
        pytest.skip("a family without videos")
    inputs["input_ids"][0, 1] = VIDEO
    with pytest.warns(UserWarning, match=MESSAGE):
        logits(model, inputs)


@pytest.mark.filterwarnings("error:.*no pixels came with it")
def test_nothing_is_said_of_features_or_of_sampled_tokens(plain: TinyVLM, method: Method | Combination):
    model = method.attach(plain.build())
    base = model.get_base_model()
    logits(model, plain.inputs(base, "t4 i t6", "t9"))
    logits(model, plain.inputs(base, "t9"))
    generate(plain, model, "t4 i t6", "t9")  # which encodes the image beforehand
    generate(plain, model, "t4 i t9", prompt_lookup_num_tokens=3)
    for cache in (None, StaticCache(config=base.config.get_text_config(), max_cache_len=64)):
        cache = prefill(plain, model, "t4 i t9", stop=9, cache=cache)
        for length in (1, 2):
            sampled = dict(
                input_ids=torch.full((1, length), IMAGE),
                position_ids=plain.inputs(base, "t30")["position_ids"][..., 9 : 9 + length],
            )
            logits(model, sampled, **{CACHE: cache}, use_cache=True)

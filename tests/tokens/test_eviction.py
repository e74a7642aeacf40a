"""Keys that are taken out of the cache during a forward, as kvpress does it, are never taken for a crop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from forwards import TOLERANCE, difference, length_of, logits
from methods_under_test import METHODS, Combination, Method
from tiny_vlms import FAMILIES, TinyVLM
from transformers import DynamicCache

from peft_pvm.utils.packages import CACHE, cache_in


ONE_IMAGE, TWO_IMAGES = "t4 i t9", "t4 i t3 i t5"
DECODED = 4  # of the tokens after one image
READS_KEYS = ("dipe", "tdrs", "tdrs-inter", "dipe+tdrs", "tdrs-inter+dipe+pvm")


def evict(model: torch.nn.Module, kept: Callable[[int], list[int]], layers: list[int] | None = None) -> Callable:
    """Have attention modules drop keys once they have attended. Returns what switches that off.

    Args:
        model: The model.
        kept: Which keys stay, given how many there are.
        layers: In which layers. `None`: in all.
    """

    def drop(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        layer = cache_in(kwargs).layers[module.layer_idx]
        rows = kept(layer.keys.shape[-2])
        layer.keys, layer.values = layer.keys[:, :, rows], layer.values[:, :, rows]

    attentions = [layer.self_attn for layer in model.get_base_model().model.language_model.layers]
    handles = [
        attention.register_forward_hook(drop, with_kwargs=True)
        for attention in attentions
        if layers is None or attention.layer_idx in layers
    ]
    return lambda: [handle.remove() for handle in handles]


def all_but(lost: range) -> Callable[[int], list[int]]:
    return lambda num_keys: [key for key in range(num_keys) if key not in lost]


def step(family: TinyVLM, model: torch.nn.Module, cache, start: int, stop: int, whole: str = ONE_IMAGE):
    """A piece of the conversation, at its own positions, and without a mask, which would be longer than the cache."""
    inputs = family.inputs(model.get_base_model(), whole, start=start, stop=stop)
    del inputs["attention_mask"]
    return logits(model, inputs, **{CACHE: cache}, use_cache=True)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
@pytest.mark.parametrize("method", ["pvm", "pvm-hidden-states"])
def test_pvm_remembers_what_the_cache_has_lost(name: str, method: str):
    """As a forward over everything in which nobody sees the lost keys: over a second image, and two decoded tokens."""
    family = FAMILIES[name]
    model = METHODS[method].attach(family.build())
    base = model.get_base_model()
    whole = family.inputs(base, TWO_IMAGES)
    first, length = length_of(family, model, "t4 i t3"), length_of(family, model, TWO_IMAGES)
    lost = range(2, first - 2)  # the image is among them

    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[first:, lost.start : lost.stop] = False
    expected = logits(model, {**whole, "attention_mask": mask[None, None]}, use_cache=False)

    cache = DynamicCache()
    keep = evict(model, all_but(lost))
    pieces = [step(family, model, cache, 0, first, TWO_IMAGES)]
    keep()
    cuts = [first, length - 2, length - 1, length]
    pieces += [step(family, model, cache, start, stop, TWO_IMAGES) for start, stop in itertools.pairwise(cuts)]
    assert difference(torch.cat(pieces, 1), expected) < TOLERANCE
    with model.disable_adapter():
        off = logits(model, {**whole, "attention_mask": mask[None, None]}, use_cache=False)
    assert difference(off[:, first:], expected[:, first:]) > 100 * TOLERANCE


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("in_decoding", [False, True], ids=["prefill", "decoding"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3"])
@pytest.mark.parametrize("method", READS_KEYS)
def test_methods_that_read_keys_refuse(name: str, method: str, in_decoding: bool, layers: list[int] | None):
    """Also if a single layer loses a single key in a step of decoding, and with a sliding window (Gemma 3)."""
    family = FAMILIES[name]
    model = METHODS[method].attach(family.build())
    first = length_of(family, model, ONE_IMAGE) - DECODED
    cache = step_and_lose(family, model, first, in_decoding, layers)
    start = first + in_decoding
    with pytest.raises(NotImplementedError, match="Keys of this KV cache were taken out during a forward"):
        step(family, model, cache, start, start + 1)
    if name != "gemma3":  # which itself makes masks for more keys than its sliding windows have left
        with model.disable_adapter():
            assert step(family, model, cache, start, start + 1).isfinite().all()


def step_and_lose(family: TinyVLM, model, first: int, in_decoding: bool, layers: list[int] | None) -> DynamicCache:
    """The cache of a prompt, and of one token more if it is in decoding that keys are lost."""
    cache = DynamicCache(config=model.get_base_model().config.get_text_config())
    lost = range(1, 2)
    if not in_decoding:
        keep = evict(model, all_but(lost), layers)
    step(family, model, cache, 0, first)
    if in_decoding:
        keep = evict(model, all_but(lost), layers)
        step(family, model, cache, first, first + 1)
    keep()
    return cache


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_crop_after_eviction_is_refused(method: Method | Combination):
    family = FAMILIES["llava"]
    model = method.attach(family.build())
    first = length_of(family, model, ONE_IMAGE) - DECODED
    cache = step_and_lose(family, model, first, False, None)
    emptied = copy.deepcopy(cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match="2 keys were cropped from a KV cache that had lost others"):
        step(family, model, cache, first, first + 1)

    emptied.crop(-emptied.get_seq_length())  # which leaves nothing that could be mistaken
    expected = step(family, model, DynamicCache(), 0, first)
    assert difference(step(family, model, emptied, 0, first), expected) < TOLERANCE

"""A forward that is interrupted leaves nothing behind, wherever that happens, and the next one is right."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from forwards import length_of, logits, prefill
from methods_under_test import METHODS
from tiny_vlms import FAMILIES
from torch import nn

from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


class Interruption(Exception):
    """Raised inside a module."""


# Where: before the layers, in the attention and the FFN of a layer in which PVM acts, and behind the last branch.
PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "rotary": lambda text_model: text_model.rotary_emb,
    "attention": lambda text_model: text_model.layers[1].self_attn.o_proj,
    "FFN": lambda text_model: text_model.layers[1].mlp.down_proj,
    "behind the last branch": lambda text_model: text_model.norm,
}


def interrupted(model: nn.Module, inputs: dict, place: str, kind: type[BaseException]) -> list[weakref.ref]:
    """Run a forward that is interrupted; weak references to its context, its memory and its residual streams."""
    text_model = find_vlm(model.get_base_model()).text_model
    seen: list[weakref.ref] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        context = kwargs["visual_context"]
        seen.extend(weakref.ref(each) for each in (context, context.memory, context.memory.embeddings))

    def watch_residual(module: nn.Module, args: tuple) -> None:
        seen.append(weakref.ref(args[0]))

    def interrupt(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise kind

    handles = [
        text_model.register_forward_pre_hook(watch, with_kwargs=True),
        *(norm.register_forward_pre_hook(watch_residual) for norm in _norms(text_model.layers[1])),
        PLACES[place](text_model).register_forward_pre_hook(interrupt, with_kwargs=True),
    ]
    try:
        model(**inputs)
    except kind:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [module for name, module in layer.named_children() if "norm" in name]


@pytest.mark.parametrize(("place", "kind"), [*((place, Interruption) for place in PLACES), ("FFN", KeyboardInterrupt)])
@pytest.mark.parametrize("in_training", [False, True], ids=["inference", "gradient checkpointing"])
@pytest.mark.parametrize("method", ["pvm", "tdrs-inter+dipe+pvm"])
@pytest.mark.parametrize("name", ["llava", "llava_cohere"])
def test_nothing_outlives_it(name: str, method: str, in_training: bool, place: str, kind: type[BaseException]):
    family = FAMILIES[name]
    model = METHODS[method].attach(family.build())
    base = model.get_base_model()
    inputs = family.inputs(base, "t4 i t6")
    expected = logits(model, inputs)
    if in_training:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
        base.train()
    seen: list[weakref.ref] = []
    with torch.set_grad_enabled(in_training):
        seen += interrupted(model, inputs, place, kind)
    threads = [threading.Thread(target=lambda: seen.extend(interrupted(model, inputs, place, kind))) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    gc.collect()
    assert len(seen) >= 4 * 3
    assert [reference() for reference in seen if reference() is not None] == []
    base.eval()
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("method", ["pvm", "pvm-hidden-states", "tdrs-inter+dipe+pvm"])
def test_its_image_is_not_taken_for_the_next_one(method: str):
    """The cache had no image yet, is cropped to what it held, and goes on with an image of the same size."""
    family, conversation = FAMILIES["llava"], "t6 i t5"
    model = METHODS[method].attach(family.build())
    start = 6
    first = family.inputs(model.get_base_model(), conversation, start=start)
    second = {**first, "pixel_values": first["pixel_values"].flip(-1)}

    cache = prefill(family, model, conversation, stop=start)
    interrupted(model, {**first, CACHE: cache, "use_cache": True}, "behind the last branch", Interruption)
    assert cache.get_seq_length() == length_of(family, model, conversation)
    cache.crop(start - cache.get_seq_length())
    found = logits(model, second, **{CACHE: cache}, use_cache=True)

    fresh = prefill(family, model, conversation, stop=start)
    assert torch.equal(found, logits(model, second, **{CACHE: fresh}, use_cache=True))
    other = prefill(family, model, conversation, stop=start)
    assert not torch.equal(found, logits(model, first, **{CACHE: other}, use_cache=True))

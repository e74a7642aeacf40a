"""A step of decoding: one graph that stays, no waiting for the device, nothing of the size of the cache."""

from __future__ import annotations

import pytest
import torch
from environment import on_a_cpu
from forwards import TOLERANCE, counted_graphs, difference, logits, prompt_and_step
from methods_under_test import METHODS, Combination, Method
from tiny_vlms import FAMILIES, REPRESENTATIVE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.packages import CACHE


COMPILED = {**METHODS, "pvm+dipe": Combination(("pvm", "dipe"), text_alone="equal")}
ON_TWO_FAMILIES = ("pvm", "dipe", "pvm+dipe")
# By name, of aten. The last: a tensor made of Python numbers, which is copied to the device.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "lift_fresh")


def static_cache(base: torch.nn.Module, length: int) -> StaticCache:
    return StaticCache(config=base.config.get_text_config(), max_cache_len=length)


def step_at(step: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """A later step of the same conversation."""
    ones = torch.ones(1, number, dtype=torch.long)
    return {
        "input_ids": step["input_ids"] + number,
        "position_ids": step["position_ids"] + number,
        "attention_mask": torch.cat([step["attention_mask"], ones], 1),
    }


@on_a_cpu
@pytest.mark.parametrize(
    ("name", "method"),
    [("llava", method) for method in COMPILED] + [("qwen3_vl", method) for method in ON_TWO_FAMILIES],
)
def test_steps_are_one_graph(name: str, method: str):
    """Compiled once, for all steps, with the mask that `generate` gives: of the cache's full length."""
    family = FAMILIES[name]
    base = family.build()
    text_model, base.config.get_text_config().num_hidden_layers = find_vlm(base).text_model, 2
    text_model.layers = text_model.layers[:2]  # of three: each is traced by itself
    model = COMPILED[method].attach(base)
    base = model.get_base_model()
    prompt, step = prompt_and_step(family, base, "t4 i t9")
    graphs, backend = counted_graphs()
    compiled = torch.compile(base, fullgraph=True, backend=backend)
    length = step["attention_mask"].shape[1]
    results = []
    for run in (base, compiled):
        cache = static_cache(base, 64)
        logits(base, prompt, **{CACHE: cache}, use_cache=True)
        steps = []
        for number in range(5):
            inputs = step_at(step, number)
            inputs["attention_mask"] = (torch.arange(64) < length + number).long()[None]
            steps.append(logits(run, inputs, **{CACHE: cache}, use_cache=True))
        results.append(torch.cat(steps, 1))
    assert len(graphs) == 1
    assert difference(*results) < TOLERANCE
    with model.disable_adapter():
        cache = static_cache(base, 64)
        logits(base, prompt, **{CACHE: cache}, use_cache=True)
        assert difference(results[0][:, :1], logits(base, step, **{CACHE: cache}, use_cache=True)) > 1e-3


class Watch(TorchDispatchMode):
    """What operations wait for the device, and how many bytes they return in storage of their own."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.allocated = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(f"aten.{name}." in f"{function}." for name in WAITS):
            self.waits.append(str(function))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.allocated += tensor.untyped_storage().nbytes()
        return result


def watched_step(family, model: torch.nn.Module, length: int) -> Watch:
    """One step of decoding on a static cache of so many tokens, behind a prompt of a row."""
    base = model.get_base_model()
    prompt, step = prompt_and_step(family, base, "t4 i t9")
    cache = static_cache(base, length)
    logits(base, prompt, **{CACHE: cache}, use_cache=True)
    logits(base, step, **{CACHE: cache}, use_cache=True)
    with Watch() as watch:
        logits(base, step_at(step, 1), **{CACHE: cache}, use_cache=True)
    return watch


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_step_waits_for_nothing(name: str, method: Method | Combination):
    model = method.attach(FAMILIES[name].build())
    with model.disable_adapter():
        base_waits = watched_step(FAMILIES[name], model, 64).waits
    assert watched_step(FAMILIES[name], model, 64).waits == base_waits


# What a step allocates for every token that the cache has room for, in numbers a head and layer: PVM nothing, the
# others the scores of one token and what is made of them. A vector for every token would be 16 numbers or more.
A_TOKEN = {"pvm": 0, "dipe": 8, "vaf": 8, "log_bias": 8, "pai": 8}


@pytest.mark.parametrize("method", A_TOKEN)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_a_step_allocates_no_vector_for_a_token_of_the_context(name: str, method: str):
    family = FAMILIES[name]
    base = family.build(attn_implementation="sdpa")
    every_layer = {"layers_to_transform": list(range(len(find_vlm(base).layers)))}
    model = METHODS[method].attach(base, **every_layer)
    short, long = (watched_step(family, model, length).allocated for length in (512, 4096))
    with model.disable_adapter():
        base_short, base_long = (watched_step(family, model, length).allocated for length in (512, 4096))
    text_config = model.get_base_model().config.get_text_config()
    scores = text_config.num_attention_heads * text_config.num_hidden_layers * (4096 - 512)
    assert (long - base_long) - (short - base_short) <= 4 * A_TOKEN[method] * scores

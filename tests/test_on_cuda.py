"""What only a GPU can show: compiled decoding into CUDA graphs, and steps that do not wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards import GENERATE, difference
from methods_under_test import METHODS
from tiny_vlms import FAMILIES
from transformers import DynamicCache

from peft_pvm.utils.packages import CACHE


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
NAMES = ["pvm", "dipe", "tdrs", "tdrs-inter+dipe+pvm"]


def on_cuda(family: str, method: str | None) -> Any:
    model = FAMILIES[family].build().cuda()
    return model if method is None else METHODS[method].attach(model)


def moved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("method", [None, *NAMES])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_static_cache_is_compiled(family: str, method: str | None, request):
    """transformers compiles decoding with a static cache on a GPU by itself, into CUDA graphs."""
    if family == "gemma3" and method is not None and "dipe" in method:
        reason = (
            "NameError in the code that inductor of torch 2.11 makes: a size is used in a part of it that lacks it"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, raises=NameError))
    model = on_cuda(family, method)
    prompt = moved(FAMILIES[family].prompt(FAMILIES[family].build(), "t4 i t5"))
    dynamic, static = (
        model.generate(**prompt, **GENERATE, do_sample=False, **kwargs)
        for kwargs in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(dynamic.sequences, static.sequences)
    assert difference(torch.stack(dynamic.logits), torch.stack(static.logits)) < 1e-4


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_step_does_not_wait_for_the_device(family: str, method: str):
    model = on_cuda(family, method)
    inputs = moved(FAMILIES[family].inputs(FAMILIES[family].build(), "t4 i t9"))
    cache = DynamicCache()
    token = torch.tensor([[11]], device="cuda")
    del inputs["attention_mask"]  # of which the base asks whether it hides anything
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
        for step in range(3):
            positions = inputs["position_ids"][..., -1:] + 1 + step
            arguments = dict(input_ids=token, position_ids=positions, use_cache=True)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                model(**arguments, **{CACHE: cache})
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_wait_would_be_noticed():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The naive forms compute the same numbers: else they would be nothing to compare with."""

from __future__ import annotations

import pytest
import torch
from forwards import TOLERANCE, difference, logits, prompt_and_step
from methods_under_test import METHODS, Combination
from tiny_vlms import FAMILIES
from transformers import DynamicCache

from peft_pvm.bench.models import make_naive
from peft_pvm.methods.pvm.branch import PlainBranch
from peft_pvm.methods.pvm.layer import PVMLayer
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
TOGETHER = Combination(("tdrs", "dipe", "pvm"), text_alone="changed")


@pytest.mark.parametrize("method", [METHODS["pvm"], METHODS["dipe"], METHODS["tdrs"], TOGETHER])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_naive_forms_give_the_same(name: str, method):
    family = FAMILIES[name]
    ours, naive = method.attach(family.build()), method.attach(family.build())
    make_naive(naive.get_base_model())
    base = ours.get_base_model()
    inputs = family.inputs(base, *ROWS)
    real = inputs["attention_mask"].bool()
    assert difference(logits(ours, inputs)[real], logits(naive, inputs)[real]) < TOLERANCE
    prompt, step = prompt_and_step(family, base, "t4 i t9")
    steps = []
    for model in (ours, naive):
        cache = DynamicCache()
        logits(model, prompt, **{CACHE: cache}, use_cache=True)
        steps.append(logits(model, step, **{CACHE: cache}, use_cache=True))
    assert difference(*steps) < TOLERANCE


def test_the_naive_branch_projects_at_every_step():
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    make_naive(model.get_base_model())
    projected = []

    def note(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        projected.append(args[0].shape[1])

    for layer in model.modules():
        if isinstance(layer, PVMLayer):
            (branch,) = layer.pvm_branches["default"]
            assert isinstance(branch, PlainBranch)
            branch.vision_reducer.register_forward_hook(note)
    prompt, step = prompt_and_step(family, model.get_base_model(), "t4 i t9")
    cache = DynamicCache()
    with torch.no_grad():
        logits(model, prompt, **{CACHE: cache}, use_cache=True)
        visual = projected[-1]
        projected.clear()
        logits(model, step, **{CACHE: cache}, use_cache=True)
    assert projected
    assert set(projected) == {visual}

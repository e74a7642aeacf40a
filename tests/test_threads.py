"""A server runs many conversations on one model at once: each gets what it would get alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forwards import GENERATE, difference, logits
from methods_under_test import METHODS, TOGETHER, give_weight
from peft import PeftModel
from tiny_vlms import TinyVLM

from peft_pvm import PVMConfig


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
THREADS, ROUNDS = 8, 1


@pytest.fixture
def model(plain: TinyVLM) -> PeftModel:
    """One method of each kind of stage and two PVM adapters, of which one is active and has a head of its own."""
    base = plain.build()
    for name in TOGETHER[1:]:
        METHODS[name].attach(base, name)
    model = METHODS["pvm"].attach(base, "one", layers_to_transform=[0, 2], modules_to_save=["lm_head"])
    model.add_adapter("other", PVMConfig(r=32, layers_to_transform=[1]))
    give_weight(model)
    with torch.no_grad():
        base.get_output_embeddings().modules_to_save["one"].weight.mul_(2)
    return model.eval()


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def requests(family: TinyVLM, model: PeftModel) -> list[Callable[[], torch.Tensor]]:
    """What clients ask for: forwards and generation, with the active adapter and with one for each row."""
    base = model.get_base_model()
    batch, alone = family.inputs(base, *ROWS), family.inputs(base, "t5 i i t8")

    def generated(adapter_names: list[str] | None) -> torch.Tensor:
        options = {} if adapter_names is None else {"adapter_names": adapter_names}
        output = model.generate(**family.inputs(base, *ROWS), **GENERATE, **options, do_sample=False)
        return torch.stack(output.logits)

    by_row = [["one", "__base__", "other"], ["other", "one", "__base__"], ["__base__"] * 3]
    return [
        lambda: logits(model, batch),
        lambda: logits(model, alone),
        *(lambda names=names: logits(model, batch, adapter_names=names) for names in by_row),
        lambda: logits(model, alone, adapter_names=["other"]),
        lambda: generated(None),
        lambda: generated(by_row[0]),
    ]


def test_requests_do_not_mix(plain: TinyVLM, model: PeftModel, eager_switches: None):
    asked = requests(plain, model)
    expected = [request() for request in asked]
    assert difference(expected[2], expected[3]) > 1e-3
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(request) for _ in range(THREADS * ROUNDS) for request in asked]
    wrong = [
        number
        for number, future in enumerate(futures)
        if not torch.equal(future.result(), expected[number % len(asked)])
    ]
    assert wrong == []


def test_forwards_put_on_no_hooks(plain: TinyVLM, model: PeftModel):
    """Whoever runs the model at the same time goes through the hooks while they would change."""

    def hooks() -> list[list[int]]:
        return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.modules()]

    during: list[list[list[int]]] = []
    model.get_base_model().lm_head.register_forward_hook(lambda *args: during.append(hooks()))
    asked = requests(plain, model)
    asked[0]()  # in its first forward, transformers puts on hooks of its own
    before = hooks()
    during.clear()
    for request in asked:
        request()
    assert len(during) >= len(asked)
    assert all(each == before for each in during)

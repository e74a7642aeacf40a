"""A prefill by modality: what whole matrices give, where it applies, and only there."""

from __future__ import annotations

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS
from tiny_vlms import FAMILIES, REPRESENTATIVE
from transformers import DynamicCache

from peft_pvm import DIPEConfig, attached
from peft_pvm.methods.dipe import method, parts
from peft_pvm.methods.dipe.parts import attend_by_modality, runs_of
from peft_pvm.tokens.memory import Runs
from peft_pvm.tokens.positions import PADDING, pack, run_starts
from peft_pvm.utils.packages import CACHE


LAYOUTS = {
    "image first": "vvvtttttt",
    "usual": "tttvvvvvttttt",
    "several": "tvvtttvtvvvvttvt",
    "ends with an image": "tttvvv",
    "image alone": "vvvv",
    "text alone": "tttt",
}


def table(*layouts: str) -> Runs:
    """The runs of a batch."""
    modality = torch.tensor([[int(token == "v") for token in layout] for layout in layouts])
    starts = run_starts(modality, torch.full((len(layouts),), PADDING))
    slots = pack(starts)
    return Runs.of(slots, slots, modality.gather(1, slots.clamp(min=0)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_whole_matrices(layout: str, kv_heads: int):
    """With keys large enough that one kind of them may have nearly all the weight."""
    generator = torch.Generator().manual_seed(0)
    length, scaling = len(layout), 0.7
    query, turned = (torch.randn(2, 4, length, 8, generator=generator) for _ in range(2))
    key, value = (3 * torch.randn(2, kv_heads, length, 8, generator=generator) for _ in range(2))
    visual = torch.tensor([[token == "v" for token in layout]])
    keys = key.double().repeat_interleave(4 // kv_heads, 1).transpose(2, 3)
    same, cross = (rows.double() @ keys * scaling for rows in (query, turned))
    scores = torch.where(visual[:, None, :, None] == visual[:, None, None], same, cross)
    scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    expected = scores.softmax(-1) @ value.double().repeat_interleave(4 // kv_heads, 1)
    found = attend_by_modality(query, [turned], key, value, runs_of(table(layout, layout), length), scaling)
    assert difference(found.double(), expected) < 1e-5


@pytest.mark.parametrize("other", ["tttt", "tvvv", "vvtt", "ttvt"])
def test_rows_of_different_layout_have_no_runs_in_common(other: str):
    assert runs_of(table("ttvv", other), 4) is None
    assert runs_of(table(other, other), 4) is not None


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of runs of every prefill by modality."""
    counted: list[int] = []

    def count(query, turned, key, value, runs, scaling):
        counted.append(len(runs))
        return attend_by_modality(query, turned, key, value, runs, scaling)

    monkeypatch.setattr(method, "attend_by_modality", count)
    return counted


@pytest.mark.parametrize("rows", [["t4 i t3 i t6"], ["t4 i t3 i t6"] * 2])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_equals_the_doubled_width(name: str, rows: list[str], calls: list[int], monkeypatch):
    family = FAMILIES[name]
    model = METHODS["dipe"].attach(family.build(attn_implementation="sdpa"))
    inputs = family.inputs(model.get_base_model(), *rows)
    by_modality = logits(model, inputs)
    assert len(calls) == 3
    assert min(calls) == 5
    monkeypatch.setattr(parts, "runs_of", lambda runs, seq_len, by_image: None)
    assert difference(by_modality, logits(model, inputs)) < TOLERANCE
    assert len(calls) == 3
    with model.disable_adapter():
        assert difference(by_modality, logits(model, inputs)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_layers_with_a_sliding_window_are_not_taken(name: str, calls: list[int]):
    family = FAMILIES[name]
    model = METHODS["dipe"].attach(family.build(attn_implementation="sdpa"))
    logits(model, family.inputs(model.get_base_model(), "t4 i t3 i t6"))
    assert len(calls) == (1 if name == "gemma3" else 3)  # two of its three layers have a window


def test_where_it_does_not_apply(calls: list[int]):
    """Padded rows, other kernels, a cache that goes on, gradients, text alone."""
    family = FAMILIES["llava"]
    model = family.build(attn_implementation="sdpa")
    with attached(model, DIPEConfig(max_distance=0)):
        logits(model, family.inputs(model, "t4 i t6", "t7 i t5"))
        logits(model, family.inputs(model, "t9"))
        cache = DynamicCache()
        length = family.inputs(model, "t4 i t3 i t6")["input_ids"].shape[1]
        logits(model, family.inputs(model, "t4 i t3 i t6", stop=length - 4), **{CACHE: cache}, use_cache=True)
        assert len(calls) == 3
        rest = family.inputs(model, "t4 i t3 i t6", start=length - 4)
        logits(model, rest, **{CACHE: cache}, use_cache=True)
        model.get_input_embeddings().weight.requires_grad_()
        model(**family.inputs(model, "t4 i t6"), use_cache=False).logits.sum().backward()
        model.set_attn_implementation("eager")
        logits(model, family.inputs(model, "t4 i t6"))
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_under_autocast_it_runs_as_the_kernel_does(name: str, dtype: torch.dtype, calls: list[int]):
    family = FAMILIES[name]
    model = METHODS["dipe"].attach(family.build(attn_implementation="sdpa"))
    inputs = family.inputs(model.get_base_model(), "t4 i t30")
    expected = logits(model, inputs)
    with torch.autocast("cpu", dtype=dtype):
        found = logits(model, inputs)
        with model.disable_adapter():
            of_base = logits(model, inputs)
    assert len(calls) == 6
    with model.disable_adapter():
        allowed = 3 * difference(of_base, logits(model, inputs))
    assert difference(found, expected) < allowed < difference(expected, of_base)

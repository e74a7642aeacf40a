"""Attention by parts that flex attention is given masks for: what the doubled width gives, where it applies."""

from __future__ import annotations

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from tiny_vlms import FAMILIES
from transformers import DynamicCache

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.methods.dipe import method, parts
from peft_pvm.utils.packages import CACHE


BATCH = ("t4 i t9 i t3 i t12", "i t12 i t8", "t5 i i t7", "t9")
CONFIGS = {
    "run": DIPEConfig(max_distance=0),
    "limited": DIPEConfig(max_distance=3),
    "image": DIPEConfig(max_distance=3, anchor="image", image_gap=1),
}


@pytest.fixture
def calls(monkeypatch) -> list[AttentionCall]:
    """All calls that went by masks, uncompiled and on a CPU as well."""
    counted: list[AttentionCall] = []

    def count(call, anchored, members):
        counted.append(call)
        return parts.attend_by_masks(call, anchored, members)

    monkeypatch.setattr(method, "attend_by_masks", count)
    monkeypatch.setattr(parts, "GIVES_SUMS", (*parts.GIVES_SUMS, "cpu"))
    with torch.compiler.set_stance("force_eager"):
        yield counted


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "aya_vision"])
def test_equals_other_kernels(name: str, config: DIPEConfig, calls: list[AttentionCall]):
    """A padded batch, also in layers with a sliding window, and further turns on its cache."""
    family, results = FAMILIES[name], []
    for kernel in ("flex_attention", "eager"):
        model = family.build(attn_implementation=kernel)
        inputs = family.inputs(model, *BATCH)
        whole, length = "t4 i t9 i t9", family.inputs(model, "t4 i t9")["input_ids"].shape[1]
        cache = DynamicCache(config=model.config.get_text_config())
        with attached(model, config):
            found = [logits(model, inputs)[inputs["attention_mask"].bool()]]
            for start, stop in ((0, length), (length, None)):
                piece = family.inputs(model, whole, start=start, stop=stop)
                found.append(logits(model, piece, **{CACHE: cache}, use_cache=True)[0])
        results.append(torch.cat(found))
    layers = 2 if name == "aya_vision" else 3  # which do not all rotate
    assert len(calls) == 3 * layers
    assert difference(*results) < TOLERANCE


def test_equals_the_doubled_width_in_half_precision(calls: list[AttentionCall], monkeypatch):
    family, results = FAMILIES["llava"], []
    model = family.build(attn_implementation="flex_attention").bfloat16()
    inputs = family.inputs(model, *BATCH)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    real = inputs["attention_mask"].bool()
    off = logits(model, inputs)[real]
    with attached(model, CONFIGS["image"]):
        results.append(logits(model, inputs)[real])
        monkeypatch.setattr(parts, "GIVES_SUMS", ())
        results.append(logits(model, inputs)[real])
    assert len(calls) == 3
    assert difference(*results) < 0.1 * difference(results[0], off)


def test_where_it_does_not_apply(calls: list[AttentionCall], monkeypatch):
    """Other kernels, gradients, other stages behind it, steps of decoding; on a CPU at all, if it is not a test."""
    family = FAMILIES["llava"]
    model = family.build(attn_implementation="flex_attention")
    inputs = family.inputs(model, *BATCH)
    step = dict(
        input_ids=torch.tensor([[11]] * 4),
        position_ids=inputs["position_ids"][..., -1:] + 1,
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1),
    )
    with attached(model, CONFIGS["limited"]):
        cache = DynamicCache()
        logits(model, inputs, **{CACHE: cache}, use_cache=True)
        assert len(calls) == 3
        logits(model, step, **{CACHE: cache}, use_cache=True)
        model.get_input_embeddings().weight.requires_grad_()
        with pytest.raises(NotImplementedError, match="backward on CPU"):  # of the kernel itself
            model(**inputs, use_cache=False)
        model.requires_grad_(False)
        model.set_attn_implementation("sdpa")
        logits(model, inputs)
        model.set_attn_implementation("flex_attention")
        monkeypatch.undo()
        logits(model, inputs)
    with attached(model, CONFIGS["limited"], TDRSConfig()):
        logits(model, inputs)
    assert len(calls) == 3

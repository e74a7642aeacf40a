"""Agreement with an independent computation in float64, on every family."""

from __future__ import annotations

import pytest
import torch
from forwards import difference, generate, in_double, logits
from oracle import oracle
from peft import get_peft_model
from tiny_vlms import FAMILIES, IMAGE, VIDEO, TinyVLM

from peft_pvm import DIPEConfig


pytestmark = pytest.mark.every_family
BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


@pytest.mark.parametrize(
    "dipe", [None, DIPEConfig(max_distance=0), DIPEConfig(max_distance=3)], ids=["base", "dipe", "limited"]
)
def test_forward(family: TinyVLM, dipe: DIPEConfig | None):
    """Without DIPE, this shows that the oracle is one."""
    model = family.build_precise()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with oracle(family.build(), inputs, dipe) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = base
    if dipe is not None:
        computed = logits(get_peft_model(model, dipe), inputs)[real]
        assert difference(expected, base.double()) > 1000 * TOLERANCE
    assert difference(computed.double(), expected) < TOLERANCE


WITH_SPACE = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "glm4v", "glm4v_moe", "qwen3_5")


@pytest.mark.parametrize("config", [{"max_distance": 0}, {"max_distance": 3}, {"max_distance": 2, "anchor": "image"}])
@pytest.mark.parametrize("axes", ["time", "space"])
@pytest.mark.parametrize("name", WITH_SPACE)
def test_axes(name: str, axes: str, config: dict):
    """Each by itself; in a step of decoding, too. Anchored heights and widths of generated text are its time's."""
    family, dipe = FAMILIES[name], DIPEConfig(axes=axes, **{"image_gap": 1, **config})
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe) as reference:
        expected = logits(reference, in_double(inputs))[real]
    attached = get_peft_model(model, dipe)
    computed = logits(attached, inputs)[real]
    whole = logits(get_peft_model(family.build(), DIPEConfig(**{"image_gap": 1, **config})), inputs)[real]
    assert difference(expected, whole.double()) > 100 * TOLERANCE
    assert difference(computed.double(), expected) < TOLERANCE
    steps, forwards = (
        torch.stack(generate(family, attached, *BATCH[:2], use_cache=use_cache).logits) for use_cache in (True, False)
    )
    assert difference(steps, forwards) < TOLERANCE


def test_models_of_one_axis_have_time_alone():
    family = FAMILIES["llava"]
    inputs = family.inputs(family.build(), *BATCH)
    time, whole = (
        logits(get_peft_model(family.build(), DIPEConfig(max_distance=0, axes=axes)), inputs)
        for axes in ("time", "all")
    )
    assert torch.equal(time, whole)
    space = get_peft_model(family.build(), DIPEConfig(max_distance=0, axes="space"))
    with pytest.raises(
        NotImplementedError, match=r"DIPEConfig.axes is 'space', but the positions of this model have only one axis"
    ):
        logits(space, inputs)


def test_padding_belongs_to_no_run(family: TinyVLM):
    """Padding right after an image: the text run begins with the first real token behind it."""
    model = family.build()
    inputs = family.inputs(model, "t4 i t9")
    ids = inputs["input_ids"][0]
    after = int(((ids == IMAGE) | (ids == VIDEO)).nonzero().max()) + 1
    inputs["attention_mask"][0, after : after + 2] = 0
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=DIPEConfig(max_distance=0)) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = logits(get_peft_model(model, DIPEConfig(max_distance=0)), inputs)[real]
    assert difference(computed.double(), expected) < TOLERANCE

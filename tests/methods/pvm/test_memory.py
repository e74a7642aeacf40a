"""What PVM does with its memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from forwards import LAST, TOLERANCE, difference, generate, length_of, logits, prefill, resume
from methods_under_test import METHODS
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from tiny_vlms import FAMILIES, IMAGE, TinyVLM

from peft_pvm.utils.packages import CACHE


@pytest.fixture
def model(tiny: TinyVLM) -> PeftModel:
    return METHODS["pvm"].attach(tiny.build())


def test_images_are_projected_once(tiny: TinyVLM, model: PeftModel):
    layer = next(module for name, module in model.named_modules() if name.endswith(".pvm"))
    widths = []
    layer.pvm_vision_reducer["default"].register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    generate(tiny, model, "t4 i t6")
    num_visual = len(tiny.image(model.get_base_model(), torch.Generator())[0])
    assert len(widths) == 1, "once per image, not once per step"

    # A second image into the same cache: only the new one is projected.
    first, whole = "t4 i t3", "t4 i t3 i t6"
    stop = tiny.inputs(model.get_base_model(), first)["input_ids"].shape[1]
    widths.clear()
    cache = prefill(tiny, model, whole, stop=stop)
    resume(tiny, model, cache, whole, start=stop)
    assert len(widths) == 2
    assert widths[0] == widths[1] <= num_visual


def test_branch_is_computed_for_unsilenced_text_only(tiny: TinyVLM, model: PeftModel):
    layer = next(module for name, module in model.named_modules() if name.endswith(".pvm"))
    widths = []
    layer.pvm_text_reducer["default"].register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    logits(model, tiny.inputs(model.get_base_model(), "t4 i t6", "t9"))
    visual, _ = tiny.image(model.get_base_model(), torch.Generator())
    after_image = 6 + (visual[-1] != IMAGE)  # an end-of-image token is text
    assert widths == [after_image], "the text after the image, not the text before it, not the image"
    widths.clear()
    logits(model, tiny.inputs(model.get_base_model(), "t9"))
    assert widths == [], "without images there is nothing to compute"


def test_sample_visibility_shows_later_images():
    tiny = FAMILIES["llava"]
    base = tiny.build()
    image_first, image_later = tiny.inputs(base, "i t6"), tiny.inputs(base, "t4 i t3")
    plain = logits(base, image_later)
    found = {}
    for visibility in ("causal", "sample"):
        model = METHODS["pvm"].attach(base, memory_visibility=visibility)
        found[visibility] = logits(model, image_first), logits(model, image_later)
        base = model.unload()
    assert torch.equal(found["causal"][0], found["sample"][0])
    assert torch.equal(found["causal"][1][:, :4], plain[:, :4]), "text before the image sees nothing"
    assert difference(found["sample"][1][:, :4], plain[:, :4]) > 100 * TOLERANCE


def test_new_weights_project_the_memory_again(plain: TinyVLM):
    model = METHODS["pvm"].attach(plain.build())
    conversation = "t4 i t9"
    length = length_of(plain, model, conversation)
    cache = prefill(plain, model, conversation, stop=length - LAST)
    weights = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: tensor * 1.5 for name, tensor in weights.items()})
    kept = resume(plain, model, copy.deepcopy(cache), conversation, length - LAST)
    cache.visual_memory.projections.clear()
    assert torch.equal(kept, resume(plain, model, cache, conversation, length - LAST))


def test_projections_go_with_their_branches():
    """A conversation may outlive many adapters: weights that are loaded, adapters that come and go."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    conversation = "t4 i t20"
    length = length_of(family, model, conversation)
    cache = prefill(family, model, conversation, stop=length - 15)
    num_layers = len(cache.visual_memory.projections)
    for step in range(length - 15, length):
        model.load_state_dict(model.state_dict())
        if step % 2:
            model.add_adapter(f"other-{step}", model.peft_config["default"])
            model.set_adapter(f"other-{step}")
        piece = family.inputs(model.get_base_model(), conversation, start=step, stop=step + 1)
        logits(model, piece, **{CACHE: cache}, use_cache=True)
        if step % 2:
            model.delete_adapter(f"other-{step}")
            model.set_adapter("default")
        assert len(cache.visual_memory.projections) <= 2 * num_layers
    assert pickle.loads(pickle.dumps(cache)).visual_memory.projections == {}, "another process has other branches"


def test_autocast_may_end_between_prefill_and_decode(plain: TinyVLM):
    model = METHODS["pvm"].attach(plain.build())
    conversation = "t4 i t9"
    length = length_of(plain, model, conversation)
    with torch.autocast("cpu", torch.bfloat16):
        cache = prefill(plain, model, conversation, stop=length - LAST)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    assert resume(plain, model, cache, conversation, length - LAST).isfinite().all()

"""Layers for PVM, proposed from where a model looks before it answers."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from methods_under_test import METHODS
from peft import LoraConfig, get_peft_model
from tiny_vlms import FAMILIES, IMAGE, TinyVLM

from peft_pvm import PVMConfig
from peft_pvm.demo.for_trainers import make_chats, tiny_vlm_processor
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.probe.layers import propose_layers, proposed, visual_shares
from peft_pvm.probe.rows import Lesson, read_chats
from peft_pvm.tokens.families import find_vlm


# Of a pretrained language model of 30 layers that was taught to read mosaics, asked without text in between. PVM in
# layers 20, 23, 26 learned to read the image there in 155 steps; in 7, 13, 20 not yet.
MEASURED = [0.2385, 0.0092, 0.0235, 0.0317, 0.0152, 0.0270, 0.0293, 0.0082, 0.0542, 0.0339]
MEASURED += [0.0317, 0.0165, 0.0368, 0.0047, 0.0621, 0.0781, 0.0284, 0.1269, 0.0136, 0.0210]
MEASURED += [0.0105, 0.1093, 0.1105, 0.3809, 0.1814, 0.0083, 0.0418, 0.0235, 0.0117, 0.0958]


def peak_at(layer_idx: int, depth: int) -> dict[int, float]:
    return {index: 0.4 if index == layer_idx else 0.1 for index in range(depth)}


@pytest.mark.parametrize(
    ("shares", "depth", "count", "layers"),
    [
        (dict(enumerate(MEASURED)), 30, 3, [20, 23, 26]),
        (dict(enumerate(MEASURED)), 30, 1, [23]),
        (dict(enumerate(MEASURED)), 30, 5, [17, 20, 23, 26, 29]),
        (peak_at(29, 30), 30, 3, [23, 26, 29]),  # the last layer
        ({**peak_at(22, 36), 0: 0.9}, 36, 3, [18, 22, 26]),  # layer 0 does not count
        ({**peak_at(3, 6), 1: 0.9}, 6, 3, [2, 3, 4]),
        (peak_at(2, 3), 3, 3, [0, 1, 2]),  # as many as there are
        (peak_at(1, 2), 2, 1, [1]),
        (peak_at(0, 1), 1, 1, [0]),
        ({3: 0.1, 7: 0.3, 11: 0.2}, 12, 3, [6, 7, 8]),  # linear attention in the others
        ({3: 0.2}, 30, 3, [0, 3, 6]),  # softmax in a first layer alone
    ],
)
def test_layers_stand_around_the_peak(shares: dict[int, float], depth: int, count: int, layers: list[int]):
    assert proposed(shares, depth, count).layers == layers


def test_any_number_of_layers_of_any_depth_has_its_place():
    for depth in (1, 2, 3, 6, 11, 36):
        for peak, count in itertools.product(range(depth), range(1, depth + 1)):
            proposal = proposed({peak: 0.3}, depth, count)
            assert len(set(proposal.layers)) == count
            assert proposal.layers == sorted(proposal.layers)
            assert 0 <= proposal.layers[0] <= proposal.layers[-1] < depth
            assert proposal.peak == peak
            reach = max(1, round(depth / 10))
            assert min(abs(layer - peak) for layer in proposal.layers) <= reach, (depth, peak, count)


def test_the_reason_is_said():
    reason = proposed(dict(enumerate(MEASURED)), 30).reason
    assert reason.startswith("Before an answer, attention on the image is highest in layer 23: 0.381")
    assert "layers 10 to 29 is 0.070" in reason
    assert "flat" not in reason
    flat = proposed(dict.fromkeys(range(30), 0.2), 30)
    assert "nearly flat" in flat.reason
    assert len(flat.layers) == 3


def test_where_nothing_looks_there_is_nothing_to_propose():
    for shares in ({}, {0: 0.0, 1: 0.0}):
        with pytest.raises(ValueError, match="No attention reaches the image"):
            proposed(shares, 2, 1)


def test_shares_are_those_of_the_tokens_that_predict_the_answer(tiny: TinyVLM):
    model = tiny.build(attn_implementation="eager")
    lessons = [Lesson(tiny.prompt(model, "t4 i t9"), 3), Lesson(tiny.prompt(model, "t2 i t5 i t4"), 1)]
    expected = []
    for lesson in lessons:
        attentions = model(**lesson.inputs, output_attentions=True).attentions
        rows = slice(-lesson.num_answer_tokens - 1, -1)
        is_image = lesson.inputs["input_ids"][0] == IMAGE
        expected.append([weights[0, :, rows][..., is_image].sum(-1).mean().item() for weights in attentions])
    shares = visual_shares(model, lessons, 2)
    torch.testing.assert_close(torch.tensor(list(shares.values())), torch.tensor(expected).mean(0))


def test_every_family_can_be_asked(family: TinyVLM):
    model = family.build()
    model.train()
    lessons = [Lesson(family.prompt(model, "t4 i t9"), 3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = visual_shares(model, lessons, 1)
    assert list(shares) == sorted(find_vlm(model).self_attentions)
    assert all(0 < share < 1 for share in shares.values())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    depth = len(find_vlm(model).layers)
    get_peft_model(model, PVMConfig(r=32, layers_to_transform=proposed(shares, depth).layers))


def test_a_model_in_the_middle_of_training_is_asked_as_it_would_answer():
    tiny = FAMILIES["qwen3_vl"]
    model = tiny.build()
    lessons = [Lesson(tiny.prompt(model, "t4 i t9"), 3)]
    expected = visual_shares(model, lessons, 1)
    model.train()
    for attention in find_vlm(model).self_attentions.values():
        attention.attention_dropout = 0.5
    model.model.rope_deltas = deltas = torch.tensor([[7]])  # of somebody's conversation
    assert visual_shares(model, lessons, 1) == expected
    assert model.model.rope_deltas is deltas


def test_adapters_do_not_count_and_are_left_as_they_are():
    tiny = FAMILIES["qwen3_vl"]
    lessons = [Lesson(tiny.prompt(tiny.build(), "t4 i t9"), 3)]
    expected = visual_shares(tiny.build(), lessons, 1)
    for model in (
        METHODS["pvm"].attach(tiny.build()),
        METHODS["dipe"].attach(tiny.build()),
        get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)),
    ):
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        logits = model(**lessons[0].inputs).logits
        assert visual_shares(model, lessons, 1) == expected
        assert torch.equal(model(**lessons[0].inputs).logits, logits)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


def test_auto_is_refused_with_what_to_call_and_its_answer_is_saved(tmp_path: Path):
    pytest.importorskip("datasets", reason="chats are a data set")
    pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")
    model = load_tiny_vlm()
    names = [name for name, _ in model.named_modules()]
    config = PVMConfig(r=32, layers_to_transform="auto")
    with pytest.raises(ValueError, match=re.escape("propose_layers from peft_pvm.probe.layers")):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names

    chats = read_chats(make_chats("messages", 3, 0, "test"), 3)
    seen = []
    proposal = propose_layers(model, tiny_vlm_processor(), chats, progress=lambda *step: seen.append(step))
    assert seen == [("reading rows", number, 3) for number in range(3)]
    config.layers_to_transform = proposal.layers
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == proposal.layers
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"count is {count}, but the text model has 6 layers"):
            propose_layers(model, tiny_vlm_processor(), chats, count)

"""Training an adapter: what moves, what does not, and what a recipe trains on."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from peft import get_peft_model

from peft_pvm import PVMConfig
from peft_pvm.demo import train
from peft_pvm.demo.mosaic import IMAGE, IMAGE_LENGTH, Batch, make_questions
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe, hide_image, target_logits, train_adapter


SHORT = Recipe(steps=3, hidden_steps=0, max_distractor_length=96)


def with_pvm(seed: int = 0, **fields):
    torch.manual_seed(seed)
    return get_peft_model(load_tiny_vlm(), PVMConfig(r=64, **fields))


def trained(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize(("steps", "hidden_steps"), [(3, 0), (0, 3)])
def test_training_an_adapter_moves_nothing_else(steps, hidden_steps):
    model = with_pvm()
    before = {name: tensor.clone() for name, tensor in load_tiny_vlm().state_dict().items()}
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".pvm_" in name for name in fresh)
    train_adapter(model, dataclasses.replace(SHORT, steps=steps, hidden_steps=hidden_steps))
    moved = [name for name, p in model.named_parameters() if name in fresh and not torch.equal(p, fresh[name])]
    assert set(moved) == set(fresh)
    restored = model.unload().state_dict()
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], before[name]) for name in before)


def test_a_hidden_image_reaches_the_answers_through_the_adapter_alone():
    model = with_pvm(init_gate=1.0).eval()
    batch = hide_image(model, make_questions("test", 2, 10, 2, torch.Generator().manual_seed(0)))
    other = make_questions("test", 2, 10, 2, torch.Generator().manual_seed(1))
    swapped = make_questions("test", 2, 10, 2, torch.Generator().manual_seed(0))
    swapped.inputs["pixel_values"] = other.inputs["pixel_values"]
    swapped = hide_image(model, swapped)
    with torch.no_grad():
        assert not torch.equal(target_logits(model, batch), target_logits(model, swapped))
        with model.disable_adapter():
            assert torch.equal(target_logits(model, batch), target_logits(model, swapped))


@pytest.mark.parametrize(
    "wrong",
    [{"max_distractor_length": 3}, {"hidden_steps": -1}, {"steps": -1}, {"learning_rate": 0.0}, {"lengths": "short"}],
)
def test_recipes_refuse_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}"):
        Recipe(**wrong)


def test_training_refuses_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="is_trainable"):
        train_adapter(with_pvm().requires_grad_(False), SHORT)


def batches_of(recipe: Recipe) -> list[Batch]:
    """What a recipe trains on, step by step."""
    drawn: list[Batch] = []
    fit = train.fit

    def looking(model, groups, draw, steps, *rest):
        drawn.extend(draw(step) for step in range(steps))
        return fit(model, groups, draw, 1, *rest)

    with mock.patch.object(train, "fit", looking):
        train_adapter(with_pvm(), recipe)
    return drawn


def test_a_recipe_hides_the_image_first_and_writes_long_transcriptions_afterwards():
    drawn = batches_of(Recipe(steps=80, hidden_steps=80, max_distractor_length=512))
    hidden = [bool((batch.inputs["attention_mask"] == 0).any()) for batch in drawn]
    assert hidden == [True] * 80 + [False] * 80
    for step, batch in enumerate(drawn):
        masked = batch.inputs["input_ids"] == IMAGE
        assert torch.equal(batch.inputs["attention_mask"] == 0, masked & hidden[step])
    lengths = [batch.inputs["input_ids"].shape[1] for batch in drawn]
    assert max(lengths[:80]) <= 3 * 11 + 64 + 17
    assert 400 < max(lengths[80:]) <= 3 * 11 + 512 + 17
    transcribed = [batch.targets.shape[1] for batch in drawn[3::4]]
    assert set(transcribed[:20]) == {17}
    assert 200 < max(transcribed[20:]) <= 511


def test_lengths_are_drawn_as_the_recipe_says():
    text = {}
    for lengths in ("log-uniform", "uniform"):
        drawn = batches_of(Recipe(steps=120, hidden_steps=40, max_distractor_length=1024, lengths=lengths))
        asked = [batch for step, batch in enumerate(drawn) if step % 4 in (0, 2)]
        text[lengths] = [batch.inputs["input_ids"].shape[1] - IMAGE_LENGTH - 17 for batch in asked]
    assert text["log-uniform"][:20] == text["uniform"][:20]  # with the image hidden
    assert max(text["uniform"][:20]) <= 64
    for lengths, median in (("log-uniform", 64), ("uniform", 514)):
        visible = sorted(text[lengths][20:])
        assert len(visible) == 60
        assert visible[0] >= 4
        assert visible[-1] <= 1024
        assert median / 1.7 < visible[30] < 1.7 * median

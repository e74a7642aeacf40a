"""Training an adapter: what moves, what does not, and what a recipe trains on."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from forwards import difference
from peft import LoraConfig, get_peft_model

from peft_pvm import PVMConfig
from peft_pvm.demo import train
from peft_pvm.demo.mosaic import IMAGE, IMAGE_LENGTH, Batch, make_questions
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe, train_adapter


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


def test_hidden_steps_train_what_a_mask_of_visual_tokens_does():
    """Written out as the model itself can be asked for it: visual tokens are masked for all, with given positions.

    There they do not see one another either. That makes no difference here: PVM reads embeddings.
    """
    recipe = Recipe(steps=0, hidden_steps=16, seed=3)
    hidden, masked, plain = with_pvm(), with_pvm(), with_pvm()
    train_adapter(hidden, recipe)
    original = train.draw_step

    def draw_masked(*args, **kwargs) -> Batch:
        batch = original(*args, **kwargs)
        inputs = dict(batch.inputs)
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        inputs["position_ids"], _ = masked.model.model.get_rope_index(**{name: inputs[name] for name in names})
        inputs["attention_mask"] = (inputs["input_ids"] != IMAGE).long()
        return dataclasses.replace(batch, inputs=inputs)

    with mock.patch.object(train, "images_hidden", return_value=contextlib.nullcontext()):
        train_adapter(plain, recipe)
        with mock.patch.object(train, "draw_step", draw_masked):
            train_adapter(masked, recipe)
    assert difference(trained(hidden), trained(masked)) < 1e-5
    assert difference(trained(hidden), trained(plain)) > 1e-2


def test_models_without_pvm_are_trained_blind_as_well():
    """What PVM is compared with must not see more than it does."""
    model = get_peft_model(load_tiny_vlm(), LoraConfig(r=2, target_modules=["q_proj"]))
    rows: list[torch.Tensor | None] = []
    text_model = model.model.model.language_model
    text_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["visual_context"].hidden_rows), with_kwargs=True
    )
    with mock.patch.object(train, "images_hidden", wraps=train.images_hidden) as hiding:
        train_adapter(model, dataclasses.replace(SHORT, steps=0, hidden_steps=2))
    assert hiding.call_count == 2
    assert all(bool(each.all()) for each in rows)
    assert len(rows) == 2


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

    def looking(model, groups, draw, steps, description, checkpoint, is_hidden):
        assert [is_hidden(step) for step in range(steps)] == [step < recipe.hidden_steps for step in range(steps)]
        drawn.extend(draw(step) for step in range(steps))
        return fit(model, groups, draw, 1, description)

    with mock.patch.object(train, "fit", looking):
        train_adapter(with_pvm(), recipe)
    return drawn


def test_a_recipe_is_short_while_the_image_is_hidden_and_writes_long_transcriptions_afterwards():
    drawn = batches_of(Recipe(steps=80, hidden_steps=80, max_distractor_length=512))
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


@pytest.mark.parametrize("images", [1, 3])
def test_parts_of_a_batch_are_its_rows(images: int):
    model = load_tiny_vlm()
    batch = make_questions("train", 7, 20, 3, torch.Generator().manual_seed(0), images)
    parts = batch.parts(2 * batch.inputs["input_ids"].shape[1])
    assert [len(part.targets) for part in parts] == [2, 2, 2, 1]
    with torch.no_grad():
        found = torch.cat([train.target_logits(model, part) for part in parts])
        assert difference(found, train.target_logits(model, batch)) < 1e-5
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert batch.parts(10**6) == [batch]
    assert len(batch.parts(1)) == 7


def test_long_steps_have_the_gradients_of_all_rows(monkeypatch):
    """What the optimizer is given, in parts and at once."""
    seen = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: seen.append(gradients(parameters)))
    for most in (10**6, 100):
        monkeypatch.setattr(train, "TOKENS_PER_BACKWARD", most)
        train_adapter(with_pvm(), dataclasses.replace(SHORT, steps=1))
    assert difference(*seen) < 1e-5 * seen[0].abs().max()


def gradients(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters])

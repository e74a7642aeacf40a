"""The shipped tiny model, and training on top of it."""

from __future__ import annotations

import os

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig
from peft_pvm.lab.mosaic import make_batch
from peft_pvm.lab.tiny_vlm import SHIPPED, load_tiny_vlm, new_tiny_vlm, save_tiny_vlm
from peft_pvm.lab.train import accuracy, answer_logits, hide_image, train_adapter, train_base


def test_the_shipped_model_is_a_small_plain_qwen3_vl():
    model = load_tiny_vlm()
    assert type(model) is Qwen3VLForConditionalGeneration
    assert not model.training
    assert model.config.text_config.max_position_embeddings >= 4096
    assert os.path.getsize(SHIPPED) <= 8_000_000


def test_the_shipped_model_answers_when_asked_at_once_and_fades():
    model = load_tiny_vlm()
    assert accuracy(model, 0, 200).value >= 0.85
    assert accuracy(model, 512, 40).value <= 0.5


def test_accuracy_asks_the_same_questions_again():
    model = load_tiny_vlm()
    assert accuracy(model, 100, 20, seed=5) == accuracy(model, 100, 20, seed=5)


def test_saving_and_loading_changes_nothing(tmp_path):
    model = new_tiny_vlm(seed=1)
    save_tiny_vlm(model, tmp_path / "model.safetensors")
    loaded = load_tiny_vlm(tmp_path / "model.safetensors")
    batch = make_batch("test", 2, 30, 2, torch.Generator().manual_seed(0))
    assert loaded.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(answer_logits(loaded, batch), answer_logits(model, batch))


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tiny_vlm(tmp_path / "nowhere.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="config"):
        load_tiny_vlm(tmp_path / "other.safetensors")


def test_training_the_base_follows_its_seed():
    trained = []
    for seed in (0, 0, 1):
        model = new_tiny_vlm()
        train_base(model, steps=2, seed=seed)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("hidden_share", [0.0, 0.5, 1.0])
def test_training_an_adapter_moves_nothing_else(hidden_share):
    base = load_tiny_vlm()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, PVMConfig(r=64))
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".pvm_" in name for name in fresh)
    train_adapter(model, steps=3, max_distractor_length=96, hidden_share=hidden_share)
    moved = [name for name, p in model.named_parameters() if name in fresh and not torch.equal(p, fresh[name])]
    assert set(moved) == set(fresh)
    restored = model.unload().state_dict()
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], before[name]) for name in before)


def test_a_hidden_image_reaches_the_answers_through_the_adapter_alone():
    torch.manual_seed(0)
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64, init_gate=1.0)).eval()
    batch = hide_image(model, make_batch("test", 2, 10, 2, torch.Generator().manual_seed(0)))
    other = make_batch("test", 2, 10, 2, torch.Generator().manual_seed(1))
    swapped = make_batch("test", 2, 10, 2, torch.Generator().manual_seed(0))
    swapped.inputs["pixel_values"] = other.inputs["pixel_values"]
    swapped = hide_image(model, swapped)
    with torch.no_grad():
        assert not torch.equal(answer_logits(model, batch), answer_logits(model, swapped))
        with model.disable_adapter():
            assert torch.equal(answer_logits(model, batch), answer_logits(model, swapped))


@pytest.mark.parametrize("wrong", [{"max_distractor_length": 63}, {"hidden_share": 1.5}, {"steps": 0}])
def test_training_refuses_numbers_out_of_range(wrong):
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64))
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        train_adapter(model, **wrong)


def test_training_refuses_a_model_with_nothing_to_train():
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64)).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        train_adapter(model)

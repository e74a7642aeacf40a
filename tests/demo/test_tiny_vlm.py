"""The shipped tiny model."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3VLForConditionalGeneration

from peft_pvm.demo.mosaic import make_questions
from peft_pvm.demo.recall import recall, transcription
from peft_pvm.demo.tiny_vlm import SHIPPED, load_tiny_vlm, save_tiny_vlm, tiny_vlm_config
from peft_pvm.demo.train import target_logits


def test_the_shipped_model_is_a_small_plain_qwen3_vl():
    model = load_tiny_vlm()
    assert type(model) is Qwen3VLForConditionalGeneration
    assert not model.training
    assert model.config.text_config.max_position_embeddings >= 8192
    assert os.path.getsize(SHIPPED) <= 8_000_000


def test_the_shipped_model_answers_when_asked_at_once_and_fades():
    model = load_tiny_vlm()
    assert recall(model, 0).value >= 0.95
    assert recall(model, 512, rows=8).value <= 0.5
    rounds = [round_.value for round_ in transcription(model, 252, rows=8)]
    assert rounds[0] >= 0.95
    assert rounds[-1] <= 0.6


def test_saving_and_loading_changes_nothing(tmp_path):
    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(tiny_vlm_config()).eval()
    save_tiny_vlm(model, tmp_path / "model.safetensors")
    loaded = load_tiny_vlm(tmp_path / "model.safetensors")
    batch = make_questions("test", 2, 30, 2, torch.Generator().manual_seed(0))
    assert loaded.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(target_logits(loaded, batch), target_logits(model, batch))


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tiny_vlm(tmp_path / "nowhere.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="config"):
        load_tiny_vlm(tmp_path / "other.safetensors")

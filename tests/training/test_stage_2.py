"""What stage 2 trains, on every family: it starts from the adapter's weights, and its checkpoints go back in whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods_under_test import METHODS
from peft import LoraConfig, get_peft_model
from tiny_vlms import TinyVLM
from training_runs import script
from transformers import Trainer, TrainingArguments
from trl import ModelConfig

from peft_pvm.integrations.trl import save_parts
from peft_pvm.tokens.families import find_vlm


@pytest.mark.parametrize("learns", ["lora", "base"])
def test_a_checkpoint_goes_back_in(family: TinyVLM, learns: str, tmp_path: Path):
    """By the trainer's own saving and loading, which would not miss a tensor that has another name in the file."""
    family.build().save_pretrained(tmp_path / "base")
    stage_1 = METHODS["pvm"].attach(family.build())
    stage_1.save_pretrained(tmp_path / "pvm")
    options = (
        {
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": ["all-linear"],
            "lora_dropout": 0.0,
            "lora_modules_to_save": ["embed_tokens"],
        }
        if learns == "lora"
        else {}
    )
    settings = ModelConfig(model_name_or_path=str(tmp_path / "base"), dtype="float32", **options)

    def trainer(name: str) -> Trainer:
        model = script("grpo").build(settings, str(tmp_path / "pvm"))
        return Trainer(model, TrainingArguments(tmp_path / name, use_cpu=True, report_to="none"))

    saved = trainer("checkpoint")
    weights = dict(saved.model.named_parameters())
    for name, parameter in stage_1.get_base_model().named_parameters():
        if ".pvm_" in name:
            assert torch.equal(weights[name.replace(".default.", ".pvm.")], parameter)
    text_model = {*find_vlm(saved.model).text_model.parameters(), *saved.model.get_output_embeddings().parameters()}
    for name, parameter in saved.model.named_parameters():
        adapter = ".lora_" in name or ".modules_to_save." in name if learns == "lora" else parameter in text_model
        assert parameter.requires_grad == (adapter or ".pvm_" in name), name

    if learns == "lora":
        adapted = {name.partition(".lora_")[0] for name in weights if ".lora_" in name}
        assert adapted
        assert all(name.startswith(find_vlm(saved.model).text_model_name) and ".pvm" not in name for name in adapted)

    with torch.no_grad():
        for parameter in saved.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    saved.save_model()
    loaded = trainer("other")
    loaded._load_from_checkpoint(str(tmp_path / "checkpoint"))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_only_a_pvm_adapter_is_started_from(tiny: TinyVLM, tmp_path: Path):
    tiny.build().save_pretrained(tmp_path / "base")
    get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    settings = ModelConfig(model_name_or_path=str(tmp_path / "base"), dtype="float32")
    with pytest.raises(ValueError, match="not PVM"):
        script("grpo").build(settings, str(tmp_path / "lora"))


def test_a_wrapped_model_saves_itself(tiny: TinyVLM, tmp_path: Path):
    model = METHODS["pvm"].attach(tiny.build())
    with pytest.raises(ValueError, match=r"trainer\.save_model\(\) saves the adapter"):
        save_parts(Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to="none")), tmp_path)

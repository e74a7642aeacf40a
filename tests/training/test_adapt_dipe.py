"""A LoRA trained under DIPE, for a few steps: two adapters that load together, and warn of each other alone."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forwards import difference, logits
from peft import PeftModel
from training_runs import adapter_weights, run

from peft_pvm import DIPEConfig, attached, load_adapters
from peft_pvm.demo.mosaic import make_questions
from peft_pvm.demo.tiny_vlm import load_tiny_vlm


def questions() -> dict[str, torch.Tensor]:
    return dict(make_questions("test", 2, 300, 9, torch.Generator().manual_seed(0)).inputs)


@pytest.mark.parametrize("max_distance", [0, 24])
def test_what_is_saved_is_what_was_trained(material: SimpleNamespace, max_distance: int, tmp_path: Path):
    trainer = run("dipe", material, output_dir=tmp_path, max_steps=6, max_distance=max_distance)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    learns = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert learns
    assert all(".lora_" in name and ".language_model." in name for name in learns)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["dipe", "lora"]
    assert any(tensor.abs().max() > 1e-3 for key, tensor in adapter_weights(tmp_path / "lora").items() if "_B." in key)

    model, expected = load_tiny_vlm(), logits(trainer.model.eval(), questions())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapters(model, [str(tmp_path / "dipe"), str(tmp_path / "lora")])
    assert model.peft_config["dipe"].max_distance == max_distance
    assert torch.equal(logits(model, questions()), expected)

    with pytest.warns(
        UserWarning, match=rf"'dipe' \(DIPE\), which does not act .*{tmp_path}/dipe', '{tmp_path}/lora'"
    ):
        alone = PeftModel.from_pretrained(load_tiny_vlm(), tmp_path / "lora").eval()
    assert difference(logits(alone, questions()), expected) > 1e-3
    with attached(alone, DIPEConfig(max_distance=max_distance)):
        assert torch.equal(logits(alone, questions()), expected)


def test_it_trains_under_dipe(material: SimpleNamespace, tmp_path: Path):
    """The first loss is that of the base with DIPE, and beyond all distances that of the base."""
    options = {"max_steps": 1, "train_sampling_strategy": "sequential"}
    first = {}
    for max_distance in (0, 2**24):
        trainer = run("dipe", material, output_dir=tmp_path / "out", max_distance=max_distance, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        base = load_tiny_vlm()
        with attached(base, DIPEConfig(max_distance=0)) if not max_distance else torch.no_grad(), torch.no_grad():
            first[max_distance] = base(**batch).loss.item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(first[max_distance], rel=0.02)
    assert abs(first[0] - first[2**24]) > 0.5 * first[2**24]


def test_without_a_lora_nothing_could_learn(material: SimpleNamespace, tmp_path: Path):
    with pytest.raises(SystemExit, match="DIPE has nothing that could learn"):
        run("dipe", material, output_dir=tmp_path, use_peft=False)


def test_a_run_goes_on_from_its_checkpoint(material: SimpleNamespace, tmp_path: Path):
    """To the bit, from a checkpoint that holds two adapters and nothing of the base; without a warning of either."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run("dipe", material, output_dir=tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    weights = [path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors")]
    assert sorted(map(str, weights)) == ["dipe/adapter_model.safetensors", "lora/adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trained together with")
        run("dipe", material, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    whole, resumed, early = (adapter_weights(tmp_path / path / "lora") for path in ("whole", "resumed", checkpoint))
    assert any(not torch.equal(tensor, early[key]) for key, tensor in whole.items())
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key

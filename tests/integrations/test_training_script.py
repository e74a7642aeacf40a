"""`train_sft.py` with what else people use, of which packages slow every import of PEFT: four bits, and a tracker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel


for package in ("trl", "bitsandbytes", "wandb"):
    pytest.importorskip(package, reason="`make test-lmms-eval` installs it")

from training_runs import adapter_weights, make_material, run  # noqa: E402

from peft_pvm.demo.tiny_vlm import load_tiny_vlm  # noqa: E402


def test_on_a_base_of_four_bits_with_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PVM learns in fp32, its adapter is one for any base, and what it logs is written down without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    material = make_material(tmp_path)
    trainer = run(
        "sft",
        material,
        output_dir=tmp_path / "pvm",
        max_steps=3,
        load_in_4bit=True,
        dtype="float32",
        report_to="wandb",
    )
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    assert all(".pvm_" in name for name in trained)

    saved = adapter_weights(tmp_path / "pvm")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all((tensor != tensor.bfloat16()).any() for key, tensor in saved.items() if "gate" in key)
    loaded = dict(PeftModel.from_pretrained(load_tiny_vlm(), tmp_path / "pvm").named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in trained.items())

    sys.modules["wandb"].finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/gaze/visual_mass" in log.read_bytes()

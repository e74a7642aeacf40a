"""Two processes on one CPU, with the configurations that are meant for GPUs: they train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import difference
from peft import PeftModel
from training_runs import EXAMPLES, adapter_weights, arguments, run
from transformers import AutoModelForImageTextToText

from peft_pvm.curves import read_log
from peft_pvm.lab.tiny_vlm import load_tiny_vlm


ON_CPU = {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}


def launch(kind: str, stage: str, material: SimpleNamespace, folder: Path, **options) -> None:
    """Run a training script on two processes, with `accelerate launch`."""
    config = yaml.safe_load((EXAMPLES / "accelerate" / f"{kind}.yaml").read_text())
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**config, **ON_CPU, "main_process_port": 0}))
    process = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", folder / "accelerate.yaml"),
            EXAMPLES / f"train_{stage}.py",
            *arguments(stage, material, output_dir=folder / "out", **options),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]


@pytest.mark.parametrize("data", ["messages", "mixed"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(material: SimpleNamespace, kind: str, data: str, tmp_path: Path):
    """In "mixed", the second process never gets an image."""
    options = {
        "dataset_name": getattr(material, data),
        "max_steps": 4,
        "learning_rate": 1e-3,  # Adam's steps have this size, whatever the gradients' noise
        "train_sampling_strategy": "sequential",
    }
    launch(kind, "sft", material, tmp_path, per_device_train_batch_size=4, **options)
    run("sft", material, output_dir=tmp_path / "alone", per_device_train_batch_size=8, **options)
    for curve, bound in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4})):  # Adam forgets gradients' size
        one, two = (
            [entry[curve] for entry in read_log(tmp_path / name) if curve in entry] for name in ("alone", "out")
        )
        assert one == pytest.approx(two, **bound), curve
    alone, together = adapter_weights(tmp_path / "alone"), adapter_weights(tmp_path / "out")
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        assert difference(tensor, together[key]) < 1e-5, key
    assert all(tensor.abs() > 1e-3 for key, tensor in alone.items() if key.endswith("pvm_gate.weight")), "it learned"


def test_a_sharded_run_goes_on(material: SimpleNamespace, tmp_path: Path):
    """From a checkpoint that holds nothing of the base, to the same weights."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    launch("fsdp2", "sft", material, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    assert (
        sum(file.stat().st_size for file in checkpoint.iterdir())
        < (material.model / "model.safetensors").stat().st_size
    )
    launch("fsdp2", "sft", material, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    whole, resumed = (adapter_weights(tmp_path / name / "out") for name in ("whole", "resumed"))
    assert all(difference(tensor, resumed[key]) == 0 for key, tensor in whole.items())
    assert any(difference(tensor, whole[key]) > 1e-4 for key, tensor in adapter_weights(checkpoint).items())


def test_a_sharded_stage_2_saves_all_its_parts(material: SimpleNamespace, stage_1: Path, tmp_path: Path):
    launch("fsdp2", "grpo", material, tmp_path, adapter=stage_1, max_steps=2, per_device_train_batch_size=8)
    parts = tmp_path / "out"
    base = AutoModelForImageTextToText.from_pretrained(parts / "base")
    start = load_tiny_vlm().state_dict()
    assert base.state_dict().keys() == start.keys()
    moved = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved
    assert not [name for name in moved if ".visual." in name]
    before, after = adapter_weights(stage_1), adapter_weights(parts / "pvm")
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())
    PeftModel.from_pretrained(base, parts / "pvm")

"""Two processes on one CPU, with the configurations that are meant for GPUs: they train what one process trains."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
import yaml
from forwards import difference
from peft import PeftModel
from safetensors.torch import load_file
from training_runs import EXAMPLES, adapter_weights, arguments, by_rank, run
from transformers import AutoModelForImageTextToText

from peft_pvm import load_adapters
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.folders.adapter_file import AdapterFile
from peft_pvm.integrations.trl import read_log


CHECKPOINTED = "fsdp2 with activation checkpointing"
ON_CPU = {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}


def launch(kind: str, stage: str, material: SimpleNamespace, folder: Path, **options) -> None:
    """Run a training script on two processes, with `accelerate launch`; each holds what the configuration says."""
    config = yaml.safe_load((EXAMPLES / "accelerate" / f"{kind.split()[0]}.yaml").read_text())
    if kind == CHECKPOINTED:
        config["fsdp_config"]["fsdp_activation_checkpointing"] = True
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**config, **ON_CPU, "main_process_port": 0}))
    launched = fresh.TESTS / "launched.py"
    of_script = launched, stage, folder / "spread", *arguments(stage, material, output_dir=folder / "out", **options)
    fresh.run(launched, "--config_file", folder / "accelerate.yaml", *of_script)
    here = [json.loads((folder / f"spread-{rank}.json").read_text()) for rank in range(2)]
    if kind == "ddp":
        assert all(spread["sharded"] == 0 and spread["numbers_here"] == spread["numbers"] for spread in here)
        return
    assert all(spread["sharded"] == spread["parameters"] for spread in here), "DTensors, every one"
    assert sum(spread["numbers_here"] for spread in here) == here[0]["numbers"], "each number in one process"
    assert max(spread["numbers_here"] for spread in here) < 0.6 * here[0]["numbers"]
    by_itself = here[0]["by_itself"]
    assert by_itself["FSDPQwen3VLTextDecoderLayer"] == 6
    assert by_itself.get("FSDPCheckpointWrapper", 0) == (6 if kind == CHECKPOINTED else 0)
    assert not [name for name in by_itself if "Vision" in name]


@pytest.mark.parametrize(("kind", "data"), [("ddp", "messages"), ("fsdp2", "mixed")])
def test_two_processes_train_what_one_does(material: SimpleNamespace, kind: str, data: str, tmp_path: Path):
    """In "mixed", the second process never gets an image. A sharded run goes on from a checkpoint as if it had not
    stopped."""
    options = {
        "dataset_name": getattr(material, data),
        "max_steps": 4,
        "learning_rate": 1e-3,  # Adam's steps have this size, whatever the gradients' noise
        "train_sampling_strategy": "sequential",
        "hidden_steps": 0,
        "hidden_share": 0,
        "init_gate": 0,
    }
    saving = {"save_strategy": "steps", "save_steps": 2} if kind == "fsdp2" else {}
    launch(kind, "sft", material, tmp_path, per_device_train_batch_size=4, **options, **saving)
    run("sft", material, output_dir=tmp_path / "alone", per_device_train_batch_size=8, **options)
    same_curves(tmp_path)
    alone, together = adapter_weights(tmp_path / "alone"), adapter_weights(tmp_path / "out")
    same_tensors(alone, together)
    assert all(tensor.abs() > 1e-3 for key, tensor in alone.items() if key.endswith("pvm_gate.weight")), "it learned"
    if not saving:
        return
    checkpoint = tmp_path / "out" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert size < (material.model / "model.safetensors").stat().st_size, "it holds nothing of the base"
    assert any(difference(tensor, together[key]) > 1e-4 for key, tensor in adapter_weights(checkpoint).items())
    (tmp_path / "resumed").mkdir()
    options |= {**saving, "per_device_train_batch_size": 4, "resume_from_checkpoint": checkpoint}
    launch(kind, "sft", material, tmp_path / "resumed", **options)
    resumed = adapter_weights(tmp_path / "resumed" / "out")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in together.items())


def test_two_processes_hide_the_images_that_one_does(material: SimpleNamespace, tmp_path: Path):
    """In all rows first, and then in half of them. The second process never gets an image; gates have groups."""
    options = {
        "dataset_name": material.mixed,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "hidden_steps": 1,
        "hidden_share": 0.5,
        "faster_gates": 10,
    }
    launch(CHECKPOINTED, "sft", material, tmp_path, per_device_train_batch_size=4, **options)
    run("sft", material, output_dir=tmp_path / "alone", per_device_train_batch_size=8, **options)
    same_curves(tmp_path)
    same_tensors(adapter_weights(tmp_path / "alone"), adapter_weights(tmp_path / "out"))


def test_two_processes_adapt_to_dipe_as_one_does(material: SimpleNamespace, tmp_path: Path):
    options = {"max_steps": 3, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    launch("fsdp2", "dipe", material, tmp_path, per_device_train_batch_size=4, **options)
    run("dipe", material, output_dir=tmp_path / "alone", per_device_train_batch_size=8, **options)
    same_curves(tmp_path)
    same_tensors(*(adapter_weights(tmp_path / name / "lora") for name in ("alone", "out")))
    noted = {name: AdapterFile(tmp_path / name / "lora").companions() for name in ("alone", "out")}
    assert noted["alone"] == noted["out"]
    (of_dipe,) = AdapterFile(tmp_path / "out" / "dipe").companions()
    assert of_dipe.weights is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapters(load_tiny_vlm(), [str(tmp_path / "out" / name) for name in ("dipe", "lora")])


def same_curves(folder: Path) -> None:
    for curve, bound in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4})):  # Adam forgets gradients' size
        one, two = ([entry[curve] for entry in read_log(folder / name) if curve in entry] for name in ("alone", "out"))
        assert one == pytest.approx(two, **bound), curve


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert difference(tensor, two[key]) < 1e-5, key


LEARNS = {
    "base": {},
    "lora": {
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "lora_modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("learns", LEARNS)
def test_a_sharded_stage_2_saves_all_its_parts(
    material: SimpleNamespace, stage_1: Path, learns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As one process does, with samples that do not hang on a process's random numbers."""
    options = {"adapter": stage_1, "max_steps": 2, "learning_rate": 1e-4, **LEARNS[learns]}
    launch("fsdp2", "grpo", material, tmp_path, per_device_train_batch_size=8, **options)
    monkeypatch.setattr(torch, "multinomial", by_rank)
    run("grpo", material, output_dir=tmp_path / "alone", per_device_train_batch_size=16, **options)
    same_curves(tmp_path)
    for part in ("pvm", learns):
        file = "model.safetensors" if part == "base" else "adapter_model.safetensors"
        alone, together = (load_file(tmp_path / name / part / file) for name in ("alone", "out"))
        same_tensors(alone, together)
    before, after = adapter_weights(stage_1), adapter_weights(tmp_path / "out" / "pvm")
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())
    base = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out" / "base" if learns == "base" else material.model
    )
    if learns == "base":
        start = load_tiny_vlm().state_dict()
        moved = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, start[name])}
        assert moved
        assert not [name for name in moved if ".visual." in name]
    else:
        base.load_adapter(tmp_path / "out" / "lora", "lora")
    PeftModel.from_pretrained(base, tmp_path / "out" / "pvm", "pvm")

"""The two training scripts, run for a few steps on the tiny model: they learn, only what shall learn, and go on."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forwards import difference
from peft import PeftModel
from safetensors.torch import load_file
from training_runs import adapter_weights, run, run_killed
from transformers import AutoModelForImageTextToText

from peft_pvm import load_adapters
from peft_pvm.demo.for_trainers import tiny_vlm_processor
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.integrations.trl import GazeCallback
from peft_pvm.probe.layers import propose_layers
from peft_pvm.probe.rows import read_chats


REENTRANT = '{"use_reentrant": true}'


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def changed(model: torch.nn.Module) -> set[str]:
    """The base's parameters that are not the tiny model's."""
    base = dict(load_tiny_vlm().named_parameters())
    found = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    return {name for name, parameter in base.items() if not torch.equal(found[name], parameter)}


def test_sft(material: SimpleNamespace, tmp_path: Path):
    trainer = run("sft", material, output_dir=tmp_path, max_steps=12, per_device_train_batch_size=8)
    losses = logged(trainer, "loss")
    assert len(losses) == 12
    assert losses[-1] < 0.96 * losses[0], losses
    assert changed(trainer.model) == set()
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        name for name, _ in trainer.model.named_parameters() if ".pvm_" in name
    }
    saved = adapter_weights(tmp_path)
    assert all(".pvm.pvm_" in key for key in saved)
    loaded = PeftModel.from_pretrained(load_tiny_vlm(), tmp_path)
    trained = dict(trainer.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name])

    assert len(logged(trainer, "gaze/visual_mass")) == 12
    assert 0 < logged(trainer, "gaze/visual_mass")[0] < 1
    for layer_idx in (1, 3, 4):
        gate = trained[f"base_model.model.model.language_model.layers.{layer_idx}.pvm.pvm_gate.default.weight"].item()
        assert logged(trainer, f"gaze/gate/default/{layer_idx}")[-1] == pytest.approx(gate)
        assert logged(trainer, f"gaze/update/default/{layer_idx}")[-1] > 0


def test_the_last_answer_alone(material: SimpleNamespace, tmp_path: Path):
    """Without generation marks in the template, a chat is a prompt and its last answer."""
    trainer = run("sft", material, output_dir=tmp_path, max_steps=1, assistant_only_loss=False)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist() == [1] * 4
    last = batch["attention_mask"].sum(1) - 1
    assert torch.equal(batch["labels"].amax(1), batch["input_ids"].gather(1, last[:, None])[:, 0])


HOW = {
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(("data", "hows"), [("messages", HOW), ("mixed", ["accumulated", "checkpointed, reentrant"])])
def test_it_does_not_matter_how(material, data: str, hows: Iterable[str], tmp_path: Path):
    """The same losses, gradients and adapter, but for bf16, in which all but the adapter's weights is rounded.

    Not by Adam, which makes as much of gradients that are but rounding as of others.
    """
    common = {
        "dataset_name": getattr(material, data),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "train_sampling_strategy": "sequential",
    }
    plain = run("sft", material, output_dir=tmp_path / "plain", **common)
    for how in hows:
        trainer = run("sft", material, output_dir=tmp_path / how, **{**common, **HOW[how]})
        losses, gradients = logged(trainer, "loss"), logged(trainer, "grad_norm")
        assert losses == pytest.approx(logged(plain, "loss"), rel=0.02 if how == "bf16" else 1e-5), how
        assert gradients == pytest.approx(logged(plain, "grad_norm"), rel=0.05 if how == "bf16" else 1e-4), how
        if how == "bf16":
            assert losses != logged(plain, "loss")
        else:
            expected, found = adapter_weights(tmp_path / "plain"), adapter_weights(tmp_path / how)
            assert all(difference(tensor, found[key]) < 1e-5 for key, tensor in expected.items()), how


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_killed_run_goes_on_to_the_same_weights(material, stage_1: Path, stage: str, tmp_path: Path):
    """To the bit, on one process: a run that was killed after its first checkpoint, and one that was not."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    options |= (
        {"gradient_accumulation_steps": 2}
        if stage == "sft"
        else {"adapter": stage_1, "per_device_train_batch_size": 8}
    )
    killed = run_killed(stage, material, output_dir=tmp_path / "killed", **options)
    assert killed.process.exitcode == -signal.SIGKILL, killed.errors[-3000:]
    checkpoint = tmp_path / "killed" / "checkpoint-2"
    assert checkpoint.is_dir()
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    run(stage, material, output_dir=tmp_path / "killed", resume_from_checkpoint=checkpoint, **options)
    run(stage, material, output_dir=tmp_path / "whole", **options)
    results = [tmp_path / name / ("" if stage == "sft" else "pvm") for name in ("whole", "killed")]
    expected, found = map(adapter_weights, results)
    early = adapter_weights(checkpoint) if stage == "sft" else adapter_weights(stage_1)
    assert expected.keys() == found.keys() == early.keys()
    assert any(not torch.equal(expected[key], early[key]) for key in early), "it learned nothing"
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("learns", ["lora", "base"])
def test_grpo(material: SimpleNamespace, stage_1: Path, learns: str, tmp_path: Path):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]} if learns == "lora" else {}
    trainer = run(
        "grpo", material, adapter=stage_1, output_dir=tmp_path, max_steps=4, per_device_train_batch_size=8, **lora
    )
    assert len(logged(trainer, "rewards/accuracy_reward/mean")) == 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(["pvm", learns])
    before, after = adapter_weights(stage_1), adapter_weights(tmp_path / "pvm")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    moved = changed(trainer.model)
    if learns == "lora":
        assert moved == set()
        assert all(".lora_" in key for key in adapter_weights(tmp_path / "lora"))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*trained together with")
            load_adapters(load_tiny_vlm(), [str(tmp_path / "lora"), str(tmp_path / "pvm")])
        with pytest.warns(UserWarning, match=r"trained together with 'lora' \(LORA\), which does not act"):
            load_adapters(load_tiny_vlm(), [str(tmp_path / "pvm")])
    else:
        assert moved
        assert all(name.startswith(("model.language_model.", "lm_head.")) for name in moved)
        assert not [key for key in load_file(tmp_path / "base" / "model.safetensors") if ".pvm" in key]

    # What was saved is what was trained.
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base" if learns == "base" else material.model)
    if learns == "lora":
        base.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    base.load_adapter(str(tmp_path / "pvm"), adapter_name="pvm")
    base.set_adapter(["lora", "pvm"] if learns == "lora" else ["pvm"])
    (callback,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GazeCallback)]
    inputs = callback.inputs
    with torch.no_grad():
        assert torch.equal(base.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_a_system_prompt_and_a_single_image(material: SimpleNamespace, stage_1: Path, tmp_path: Path):
    """The column `image`, and a text before every prompt."""
    import datasets  # here: not every environment has it, and those skip this file further above

    rows = datasets.load_dataset(str(material.prompts), split="train")
    single = rows.map(lambda row: {"image": row["images"][0]}, remove_columns="images")
    single.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    options = {"dataset_name": tmp_path / "data", "adapter": stage_1, "system_prompt": "Look.", "max_steps": 1}
    trainer = run("grpo", material, output_dir=tmp_path, **options)
    prompt = trainer.train_dataset[0]["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user"]
    (callback,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GazeCallback)]
    assert bytes(callback.inputs["input_ids"][0, :5].tolist()) == b"Look."
    assert "pixel_values" in callback.inputs
    assert logged(trainer, "gaze/visual_mass")[0] > 0


def rows_of(folder: Path):
    from datasets import load_dataset  # here: training_runs skips where it is not installed

    return load_dataset(str(folder), split="train")


def test_layers_are_proposed_and_saved_by_index(material: SimpleNamespace, tmp_path: Path):
    run("sft", material, output_dir=tmp_path, max_steps=1, layers=["auto"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"]
    chats = read_chats(rows_of(material.messages), 8)
    assert saved == propose_layers(load_tiny_vlm(), tiny_vlm_processor(), chats).layers


@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_rows_of_hidden_steps_come_first_and_as_they_are(material: SimpleNamespace, strategy: str, tmp_path: Path):
    options = {"hidden_steps": 3, "max_text": 200, "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = run("sft", material, output_dir=tmp_path, train_sampling_strategy=strategy, **options)
    rows = [row[0]["content"] for row in rows_of(material.messages)["messages"]]
    trained_on = [row[0]["content"] for row in trainer.train_dataset["messages"]]
    first, later = trained_on[:12], trained_on[12:]
    assert len(later) == len(rows) == 8
    assert first == [*first[:8], *first[:4]], "once through the data, and on from its start"
    assert (first[:8] == rows) == (strategy == "sequential")
    assert sorted(first[:8]) == sorted(rows)
    assert sum(len(text) for text in later) > sum(len(text) for text in rows) + 8 * 50
    assert all(text.endswith(row) for text, row in zip(later, first[:8]))
    assert trainer.args.train_sampling_strategy == "sequential"


def test_images_are_hidden_in_the_first_steps_and_then_in_a_share_of_rows(material: SimpleNamespace, tmp_path: Path):
    """With gates of 0 and next to nothing learned, the loss tells whether text sees the image."""
    common = {
        "max_steps": 3,
        "max_text": 0,
        "init_gate": 0.0,
        "learning_rate": 1e-9,
        "train_sampling_strategy": "sequential",
    }
    losses = {}
    for steps, share in ((0, 0.0), (1, 0.0), (1, 1.0)):
        options = {"hidden_steps": steps, "hidden_share": share, "per_device_train_batch_size": 8, **common}
        losses[steps, share] = logged(
            run("sft", material, output_dir=tmp_path / f"{steps}-{share}", **options), "loss"
        )
    in_sight, hidden = losses[0, 0.0][0], losses[1, 1.0][0]
    assert hidden > in_sight + 0.1
    assert losses[0, 0.0] == pytest.approx([in_sight] * 3, rel=1e-4), "the same eight rows"
    assert losses[1, 0.0] == pytest.approx([hidden, in_sight, in_sight], rel=1e-4)
    assert losses[1, 1.0] == pytest.approx([hidden] * 3, rel=1e-4)

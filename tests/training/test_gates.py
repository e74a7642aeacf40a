"""PVM's gates learn faster than the rest, in parameter groups of one's own and in those of a trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forwards import difference
from peft import LoraConfig, get_peft_model
from training_runs import adapter_weights, run
from transformers import Trainer, TrainingArguments

from peft_pvm import PVMConfig
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.training import parameter_groups, speed_up_gates


GATE = "pvm_gate.weight"


@pytest.fixture
def model():
    return get_peft_model(load_tiny_vlm(), PVMConfig(r=32))


def test_parameter_groups(model):
    others, gates = parameter_groups(model, 1e-3, faster=7)
    assert (others["lr"], gates["lr"]) == (1e-3, 7e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(gates["params"]) == 3
    assert all(".pvm_gate." in names[id(parameter)] for parameter in gates["params"])
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, [*others["params"], *gates["params"]])) == sorted(trained)
    assert not any(".pvm_gate." in names[id(parameter)] for parameter in others["params"])


def test_there_is_no_empty_group(model):
    (lora,) = parameter_groups(get_peft_model(load_tiny_vlm(), LoraConfig(target_modules=["q_proj"])), 1e-3)
    assert lora["lr"] == 1e-3
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".pvm_gate." in name)
    (gates,) = parameter_groups(model, 1e-3)
    assert gates["lr"] == pytest.approx(1e-2)


def test_adams_first_step_shows_the_learning_rate(material: SimpleNamespace, tmp_path: Path):
    """By its size, whatever the gradient."""
    options = {"max_steps": 1, "learning_rate": 1e-3, "init_gate": 1.0, "weight_decay": 0.1}
    run("sft", material, output_dir=tmp_path / "faster", faster_gates=10, **options)
    run("sft", material, output_dir=tmp_path / "plain", faster_gates=1, **options)
    faster, plain = adapter_weights(tmp_path / "faster"), adapter_weights(tmp_path / "plain")
    for key, tensor in plain.items():
        if key.endswith(GATE):
            assert abs(tensor.item() - 1) == pytest.approx(1e-3, rel=0.15)  # weight decay is a tenth of it
            assert abs(faster[key].item() - 1) == pytest.approx(1e-2, rel=0.15)
        else:
            assert torch.equal(tensor, faster[key])


def test_a_resumed_training_has_the_groups(material: SimpleNamespace, tmp_path: Path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "faster_gates": 10}
    run("sft", material, output_dir=tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    run("sft", material, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    whole, resumed = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "resumed")
    assert all(difference(tensor, resumed[key]) == 0 for key, tensor in whole.items())


def test_a_given_optimizer_keeps_its_groups(model, tmp_path: Path):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True), optimizers=(optimizer, None))
    speed_up_gates(trainer, 10)
    assert trainer.create_optimizer() is optimizer
    assert len(optimizer.param_groups) == 1


def test_a_second_call_does_not_split_again(model, tmp_path: Path):
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, learning_rate=1e-3))
    speed_up_gates(trainer, 10)
    rates = [(group["lr"], group["weight_decay"]) for group in trainer.create_optimizer().param_groups]
    assert [(group["lr"], group["weight_decay"]) for group in trainer.create_optimizer().param_groups] == rates
    assert sum(rate == pytest.approx(1e-2) for rate, _ in rates) == 1


@pytest.mark.parametrize("faster", [0, -1.0])
def test_it_must_be_positive(model, faster: float, tmp_path: Path):
    with pytest.raises(ValueError, match="must be positive"):
        speed_up_gates(Trainer(model, TrainingArguments(tmp_path, use_cpu=True)), faster)

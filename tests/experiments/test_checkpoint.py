"""A training goes on after an interruption as if there had been none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model

from experiments.checkpoint import CheckpointFile
from peft_pvm import PVMConfig
from peft_pvm.demo import train
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe, train_adapter


SHORT = Recipe(steps=3, hidden_steps=0, max_distractor_length=96)


def with_pvm(seed: int = 0, r: int = 64) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(load_tiny_vlm(), PVMConfig(r=r))


def trained(model: PeftModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def checkpoint_of(file: Path, recipe: Recipe) -> CheckpointFile:
    return CheckpointFile(file, {"recipe": dataclasses.asdict(recipe)})


def interrupt(model: PeftModel, recipe: Recipe, checkpoint: CheckpointFile, after: int) -> None:
    """Train until something goes wrong in the step with this number."""
    draw = train.draw_step

    def failing(step: int, *rest, **options):
        if step == after:
            raise KeyboardInterrupt
        return draw(step, *rest, **options)

    with mock.patch.object(train, "draw_step", failing), pytest.raises(KeyboardInterrupt):
        train_adapter(model, recipe, checkpoint)


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    recipe, file = dataclasses.replace(SHORT, steps=4, hidden_steps=3), tmp_path / "checkpoint.safetensors"
    whole = with_pvm()
    train_adapter(whole, recipe)

    interrupt(with_pvm(), recipe, checkpoint_of(file, recipe), after=5)
    steps = []
    draw = train.draw_step

    def counting(step: int, *rest, **options):
        steps.append(step)
        return draw(step, *rest, **options)

    resumed = with_pvm(seed=1)  # other initial weights: all that counts comes from the file
    with mock.patch.object(train, "draw_step", counting):
        train_adapter(resumed, recipe, checkpoint_of(file, recipe))
    assert steps == [4, 5, 6]
    assert torch.equal(trained(resumed), trained(whole))


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 1)
    file = tmp_path / "checkpoint.safetensors"
    interrupt(with_pvm(), SHORT, checkpoint_of(file, SHORT), after=2)
    for model, recipe in (
        (with_pvm(), dataclasses.replace(SHORT, seed=1)),
        (with_pvm(r=32), SHORT),
    ):
        before = trained(model)
        with pytest.raises(ValueError, match="another training"):
            train_adapter(model, recipe, checkpoint_of(file, recipe))
        assert torch.equal(trained(model), before)

"""The lab's recipe, put together from the parts for transformers' `Trainer`, trains what the lab's trainer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forwards import difference
from peft import PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from peft_pvm import PVMConfig
from peft_pvm.demo import train
from peft_pvm.demo.mosaic import Batch
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.training import HiddenImage, parameter_groups


pytest.importorskip("sklearn", reason="the lab's task needs the extra lab")

RECIPE = train.Recipe(steps=3, hidden_steps=5, max_distractor_length=32)
STEPS = RECIPE.steps + RECIPE.hidden_steps


class OnBatches(Trainer):
    """A trainer whose rows are whole batches of the lab."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        batch = Batch(inputs["inputs"], inputs["targets"])
        logits = train.target_logits(model, batch).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch.targets.flatten())


def fresh() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(load_tiny_vlm(), PVMConfig(r=32, layers_to_transform=[1, 3, 4]))


def by_trainer(batches: list[Batch], folder: Path, *callbacks: HiddenImage) -> dict[str, torch.Tensor]:
    model = fresh()
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE.learning_rate), betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: train.learning_rate_factor(step, STEPS))
    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    rows = [{"inputs": batch.inputs, "targets": batch.targets} for batch in batches]
    OnBatches(
        model,
        args,
        train_dataset=rows,
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, schedule),
        callbacks=list(callbacks),
    ).train()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_trainers_parts_train_what_the_lab_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    batches: list[Batch] = []
    fit = train.fit

    def recording(model: Any, groups: Any, draw: Any, *rest: Any) -> None:
        def drawn(step: int) -> Batch:
            batches.append(draw(step))
            return batches[-1]

        fit(model, groups, drawn, *rest)

    monkeypatch.setattr(train, "fit", recording)
    model = fresh()
    train.train_adapter(model, RECIPE)
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(batches) == STEPS
    found = by_trainer(batches, tmp_path, HiddenImage(RECIPE.hidden_steps))
    assert found.keys() == expected.keys()
    assert all(difference(found[name], parameter) < 1e-5 for name, parameter in expected.items())
    in_sight = by_trainer(batches, tmp_path)
    assert max(difference(in_sight[name], parameter) for name, parameter in expected.items()) > 1e-3

"""Images hidden by a callback: which rows, in which steps, resumed, and after an error."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from forwards import difference
from hidden_images import leftovers, trained_on, with_other_pixels
from peft import LoraConfig, get_peft_model
from tiny_vlms import FAMILIES
from training_runs import adapter_weights, run
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from peft_pvm import PVMConfig
from peft_pvm.tokens.context import VisualContext
from peft_pvm.training import HiddenImage


Rows = dict[int, list[bool]]  # of the global batch, by step
Recorded = Callable[..., Rows]


def test_which_rows():
    """In the first steps all, and afterwards about so many, whatever batch they come in."""
    callback = HiddenImage(steps=2, share=0.25, seed=3)
    assert all(callback.rows(step, 5, 7).tolist() == [True] * 7 for step in (0, 1))
    for step in (2, 3, 10_000):
        whole = callback.rows(step, 0, 64)
        for size in (1, 4, 16):
            pieces = [callback.rows(step, first, size) for first in range(0, 64, size)]
            assert torch.equal(torch.cat(pieces), whole)
    drawn = torch.stack([callback.rows(step, 0, 64) for step in range(2, 102)]).float()
    assert drawn.mean().item() == pytest.approx(0.25, abs=0.02)
    assert drawn.mean(0).min() > 0.1, "each place in the batch"
    assert len({tuple(row) for row in drawn.tolist()}) == 100, "each step draws anew"
    other = HiddenImage(steps=2, share=0.25, seed=4)
    assert not torch.equal(torch.stack([other.rows(step, 0, 64) for step in range(2, 102)]).float(), drawn)
    assert HiddenImage(share=1.0).rows(0, 0, 8).all()
    assert not HiddenImage(steps=1).rows(1, 0, 8).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1), ("steps", 0.5), ("steps", True), ("share", -0.1), ("share", 1.1), ("share", "all"), ("seed", -1)],
)
def test_numbers_out_of_range(name: str, value: object):
    with pytest.raises(ValueError, match=rf"HiddenImage\.{name} is {value!r}, but must be"):
        HiddenImage(**{name: value})


def test_processes_and_microsteps_go_through_one_batch(tmp_path: Path):
    """As accelerate hands out batches: one for each process, and then the next ones."""
    model, asked = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32)).train(), []

    class Recording(HiddenImage):
        def rows(self, step: int, first: int, number: int) -> torch.Tensor:
            asked.append((step, first, number))
            return super().rows(step, first, number)

    callback, state, control = Recording(share=0.5), TrainerState(global_step=7, train_batch_size=4), TrainerControl()
    inputs = FAMILIES["llava"].inputs(model.get_base_model(), "t4 i t6", "t5 i t5", "t6 i t4", "t7 i t3")
    for rank in range(2):
        args = SimpleNamespace(world_size=2, process_index=rank, train_batch_size=64)
        callback.on_step_begin(args, state, control, model=model)
        for _ in range(2):
            trained_on(model, inputs)
            trained_on(model, inputs)  # a trainer may need several forwards
            callback.on_substep_end(args, state, control)
        callback.on_step_end(args, state, control)
    assert asked == [(7, first, 4) for first in (0, 0, 8, 8, 4, 4, 12, 12)]


@pytest.fixture
def with_callback(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Gives every trainer a callback, and records which rows it chose in the forwards of training."""

    def give(**fields: Any) -> Rows:
        recorded: Rows = {}

        class Recording(HiddenImage):
            def rows(self, step: int, first: int, number: int) -> torch.Tensor:
                rows = super().rows(step, first, number)
                assert first == len(recorded.setdefault(step, [])), "one process goes through the batch in order"
                recorded[step] += rows.tolist()
                return rows

        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, Recording(**fields)]
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
        return recorded

    return give


COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    **{"hidden_steps": 0, "hidden_share": 0, "init_gate": 0},  # of the script itself
}


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """As long as a method of contexts was called often. It must not keep a context."""
    method, calls = getattr(VisualContext, name), []

    def counting(context: VisualContext) -> None:
        calls.append(None)
        method(context)

    monkeypatch.setattr(VisualContext, name, counting)
    return calls


def test_the_same_rows_in_any_batch(
    material: SimpleNamespace, with_callback: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plain = run("sft", material, output_dir=tmp_path / "plain", **COMMON)
    hows = {
        "whole": {},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "checkpointed": {"gradient_checkpointing": True},
    }
    recorded = {}
    for how, options in hows.items():
        with monkeypatch.context() as patch:
            patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", list(transformers.trainer.DEFAULT_CALLBACKS))
            recorded[how] = with_callback(steps=1, share=0.5)
            of_text_alone = counted(patch, "leave_out_images")
            trainer = run("sft", material, output_dir=tmp_path / how, **{**COMMON, **options})
            assert leftovers(trainer.model) == []
            size = options.get("per_device_train_batch_size", 8)
            parts = [rows[i : i + size] for rows in recorded[how].values() for i in range(0, 8, size)]
            assert len(of_text_alone) == sum(map(all, parts)), "where all images are hidden"
    assert recorded["accumulated"] == recorded["checkpointed"] == recorded["whole"]
    assert recorded["whole"][0] == [True] * 8
    assert [0 < sum(recorded["whole"][step]) < 8 for step in (1, 2)] == [True] * 2
    whole = adapter_weights(tmp_path / "whole")
    for how in ("accumulated", "checkpointed"):
        found = adapter_weights(tmp_path / how)
        assert all(difference(tensor, found[key]) < 1e-5 for key, tensor in whole.items()), how
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, trainer)]
    assert all(hidden > shown + 0.1 for shown, hidden in zip(*losses)), "the answers are not to be seen"
    gaze = [[e["gaze/visual_mass"] for e in t.state.log_history if "gaze/visual_mass" in e] for t in (plain, trainer)]
    assert gaze[0] == pytest.approx(gaze[1], rel=0.1), "and what is logged is"


def test_a_resumed_training_goes_on_with_the_same_rows(
    material: SimpleNamespace, with_callback: Recorded, tmp_path: Path
):
    options = {**COMMON, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = with_callback(steps=1, share=0.5, seed=1)
    run("sft", material, output_dir=tmp_path / "whole", **options)
    expected, checkpoint = dict(whole), tmp_path / "whole" / "checkpoint-2"
    whole.clear()
    run("sft", material, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    assert whole == {step: expected[step] for step in (2, 3)}
    resumed = adapter_weights(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in adapter_weights(tmp_path / "whole").items())


def test_grpo_generates_with_the_image_in_sight(
    material: SimpleNamespace, stage_1: Path, with_callback: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    forwards: list[tuple[bool, bool]] = []
    note = VisualContext.note_positions

    def noting(context: VisualContext, position_ids: torch.Tensor) -> None:
        forwards.append((torch.is_grad_enabled(), context.hidden_rows is not None))
        note(context, position_ids)

    monkeypatch.setattr(VisualContext, "note_positions", noting)
    recorded = with_callback(steps=1)
    run("grpo", material, adapter=stage_1, output_dir=tmp_path, max_steps=2, per_device_train_batch_size=8)
    assert set(forwards) == {(False, False), (True, True), (True, False)}
    assert forwards.count((True, True)) == 1
    assert recorded == {0: [True] * 8}


# ---- with a trainer of transformers' own


def trainer_of(model: torch.nn.Module, tmp_path: Path, *callbacks: HiddenImage, **options: Any) -> Trainer:
    """On rows of one family, one image in each."""
    family = FAMILIES["llava"]
    base = model.get_base_model()
    rows = [family.inputs(base, f"t{length} i t{12 - length}") for length in range(2, 10)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    fixed = dict(per_device_train_batch_size=4, report_to="none", use_cpu=True, save_strategy="no", max_steps=3)
    args = TrainingArguments(tmp_path, remove_unused_columns=False, **{**fixed, **options})
    return Trainer(model, args, data_collator=collate, train_dataset=data, callbacks=list(callbacks))


def hides(model: torch.nn.Module) -> bool:
    """Whether a training forward of one's own hides the image; PVM's gate is at 0."""
    inputs = FAMILIES["llava"].inputs(model.get_base_model(), "t4 i t6")
    model.train()
    return torch.equal(*(trained_on(model, each)[:, -6:] for each in (inputs, with_other_pixels(inputs))))


@pytest.mark.parametrize(
    ("kind", "place", "options"),
    [
        (RuntimeError, "forward", {"gradient_accumulation_steps": 2}),
        (RuntimeError, "backward", {"gradient_accumulation_steps": 2}),
        (RuntimeError, "backward", {}),
        (RuntimeError, "before the forward", {}),
        (KeyboardInterrupt, "forward", {}),
    ],
)
def test_after_an_error_images_are_seen(
    kind: type[BaseException], place: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Of an error, trainers do not tell their callbacks; the next loop on the model may be one's own."""
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    trainer = trainer_of(model, tmp_path, HiddenImage(steps=3), learning_rate=0.0, **options)
    original, calls = trainer.training_step, 0

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert hides(model)
        if calls == 3:
            if place == "before the forward":
                raise kind
            if place == "forward":
                model.get_base_model().lm_head.register_forward_pre_hook(raising)
            else:
                monkeypatch.setattr(trainer.accelerator, "backward", raising)
        return original(*args, **kwargs)

    def raising(*args: Any, **kwargs: Any) -> None:
        model.get_base_model().lm_head._forward_pre_hooks.clear()
        monkeypatch.undo()
        raise kind

    trainer.training_step = failing
    with pytest.raises(kind):
        trainer.train()
    assert calls == 3
    assert not hides(model)
    other = trainer_of(model, tmp_path, learning_rate=0.0)
    seen: list[bool] = []
    other.training_step = lambda *args, **kwargs: seen.append(hides(model)) or torch.zeros(())
    other.train()
    assert seen == [False] * 3
    trainer.training_step = original
    trainer.train()
    assert leftovers(model) == []


def test_a_dropped_trainer_leaves_nothing(tmp_path: Path):
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    trainer = trainer_of(model, tmp_path, HiddenImage(steps=3))
    trainer.training_step = None
    with contextlib.suppress(TypeError):
        trainer.train()
    assert leftovers(model) != []
    del trainer
    gc.collect()
    assert leftovers(model) == []


def test_a_model_that_could_not_learn_is_refused_before_its_first_step(tmp_path: Path):
    model = get_peft_model(FAMILIES["llava"].build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="No PVM adapter is active"):
        trainer_of(model, tmp_path, HiddenImage(share=0.5)).train()
    trainer_of(model, tmp_path, HiddenImage()).train()


def test_a_loop_of_ones_own_can_call_it(tmp_path: Path):
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    callback, state, control = HiddenImage(steps=1), TrainerState(), TrainerControl()
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    callback.on_train_begin(args, state, control, model=model)
    for step in range(2):
        callback.on_step_begin(args, state, control, model=model)
        assert hides(model) == (step == 0)
        callback.on_step_end(args, state, control, model=model)
        assert not hides(model)
        state.global_step += 1
    callback.on_train_end(args, state, control, model=model)
    assert leftovers(model) == []

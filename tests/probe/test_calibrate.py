"""The limit of DIPE's distance that a model's own answers speak for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_under_test import METHODS
from tiny_vlms import FAMILIES, TinyVLM
from torch.nn.functional import log_softmax

from peft_pvm import DIPEConfig, attached
from peft_pvm.demo.for_trainers import make_chats, tiny_vlm_processor
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.probe import calibrate as module
from peft_pvm.probe.calibrate import NEGLIGIBLE, Answers, Calibration, calibrate, calibrated, measure
from peft_pvm.probe.rows import Chat, Lesson, read_chats
from peft_pvm.tokens.families import find_vlm


LENGTHS = (0, 1000)


def answered(**losses: list[float]) -> Calibration:
    """What is proposed where rows have these losses, after a text of 1,000 tokens; without text all have 0."""
    limits = {None if name == "base" else int(name.removeprefix("at_")): values for name, values in losses.items()}
    return calibrated(
        {
            limit: {
                length: Answers([loss * (length > 0) for loss in values], [False] * len(values)) for length in LENGTHS
            }
            for limit, values in limits.items()
        }
    )


@pytest.mark.parametrize(
    ("losses", "limit"),
    [
        (dict(base=[4, 5, 6], at_512=[2, 2, 2], at_128=[1, 1, 1], at_0=[2, 2, 2]), 128),
        # a tie by a constant that does not matter, and the largest of three
        (dict(base=[4, 5, 6], at_512=[2, 2, 2], at_128=[1, 1, 1], at_64=[1, 1, 1], at_0=[0.99, 0.99, 0.99]), 128),
        # a tie by the standard error of the differences: 0.5 and 0.87
        (dict(base=[4, 5, 6], at_128=[1, 4, 1], at_0=[1, 1, 1]), 128),
        # rows differ by more than the limits do, but always in one direction
        (dict(base=[4, 5, 60], at_128=[1.2, 2.2, 50.2], at_0=[1, 2, 50]), 0),
        # the base ties: off
        (dict(base=[1, 1, 1], at_128=[1, 1, 1], at_0=[3, 3, 3]), None),
        (dict(base=[1, 1, 1.02], at_128=[1, 1, 1], at_0=[3, 3, 3]), None),
        (dict(base=[1, 1, 1], at_128=[2, 2, 2], at_0=[3, 3, 3]), None),
    ],
)
def test_the_largest_limit_that_does_as_well_as_the_best(losses: dict[str, list[float]], limit: int | None):
    found = answered(**losses)
    assert found.max_distance == limit
    assert found.loss(None) == pytest.approx(sum(losses["base"]) / 6)
    assert [entry["length"] for entry in found.to_dict()["answers"]] == list(LENGTHS) * len(losses)


def test_the_reason_is_said():
    assert answered(base=[4, 4], at_64=[1, 1]).reason.startswith(
        "max_distance=64 lowers the loss of an answer by 1.500 nats, mean over the lengths."
    )
    keeps = answered(base=[NEGLIGIBLE] * 2, at_64=[0, 0]).reason
    assert keeps.startswith("Leave DIPE off: the model does not lose the image")
    assert "0.010 after 1,000" in keeps
    assert "answers worse after more text" in answered(base=[4, 4], at_64=[4, 4]).reason


def test_what_is_measured_is_the_loss_of_the_answer(tiny: TinyVLM):
    """Computed once more from whole outputs, and under DIPE attached by hand; far limits are the base, to the bit."""
    model = tiny.build()
    lessons = {0: Lesson(tiny.prompt(model, "t4 i t9"), 3), 40: Lesson(tiny.prompt(model, "t4 i t49"), 2)}
    found = measure(model, [lessons, lessons], 2, (0, 16, 1000))
    assert list(found) == [None, 1000, 16, 0]
    assert found[1000] == found[None]
    for limit in (None, 0, 16):
        for length, lesson in lessons.items():
            with attached(model, *([] if limit is None else [DIPEConfig(max_distance=limit)])):
                logits = model(**lesson.inputs).logits[0].double()
            ids = lesson.inputs["input_ids"][0]
            places = range(len(ids) - lesson.num_answer_tokens, len(ids))
            losses = [-log_softmax(logits[place - 1], -1)[ids[place]].item() for place in places]
            right = all(int(logits[place - 1].argmax()) == ids[place] for place in places)
            answers = found[limit][length]
            assert answers.losses == pytest.approx([sum(losses) / len(losses)] * 2, rel=1e-4)
            assert answers.right == [right] * 2
    assert found[0][40].losses != found[None][40].losses


def test_an_answer_is_right_if_each_of_its_tokens_is():
    tiny = FAMILIES["llava"]
    model = tiny.build()
    inputs = tiny.prompt(model, "t4 i t4")
    told = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    whole = {**inputs, "input_ids": told, "attention_mask": torch.ones_like(told)}
    wrong = told.clone()
    wrong[0, -2] += 1
    rows = [{0: Lesson(whole, 3)}, {0: Lesson({**whole, "input_ids": wrong}, 3)}]
    assert measure(model, rows, 2, ())[None][0].right == [True, False]


def test_every_family_can_be_measured(family: TinyVLM):
    model = family.build()
    model.train()
    rows = [{0: Lesson(family.prompt(model, "t4 i t9"), 3)}]
    found = measure(model, rows, 1, (0, 500))
    assert all(0 < found[limit][0].loss < 50 for limit in (None, 500, 0))
    assert found[0][0].losses != found[None][0].losses
    assert model.training
    assert not hasattr(model, "peft_config")


def test_a_model_in_the_middle_of_training_is_asked_as_it_would_answer():
    tiny = FAMILIES["qwen3_vl"]
    model = tiny.build()
    rows = [{0: Lesson(tiny.prompt(model, "t4 i t9"), 3)}]
    expected = measure(model, rows, 1, (0,))
    model.train()
    for attention in find_vlm(model).self_attentions.values():
        attention.attention_dropout = 0.5
    model.model.rope_deltas = deltas = torch.tensor([[7]])  # of somebody's conversation
    assert measure(model, rows, 1, (0,)) == expected
    assert model.model.rope_deltas is deltas


def test_the_models_own_adapters_go_on_acting():
    tiny = FAMILIES["llava"]
    model = METHODS["pvm"].attach(tiny.build())
    rows = [{0: Lesson(tiny.prompt(tiny.build(), "t4 i t9"), 3)}]
    with_adapter = measure(model, rows, 1, (0,))
    without = measure(tiny.build(), rows, 1, (0,))
    assert all(with_adapter[limit][0].losses != without[limit][0].losses for limit in (None, 0))
    assert list(model.peft_config) == ["default"]


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    pytest.importorskip("datasets", reason="chats are a data set")
    pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")
    return read_chats(make_chats("messages", 8, 0, "test", seed=1), 8)


def test_the_tiny_model_is_to_keep_its_image_near(chats: list[Chat]):
    """It forgets its image within some hundred bytes, and reads it best from 8 to 32 bytes away."""
    found = calibrate(load_tiny_vlm(), tiny_vlm_processor(), chats, (0, 256, 1024), (0, 16, 64))
    assert found.max_distance == 16
    base, near = found.answers[None], found.answers[16]
    assert [base[length].accuracy > 0.9 for length in (0, 256, 1024)] == [True, False, False]
    assert all(near[length].accuracy > 0.85 for length in (0, 256, 1024))
    assert base[0].losses == near[0].losses or max(base[0].losses) < 0.01


def test_where_the_image_is_not_lost_it_is_left_alone(chats: list[Chat]):
    found = calibrate(load_tiny_vlm(), tiny_vlm_processor(), chats[:4], (0, 16), (0, 8))
    assert found.max_distance is None
    assert "does not lose the image" in found.reason


def test_text_stands_between_image_and_question(chats: list[Chat], monkeypatch: pytest.MonkeyPatch):
    processor = tiny_vlm_processor()
    taken: list[dict[int, Lesson]] = []

    def keep(model: Any, rows: Any, *args: Any) -> dict[int | None, dict[int, Answers]]:
        taken.extend(rows)
        return {None: {0: Answers([0.0] * 2, [True] * 2)}}

    monkeypatch.setattr(module, "measure", keep)
    calibrate(load_tiny_vlm(), processor, chats[:2], (0, 64, 200))
    calibrate(load_tiny_vlm(), processor, chats[:2], (200,))
    calibrate(load_tiny_vlm(), processor, chats[:2], (200,), seed=1)
    texts = []
    for row in taken:
        whole = {length: processor.tokenizer.decode(lesson.inputs["input_ids"][0]) for length, lesson in row.items()}
        for length in filter(None, row):
            head, tail = whole[length].split("<|vision_end|>")
            text, _, question = tail.partition("\n\n[cell")
            assert len(processor.tokenizer(text)["input_ids"]) == length
            assert whole.get(0, f"{head}<|vision_end|>[cell{question}") == f"{head}<|vision_end|>[cell{question}"
            texts.append(text)
    assert texts[1].startswith(texts[0][:60])
    assert texts[1] != texts[3], "rows have texts of their own"
    assert texts[4:6] == texts[1:4:2], "the same text for the same seed"
    assert texts[6] != texts[4]


def test_the_answer_does_not_stand_in_the_text(chats: list[Chat], monkeypatch: pytest.MonkeyPatch):
    drawn: list[list[str]] = []
    draw = module.Distractors.draw

    def noted(self: Any, document: str, answers: list[str]) -> str:
        drawn.append(answers)
        return draw(self, document, answers)

    monkeypatch.setattr(module.Distractors, "draw", noted)
    calibrate(load_tiny_vlm(), tiny_vlm_processor(), chats[:2], (16,), (0,))
    assert drawn == [[chat.answer] for chat in chats[:2]]


def test_lengths_that_the_model_has_no_positions_for(chats: list[Chat]):
    model = load_tiny_vlm()
    model.config.text_config.max_position_embeddings = 300
    with pytest.raises(ValueError, match=r"Texts of \[300\] tokens are too long: the model has 300 positions"):
        calibrate(model, tiny_vlm_processor(), chats[:2], (0, 300), (0,))
    assert list(calibrate(model, tiny_vlm_processor(), chats[:2], None, (0,)).answers[None]) == [0, 256]


def test_one_row_has_no_standard_error(chats: list[Chat]):
    with pytest.raises(ValueError, match="takes at least 2 rows"):
        calibrate(load_tiny_vlm(), tiny_vlm_processor(), chats[:1])

"""Testing: answers counted as they should be, the same questions for all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from language_models import tiny_language_model
from transformers.modeling_outputs import CausalLMOutput

from experiments.real.evaluation import EvalPlan, Place, Run, evaluate
from experiments.real.vlm import new_vlm, save_vlm
from peft_pvm import DIPEConfig, VAFConfig, attached
from peft_pvm.demo import mosaic
from peft_pvm.demo.mosaic import make_questions, make_transcriptions
from peft_pvm.demo.questions import Questions
from peft_pvm.demo.recall import Accuracy, load_models, look_up, recall, transcription
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import target_logits


class Answering(torch.nn.Module):
    """Answers every question with the digit 3."""

    def forward(self, input_ids, logits_to_keep, **kwargs):
        logits = torch.zeros(len(input_ids), len(logits_to_keep), mosaic.VOCAB_SIZE)
        logits[..., mosaic.FIRST_ANSWER + 3] = 1
        return CausalLMOutput(logits=logits)


def test_accuracy_of_rows():
    accuracy = Accuracy((9, 0, 9, 9), asked=9)
    assert accuracy.value == 0.75
    assert accuracy.standard_error == pytest.approx(0.25)  # deviation 0.5 over four rows
    assert math.isnan(Accuracy((9,), asked=9).standard_error)


@pytest.mark.parametrize("images", [1, 2])
def test_right_answers_are_counted_row_by_row(images):
    accuracy = recall(Answering(), 10, rows=70, images=images, seed=3)  # more rows than fit one forward
    generator = torch.Generator().manual_seed(3)
    expected = []
    for rows in (64, 6):
        targets = make_questions("test", rows, 10, 9, generator, images).targets
        expected += (targets == mosaic.FIRST_ANSWER + 3).sum(1).tolist()
    assert accuracy.right == tuple(expected)
    assert 0 < accuracy.value < 0.3


def test_the_same_questions_again():
    model = load_tiny_vlm()
    assert recall(model, 100, 4, seed=5) == recall(model, 100, 4, seed=5)
    assert recall(model, 100, 4, seed=5) != recall(model, 100, 4, seed=6)


class Writing:
    """Writes a transcription down, but for the tokens that are given."""

    def __init__(self, wrong: dict[tuple[int, int], int]):
        self.wrong = wrong

    def generate(self, input_ids, max_new_tokens, **kwargs):
        assert input_ids.shape[1] == mosaic.IMAGE_LENGTH + 1
        batch = make_transcriptions(
            "test", len(input_ids), 0, max_new_tokens // 2 + 1, torch.Generator().manual_seed(0)
        )
        assert torch.equal(batch.inputs["input_ids"][:, : input_ids.shape[1]], input_ids)
        written = batch.targets[:, :max_new_tokens].clone()
        for place, token in self.wrong.items():
            written[place] = token
        return torch.cat([input_ids, written], 1)


def test_a_written_cell_counts_if_the_digit_is_that_of_its_query():
    assert [round_.right for round_ in transcription(Writing({}), 27, rows=2)] == [(9, 9)] * 3
    batch = make_transcriptions("test", 2, 0, 27, torch.Generator().manual_seed(0))
    query, digit = batch.targets[0, [1, 2]].tolist()  # of the second cell
    other = next(mosaic.FIRST_ANSWER + number for number in range(10) if mosaic.FIRST_ANSWER + number != digit)
    wrong = {
        (0, 0): 0,  # no digit
        (1, 2 * 9): 0,
        (0, 2 * 10 - 1): query,  # the second cell once more, out of turn ...
        (0, 2 * 10): digit,  # ... and right
        (0, 2 * 20 - 1): query,
        (0, 2 * 20): other,  # the second cell, wrong
        (1, 2 * 21 - 1): mosaic.FIRST_QUERY + 9,  # a query of a coloured mosaic
    }
    assert [round_.right for round_ in transcription(Writing(wrong), 27, rows=2)] == [(8, 9), (9, 8), (8, 8)]


def test_a_token_too_many_costs_no_more_than_its_place():
    class Stuttering(Writing):
        def generate(self, input_ids, max_new_tokens, **kwargs):
            written = super().generate(input_ids, max_new_tokens, **kwargs)
            start = input_ids.shape[1]
            return torch.cat([written[:, : start + 1], written[:, start:-1]], 1)  # the first digit twice

    assert [round_.right for round_ in transcription(Stuttering({}), 27, rows=2)] == [(9, 9), (9, 9), (9, 9)]


def test_a_model_writes_what_it_would_say_token_by_token():
    model = load_tiny_vlm()
    batch = make_transcriptions("test", 3, 0, 9, torch.Generator().manual_seed(0))
    (round_,) = transcription(model, 9, rows=3)
    inputs = {name: value for name, value in batch.inputs.items() if name != "logits_to_keep"}
    inputs["input_ids"] = inputs["input_ids"][:, : mosaic.IMAGE_LENGTH + 1]
    for _ in range(18):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == mosaic.IMAGE).int()
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, -1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], 1)
    dialogue = torch.cat([batch.inputs["input_ids"][:, mosaic.IMAGE_LENGTH :], batch.targets[:, -1:]], 1).tolist()
    for row, written in enumerate(inputs["input_ids"][:, mosaic.IMAGE_LENGTH :].tolist()):
        digit_of = dict(zip(dialogue[row][::2], dialogue[row][1::2]))
        right = [digit_of.get(query) == digit for query, digit in itertools.pairwise(written)]
        assert round_.right[row] == sum(right)


@pytest.mark.parametrize("written_cells", [0, 10])
def test_whole_rounds_are_written(written_cells):
    with pytest.raises(ValueError, match=f"written_cells is {written_cells}"):
        transcription(load_tiny_vlm(), written_cells)


def test_at_least_one_row():
    with pytest.raises(ValueError, match="rows is 0"):
        recall(load_tiny_vlm(), 0, rows=0)


@torch.no_grad()
def test_several_adapters_act_together(tmp_path):
    """What `a+b` stands for, beside each alone."""
    DIPEConfig(max_distance=0).save_pretrained(tmp_path / "dipe")
    VAFConfig().save_pretrained(tmp_path / "vaf")
    together = f"{tmp_path / 'dipe'}+{tmp_path / 'vaf'}"
    models = load_models([tmp_path / "dipe", together])
    assert list(models) == ["base", str(tmp_path / "dipe"), together]
    batch = make_questions("test", 2, 300, 9, torch.Generator().manual_seed(0))
    base, dipe, both = (target_logits(model, batch) for model in models.values())
    with attached(models["base"], DIPEConfig(max_distance=0)):
        assert torch.equal(target_logits(models["base"], batch), dipe)
    with attached(models["base"], DIPEConfig(max_distance=0), VAFConfig()):
        assert torch.equal(target_logits(models["base"], batch), both)
    assert not torch.equal(base, dipe)
    assert not torch.equal(dipe, both)


def test_a_base_that_speaks_is_asked_in_words(tmp_path, monkeypatch):
    """The same questions as `python -m experiments real-eval` asks. Here all are answered with 3."""
    language_model = tiny_language_model()
    save_vlm(new_vlm(language_model), language_model, tmp_path / "base")
    (model,) = load_models([], tmp_path / "base").values()
    questions = Questions.of(tmp_path / "base")

    def three(model, batch):
        return torch.nn.functional.one_hot(torch.full_like(batch.targets, questions.digits[3]), 400).float()

    for module in ("peft_pvm.demo.recall", "experiments.real.evaluation"):
        monkeypatch.setattr(f"{module}.target_logits", three)
    asked = look_up(model, questions, 20, rows=8)
    tested = evaluate(Place(tmp_path / "base"), [Run("base")], [], EvalPlan(lengths=(20,), rows=8), tmp_path)
    assert list(asked.right) == tested["base"].right[20]
    assert len(set(asked.right)) > 1

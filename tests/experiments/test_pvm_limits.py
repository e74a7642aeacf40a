"""What is kept of the questions is what the model was given and where it looked."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from experiments.fading import retrieved_mass
from experiments.pvm_limits import ask, probe_accuracy
from peft_pvm import PVMConfig
from peft_pvm.demo.mosaic import FIRST_QUERY, make_questions
from peft_pvm.demo.recall import recall
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.tokens.families import find_vlm


LENGTH = 700  # long enough for many wrong answers, and for several forwards


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return get_peft_model(load_tiny_vlm(), PVMConfig(r=64, init_weights=False)).eval()


@pytest.fixture(scope="module")
def asked(model):
    return ask(model, "test", LENGTH, rows=8, seed=3)


def test_answers_are_those_of_recall(model, asked):
    right = recall(model, LENGTH, rows=8, split="test", seed=3).right
    assert asked.is_right.view(8, 9).sum(1).tolist() == list(right)
    assert 0 < sum(right) < 72


def test_each_question_has_its_cell_digit_and_embedding(model, asked):
    generator = torch.Generator().manual_seed(3)
    at_once = 5  # as many rows as fit into a forward
    batch = make_questions("test", at_once, LENGTH, 9, generator)
    cells = batch.inputs["input_ids"][:, -17::2] - FIRST_QUERY
    assert torch.equal(asked.cells[: 9 * at_once], cells.flatten())
    assert torch.equal(asked.digits[: 9 * at_once], batch.targets.flatten())
    visual = model.get_base_model().model.visual
    with torch.no_grad():
        embeddings = visual(batch.inputs["pixel_values"], grid_thw=batch.inputs["image_grid_thw"]).pooler_output
    by_cell = embeddings.view(at_once, 9, -1)
    for row in range(at_once):
        torch.testing.assert_close(asked.embeddings[9 * row : 9 * row + 9], by_cell[row, cells[row]])


def test_streams_are_what_the_ffn_norm_is_given(model):
    seen = []
    norm = find_vlm(model.get_base_model()).layers[3].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -17::2]))
    streams = ask(model, "train", 20, rows=2).streams
    handle.remove()
    assert list(streams) == [1, 3, 4]
    torch.testing.assert_close(streams[3], seen[0].flatten(0, 1), atol=0, rtol=0)


def test_shares_are_the_retrieved_mass(model):
    shares = ask(model, "test", 30, rows=1).shares
    expected = retrieved_mass(model, 30, rows=1)
    for layer_idx, share in shares.items():
        assert share.mean().item() == pytest.approx(expected[layer_idx], abs=1e-6)


def test_a_linear_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=generator)
    noise = torch.randn(400, 8, generator=generator)
    signal = noise.clone()
    signal[:, :3] += 10 * torch.nn.functional.one_hot(labels, 3)
    assert probe_accuracy(signal[:200], labels[:200], signal[200:], labels[200:]) > 0.98
    assert probe_accuracy(noise[:200], labels[:200], noise[200:], labels[200:]) < 0.5

"""Channels for VAR, proposed from what stands out at the first token."""

from __future__ import annotations

import pytest
import torch
from forwards import difference
from methods_under_test import METHODS
from tiny_vlms import FAMILIES, IMAGE

from peft_pvm.probe.rows import Lesson
from peft_pvm.probe.sinks import Outliers, outliers, proposed


def outlier(sizes: list[float], beyond: list[tuple[int, int]], num_visual: int = 4) -> Outliers:
    return Outliers(torch.tensor(sizes), torch.tensor(beyond).reshape(-1, 2), num_visual)


def test_channels_are_above_tau_in_most_rows_and_layers():
    found = [
        outlier([1.0, 30.0, 25.0, 0.1], [(0, 1), (0, 2), (3, 3)]),
        outlier([1.0, 40.0, 10.0, 0.1], [(1, 2), (2, 1)]),
        outlier([50.0, 35.0, 22.0, 0.1], []),
    ]
    proposal = proposed(found, tau=20.0)
    assert proposal.channels == [1, 2]
    assert list(proposal.sizes) == [1, 2, 0, 3]
    assert proposal.sizes[1] == 35.0
    assert proposal.visual_share == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    assert "25.0% of the visual tokens are sinks" in proposal.reason
    assert "does nothing" in proposed(found[2:], tau=20.0).reason
    none = proposed(found, tau=60.0)
    assert none.channels == []
    assert "No channel is above 60 at the first token, where the largest is 35.0" in none.reason


@pytest.mark.parametrize("name", ["llava", "gemma3"])  # to what transformers returns, DeepStack adds
def test_outliers_are_those_of_the_hidden_states(name: str):
    tiny, tau = FAMILIES[name], 1.5
    model = tiny.build()
    lesson = Lesson(tiny.prompt(model, "t4 i t9"), 3)
    expected = model(**lesson.inputs, output_hidden_states=True)
    states = torch.stack(expected.hidden_states[:-1]).double()[:, 0]
    normed = (states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()
    found = outliers(METHODS["vaf"].attach(model), [lesson], 1, tau)
    assert len(found) == len(normed)
    is_image = lesson.inputs["input_ids"][0] == IMAGE
    for each, sizes in zip(found, normed):
        assert difference(each.first.double(), sizes[0]) < 1e-5
        assert torch.equal(each.beyond, (sizes[is_image] > tau).nonzero())
        assert each.num_visual == int(is_image.sum())


def test_a_channel_that_is_large_at_the_first_token_is_found():
    family = FAMILIES["llava"]
    model = family.build()
    lesson = Lesson(family.prompt(model, "t4 i t9"), 3)
    with torch.no_grad():
        model.get_input_embeddings().weight[lesson.inputs["input_ids"][0, 0], 7] = 100.0
    proposal = proposed(outliers(model, [lesson], 1, 6.0), 6.0)
    assert proposal.channels == [7]
    assert proposal.sizes[7] > 7.5  # of 8, the root of 64 channels
    assert proposal.visual_share == 0

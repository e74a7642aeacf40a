"""What travels with positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pvm.integrations.vllm.labels import attach_labels, detach_labels


@settings(max_examples=200, deadline=None)
@given(
    visual=st.lists(st.booleans(), min_size=1, max_size=30), seed=st.integers(0, 2**16), generated=st.integers(0, 5)
)
def test_they_come_back_for_prompts_and_generated_tokens(visual: list[bool], seed: int, generated: int):
    generator = torch.Generator().manual_seed(seed)
    length = len(visual)
    positions = torch.randint(0, 1 << 18, (3, length), generator=generator)
    delta = int(positions.max()) + 1 - length
    labelled, labelled_delta = attach_labels(positions, delta, torch.tensor(visual), with_anchors=True)
    following = torch.arange(length, length + generated).expand(3, -1)
    found, found_visual, found_after, found_anchors = detach_labels(
        torch.cat([labelled, following + labelled_delta], 1)
    )

    all_positions = torch.cat([positions, following + delta], 1)
    assert found.equal(all_positions)
    all_visual = visual + [False] * generated
    assert found_visual.tolist() == all_visual
    assert found_after.tolist() == [any(all_visual[: index + 1]) for index in range(len(all_visual))]
    anchors, first = [], all_positions[0].tolist()
    for index, is_visual in enumerate(all_visual):
        begins = index == 0 or is_visual != all_visual[index - 1]
        anchors.append(first[index] if begins else anchors[-1])
    assert found_anchors.tolist() == anchors


def test_without_anchors_they_fit_32_bits():
    positions = torch.tensor([[0, 2**29 - 8]]).expand(3, -1)
    labelled, delta = attach_labels(positions, -7, torch.tensor([True, False]), with_anchors=False)
    labelled = torch.cat([labelled, torch.full((3, 1), 2**29 - 1) + delta], 1)
    assert labelled.equal(labelled.int().long())
    found, visual_mask, after_image, anchors = detach_labels(labelled)
    assert found[0].tolist() == [0, 2**29 - 8, 2**29 - 8]
    assert visual_mask.tolist() == [True, False, False]
    assert after_image.all()
    assert not anchors.any()


def test_positions_of_one_axis_have_the_same_labels():
    labelled, _ = attach_labels(torch.arange(4).expand(3, -1), 0, torch.tensor([False, True, True, False]), True)
    positions, *labels = detach_labels(labelled)
    position, *of_one_axis = detach_labels(labelled[0])
    assert position.equal(positions[0])
    assert all(map(torch.equal, of_one_axis, labels))


def test_positions_of_a_dummy_run_are_text():
    positions, *labels = detach_labels(torch.arange(5).expand(3, -1))
    assert positions.equal(torch.arange(5).expand(3, -1))
    assert not any(label.any() for label in labels)


@pytest.mark.parametrize("last", [False, True])
def test_the_first_generated_token_continues_text_and_ends_an_image(last: bool):
    positions = torch.tensor([[0, 1, 1, 3]]).expand(3, -1)
    _, delta = attach_labels(positions, 0, torch.tensor([False, True, True, last]), with_anchors=True)
    *_, anchors = detach_labels(torch.full((3, 1), 4) + delta)
    assert anchors.item() == (4 if last else 3)

"""The mosaic task: what is held out stays out, answers are right, and pixels lie where Qwen3-VL looks for them."""

from __future__ import annotations

import importlib.util
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from peft_pvm.lab import mosaic
from peft_pvm.lab.mosaic import load_material, make_batch, patchify


def batch(split="train", rows=4, distractor_length=40, questions=6, seed=0):
    return make_batch(split, rows, distractor_length, questions, torch.Generator().manual_seed(seed))


def naive_patches(image: np.ndarray) -> list[list[float]]:
    """The patches of one image, `(height, width)`, in words: block by block, then channel, frame, pixel."""
    patches = []
    for block_top in range(0, image.shape[0], 8):
        for block_left in range(0, image.shape[1], 8):
            for top in (block_top, block_top + 4):
                for left in (block_left, block_left + 4):
                    pixels = [image[top + y, left + x] * 2 - 1 for y in range(4) for x in range(4)]
                    patches.append(pixels * 3 * 2)
    return patches


def tiles_of(pixel_values: torch.Tensor) -> np.ndarray:
    """Undo `patchify` for mosaics of 9 cells: `(rows, 9, 8, 8)`, whole grey values from 0 to 16."""
    tiles = np.zeros((len(pixel_values) // 36, 9, 8, 8))
    for index, patch in enumerate(pixel_values.numpy()):
        row, cell, part = index // 36, index % 36 // 4, index % 4
        top, left = part // 2 * 4, part % 2 * 4
        tiles[row, cell, top : top + 4, left : left + 4] = patch[:16].reshape(4, 4)
    return np.rint((tiles + 1) * 8)


def test_no_digit_is_on_both_sides():
    sides = [{image.numpy().tobytes() for image in load_material(split).images} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert sum(len(load_material(split).images) for split in ("train", "test")) == len(load_digits().images)
    assert 0.15 < len(load_material("test").images) / len(load_digits().images) < 0.25


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_digit_is_shown(split):
    assert load_material(split).labels.unique().tolist() == list(range(10))


def test_no_topic_is_on_both_sides():
    texts = {split: bytes(load_material(split).text.tolist()).decode() for split in ("train", "test")}
    for topic in topics.values():
        assert (topic in texts["train"]) != (topic in texts["test"])
    assert len(texts["test"]) > 20_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_the_digits_in_the_asked_cells(split):
    drawn = batch(split, rows=16, questions=9)
    digits = load_digits()
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target)}
    tiles = tiles_of(drawn.inputs["pixel_values"])
    for row in range(16):
        for cell, answer in zip(drawn.cells[row].tolist(), drawn.answers[row].tolist()):
            assert answer - mosaic.FIRST_ANSWER == known[tiles[row, cell].tobytes()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_prefix_text_and_dialogue(split):
    drawn = batch(split, distractor_length=40, questions=3)
    text = bytes(load_material(split).text.tolist())
    for row, ids in enumerate(drawn.inputs["input_ids"].tolist()):
        assert ids[:11] == [mosaic.VISION_START, *[mosaic.IMAGE] * 9, mosaic.VISION_END]
        assert bytes(ids[11:51]) in text
        queries = [mosaic.FIRST_QUERY + cell for cell in drawn.cells[row].tolist()]
        answers = drawn.answers[row].tolist()
        assert ids[51:] == [queries[0], answers[0], queries[1], answers[1], queries[2]]
        assert len(set(queries)) == 3
        assert [ids[position] for position in drawn.inputs["logits_to_keep"]] == queries


def test_patches_are_in_the_order_of_merge_blocks():
    images = torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([patch for image in images.numpy() for patch in naive_patches(image)])
    assert torch.equal(patchify(images), expected)


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs pillow")
def test_patches_are_those_of_the_image_processor_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 24 * 24, "longest_edge": 24 * 24},
        rescale_factor=1 / 16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    drawn = batch(rows=3)
    tiles = tiles_of(drawn.inputs["pixel_values"]).astype(np.uint8)
    images = [np.block([[row[3 * y + x] for x in range(3)] for y in range(3)]) for row in tiles]
    processed = processor([np.repeat(image[:, :, None], 3, axis=2) for image in images], return_tensors="pt")
    torch.testing.assert_close(drawn.inputs["pixel_values"], processed["pixel_values"])
    assert torch.equal(drawn.inputs["image_grid_thw"], processed["image_grid_thw"])


def test_a_seed_makes_one_batch():
    first, again, other = batch(seed=3), batch(seed=3), batch(seed=4)
    assert all(torch.equal(first.inputs[name], again.inputs[name]) for name in first.inputs)
    assert torch.equal(first.answers, again.answers)
    assert not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])
    assert not torch.equal(first.inputs["pixel_values"], other.inputs["pixel_values"])


@pytest.mark.parametrize("wrong", [{"questions": 10}, {"questions": 0}, {"rows": 0}, {"distractor_length": -1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        batch(**wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        batch("validation")

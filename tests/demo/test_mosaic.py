"""The mosaic task: what is held out stays out, answers are right, and pixels lie where Qwen3-VL looks for them."""

from __future__ import annotations

import importlib.util
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from peft_pvm.demo import mosaic
from peft_pvm.demo.mosaic import load_material, make_questions, make_transcriptions, patchify


SPLITS = ("train", "validation", "test")


def batch(split="train", rows=4, distractor_length=40, questions=6, seed=0, images=1):
    return make_questions(split, rows, distractor_length, questions, torch.Generator().manual_seed(seed), images)


def naive_patches(image: np.ndarray) -> list[list[float]]:
    """The patches of one image, `(3, height, width)`, in words: block by block, then channel, frame, pixel."""
    patches = []
    for block_top in range(0, image.shape[1], 8):
        for block_left in range(0, image.shape[2], 8):
            for top in (block_top, block_top + 4):
                for left in (block_left, block_left + 4):
                    patch: list[float] = []
                    for channel in image:
                        patch += [channel[top + y, left + x] * 2 - 1 for y in range(4) for x in range(4)] * 2
                    patches.append(patch)
    return patches


def tiles_of(pixel_values: torch.Tensor) -> np.ndarray:
    """Undo `patchify` for mosaics of 9 cells: `(mosaics, 3, 9, 8, 8)`, whole grey values from 0 to 16."""
    tiles = np.zeros((len(pixel_values) // 36, 3, 9, 8, 8))
    for index, patch in enumerate(pixel_values.numpy()):
        mosaic_index, cell, part = index // 36, index % 36 // 4, index % 4
        top, left = part // 2 * 4, part % 2 * 4
        for channel in range(3):
            pixels = patch[32 * channel : 32 * channel + 16].reshape(4, 4)
            tiles[mosaic_index, channel, cell, top : top + 4, left : left + 4] = pixels
    return np.rint((tiles + 1) * 8)


def known_digits() -> dict[bytes, int]:
    digits = load_digits()
    return {image.tobytes(): label for image, label in zip(digits.images, digits.target)}


def test_no_digit_is_in_two_splits():
    splits = [{image.numpy().tobytes() for image in load_material(split).images} for split in SPLITS]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    total = len(load_digits().images)
    assert sum(len(load_material(split).images) for split in SPLITS) == total
    assert 0.15 < len(load_material("test").images) / total < 0.25
    assert 0.05 < len(load_material("validation").images) / total < 0.15


@pytest.mark.parametrize("split", SPLITS)
def test_every_digit_is_shown(split):
    assert load_material(split).labels.unique().tolist() == list(range(10))


def test_no_topic_is_in_two_splits():
    texts = [bytes(load_material(split).text.tolist()).decode() for split in SPLITS]
    for topic in topics.values():
        assert sum(topic in text for text in texts) == 1
    assert all(len(text) > 20_000 for text in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_the_digits_in_the_asked_cells(split):
    drawn = batch(split, rows=16, questions=9)
    known = known_digits()
    tiles = tiles_of(drawn.inputs["pixel_values"])
    queries = drawn.inputs["input_ids"][:, drawn.inputs["logits_to_keep"]] - mosaic.FIRST_QUERY
    for row in range(16):
        for cell, answer in zip(queries[row].tolist(), drawn.targets[row].tolist()):
            assert answer - mosaic.FIRST_ANSWER == known[tiles[row, 0, cell].tobytes()]


@pytest.mark.parametrize("images", [2, 3])
def test_several_mosaics_have_a_colour_each_and_are_asked_for_by_it(images):
    drawn = batch(rows=16, questions=9, images=images)
    known = known_digits()
    tiles = tiles_of(drawn.inputs["pixel_values"]).reshape(16, images, 3, 9, 8, 8)
    queries = drawn.inputs["input_ids"][:, drawn.inputs["logits_to_keep"]] - mosaic.FIRST_QUERY
    asked = set()
    for row in range(16):
        lit = [[channel for channel in range(3) if tiles[row, image, channel].any()] for image in range(images)]
        assert all(len(channels) == 1 for channels in lit)
        colours = [channels[0] for channels in lit]
        assert len(set(colours)) == images
        for query, answer in zip(queries[row].tolist(), drawn.targets[row].tolist()):
            colour, cell = query // 9 - 1, query % 9
            asked.add((colours.index(colour), colour))
            tile = tiles[row, colours.index(colour), colour, cell]
            assert answer - mosaic.FIRST_ANSWER == known[tile.tobytes()]
    assert len(asked) == 3 * images
    prefix = [mosaic.VISION_START, *[mosaic.IMAGE] * 9, mosaic.VISION_END] * images
    assert drawn.inputs["input_ids"][0, : len(prefix)].tolist() == prefix
    assert len(drawn.inputs["image_grid_thw"]) == 16 * images


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_is_prefix_text_and_dialogue(split):
    drawn = batch(split, distractor_length=40, questions=3)
    text = bytes(load_material(split).text.tolist())
    for row, ids in enumerate(drawn.inputs["input_ids"].tolist()):
        assert ids[:11] == [mosaic.VISION_START, *[mosaic.IMAGE] * 9, mosaic.VISION_END]
        assert bytes(ids[11:51]) in text
        queries, answers = ids[51::2], drawn.targets[row].tolist()
        assert ids[52::2] == answers[:2]
        assert len(set(queries)) == 3
        assert set(queries) <= set(range(mosaic.FIRST_QUERY, mosaic.FIRST_QUERY + 9))
        assert [ids[position] for position in drawn.inputs["logits_to_keep"]] == queries


def test_a_transcription_goes_round_the_mosaic():
    drawn = make_transcriptions("train", 16, 30, 20, torch.Generator().manual_seed(0))
    known = known_digits()
    tiles = tiles_of(drawn.inputs["pixel_values"])
    starts = set()
    for row, ids in enumerate(drawn.inputs["input_ids"].tolist()):
        written = [*ids[41:], int(drawn.targets[row, -1])]
        assert [ids[position] for position in drawn.inputs["logits_to_keep"]] == written[:-1]
        assert drawn.targets[row].tolist() == written[1:]
        cells = [query - mosaic.FIRST_QUERY for query in written[::2]]
        assert cells == [(cells[0] + step) % 9 for step in range(20)]
        starts.add(cells[0])
        digits = [answer - mosaic.FIRST_ANSWER for answer in written[1::2]]
        assert digits == [known[tiles[row, 0, cell].tobytes()] for cell in cells]
    assert len(starts) > 4


def test_patches_are_in_the_order_of_merge_blocks():
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
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
    drawn = batch(rows=3, images=2)
    tiles = tiles_of(drawn.inputs["pixel_values"]).astype(np.uint8)
    images = [np.block([[shown[:, 3 * y + x] for x in range(3)] for y in range(3)]) for shown in tiles]
    processed = processor([np.moveaxis(image, 0, 2) for image in images], return_tensors="pt")
    torch.testing.assert_close(drawn.inputs["pixel_values"], processed["pixel_values"])
    assert torch.equal(drawn.inputs["image_grid_thw"], processed["image_grid_thw"])


def test_a_seed_makes_one_batch():
    first, again, other = batch(seed=3), batch(seed=3), batch(seed=4)
    assert all(torch.equal(first.inputs[name], again.inputs[name]) for name in first.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])
    assert not torch.equal(first.inputs["pixel_values"], other.inputs["pixel_values"])


@pytest.mark.parametrize(
    "wrong", [{"questions": 10}, {"questions": 0}, {"rows": 0}, {"distractor_length": -1}, {"images": 4}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        batch(**wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'held-out'"):
        batch("held-out")

"""Text stands up to a distance behind each image: against an independent computation, and what must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from forwards import TOLERANCE, difference, in_double, logits
from oracle import oracle
from peft import PeftModel, get_peft_model
from tiny_vlms import FAMILIES, TinyVLM
from transformers import StaticCache

from peft_pvm import DIPEConfig, attached
from peft_pvm.methods.dipe import parts
from peft_pvm.methods.dipe.method import AnchoredPositions
from peft_pvm.tokens.context import VisualContext
from peft_pvm.utils.packages import CACHE


BATCH = ("t4 i t9 i t3 i t12", "i t12 i t8", "t5 i i t7", "t9")  # three images, two, one run of two, none
ONE_LAYOUT = ("t4 i t9 i t3 i t12",) * 2
SETTINGS = {
    "each run": {"image_gap": 1},
    "no distance": {"max_distance": 0, "image_gap": 1},
    "near runs together": {"image_gap": 8},
    "two images told apart": {"image_gap": 1, "max_images": 2},
    "one image": {"image_gap": 1, "max_images": 1},
}


def by_image(**fields) -> DIPEConfig:
    return DIPEConfig(**{"anchor": "image", "max_distance": 3, "image_gap": 1, **fields})


def computed_and_expected(family: TinyVLM, config: DIPEConfig, batch=BATCH, **kwargs) -> tuple[torch.Tensor, ...]:
    model = family.build(**kwargs)
    inputs = family.inputs(model, *batch)
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=config) as reference:
        expected = logits(reference, in_double(inputs))[real]
    with attached(model, config):
        return logits(model, inputs)[real].double(), expected


def agrees(*args, **kwargs) -> bool:
    return difference(*computed_and_expected(*args, **kwargs)) < 2e-5


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_agrees_with_the_oracle(family: TinyVLM, fields: dict):
    """Rows with different numbers of images, and by modality where all have one layout."""
    assert agrees(family, by_image(**fields))
    assert agrees(family, by_image(**fields), ONE_LAYOUT, attn_implementation="eager" if _is_eager(family) else "sdpa")


def _is_eager(family: TinyVLM) -> bool:
    return family is FAMILIES["paligemma2"]

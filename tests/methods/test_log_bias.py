"""The log-bias on text alone, beside padding, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forwards import difference, logits
from tiny_vlms import FAMILIES

from peft_pvm import LogBiasConfig, attached


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")
TOLERANCE = 2e-5


def test_the_default_does_not_act_on_text_alone_and_does_behind_an_image():
    family = FAMILIES["llava"]
    model = family.build()
    inputs = [family.inputs(model, conversation) for conversation in ("t9", "t4 i t9")]
    base = [logits(model, each) for each in inputs]
    with attached(model, LogBiasConfig()):
        text, image = (logits(model, each) for each in inputs)
    assert torch.equal(text, base[0])
    assert difference(image, base[1]) > 1e-4


def test_padding_behind_text_spoils_nothing():
    """It may be given any position, so that it stands before the image."""
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, "t7 i t5")
    with attached(model, LogBiasConfig(t0=0.7)):
        alone = logits(model, inputs)
        padded = {name: torch.nn.functional.pad(inputs[name], (0, 3)) for name in ("input_ids", "attention_mask")}
        positions = torch.nn.functional.pad(inputs["position_ids"], (0, 3), value=1)
        found = logits(model, {**inputs, **padded, "position_ids": positions})
    assert difference(found[:, : alone.shape[1]], alone) < TOLERANCE


def test_a_model_that_bends_its_scores_is_refused():
    family = FAMILIES["paligemma2"]
    config = family.config()
    config.text_config.attn_logit_softcapping = 50.0
    model = replace(family, config=lambda: config).build(attn_implementation="eager")
    inputs = family.inputs(model, *BATCH)
    with attached(model, LogBiasConfig()), pytest.raises(NotImplementedError, match="caps its scores"):
        logits(model, inputs)


@pytest.mark.parametrize("t0", [0, -1, None, "128", True])
def test_t0_is_a_number_above_0(t0):
    with pytest.raises(ValueError, match=r"LogBiasConfig.t0 is .*, but must be a number above 0"):
        LogBiasConfig(t0=t0)

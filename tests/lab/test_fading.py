"""Attention at the questions is what eager attention says it is."""

from __future__ import annotations

import pytest
import torch

from peft_pvm import DIPEConfig, attached
from peft_pvm.lab.fading import visual_mass
from peft_pvm.lab.mosaic import make_questions
from peft_pvm.lab.tiny_vlm import load_tiny_vlm


@pytest.mark.parametrize("configs", [[], [DIPEConfig()]])
def test_the_mass_is_that_of_eager_attention(configs):
    model = load_tiny_vlm()
    generator = torch.Generator().manual_seed(0)
    expected = []
    with attached(model, *configs):
        found = visual_mass(model, 50, rows=2)
        model.set_attn_implementation("eager")
        for _ in range(2):
            inputs = make_questions("test", 1, 50, 9, generator).inputs
            with torch.no_grad():
                attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
            questions = [61 + 2 * question for question in range(9)]
            expected.append(torch.stack([layer[0, :, questions, 1:10].sum(-1).mean() for layer in attentions]))
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)

"""Attention at the questions is what eager attention says it is; so is what PVM retrieves."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from experiments.fading import retrieved_mass, visual_mass
from peft_pvm import DIPEConfig, PVMConfig, attached
from peft_pvm.demo.mosaic import FIRST_QUERY, make_questions
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.methods.pvm.layer import PVMLayer


@pytest.mark.parametrize("configs", [[], [DIPEConfig(max_distance=0)]])
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


def test_what_pvm_retrieves_of_the_asked_cell():
    torch.manual_seed(0)
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64)).eval()
    found = retrieved_mass(model, 30, rows=1)[3]
    seen = {}
    (layer,) = (module for module in model.modules() if isinstance(module, PVMLayer) and module.layer_idx == 3)
    for name in ("pvm_q_norm", "pvm_k_norm"):
        norm = getattr(layer, name)["default"]
        norm.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output[0].transpose(0, 1))
        )
    inputs = make_questions("test", 1, 30, 9, torch.Generator().manual_seed(0)).inputs
    with torch.no_grad():
        model(**inputs, use_cache=False)
    queries, keys = seen["pvm_q_norm"][:, -17::2], seen["pvm_k_norm"]
    weights = (queries @ keys.transpose(1, 2) / 32**0.5).softmax(-1)
    cells = inputs["input_ids"][0, 41::2] - FIRST_QUERY
    expected = torch.stack([weights[:, question, cell].mean() for question, cell in enumerate(cells)]).mean()
    torch.testing.assert_close(found, float(expected), atol=1e-5, rtol=0)


def test_nothing_is_retrieved_without_pvm():
    assert retrieved_mass(load_tiny_vlm(), 30, rows=1) == {}

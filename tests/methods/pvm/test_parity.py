"""Agreement with the authors' code: tests/data/pvm_qwen3vl.safetensors holds a tiny model and what it computed.

The outputs were made in float64, but the authors' norms and softmax work in float32, hence the tolerance. In the batch
of two, the authors' run gave NaN for the whole left-padded row, so that row is compared with itself run alone instead.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forwards import difference
from peft import get_peft_model
from safetensors import safe_open
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig


GOLDEN = Path(__file__).parents[2] / "data" / "pvm_qwen3vl.safetensors"
IDS = dict(image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293)
TOLERANCE = 1e-4
NAMES = {  # the authors' names
    "gate_alpha": "pvm_gate.default.weight",
    "text_reducer": "pvm_text_reducer.default",
    "vision_reducer": "pvm_vision_reducer.default",
    "output_expander": "pvm_output_expander.default",
    "input_norm": "pvm_input_norm.default",
    "post_attn_norm": "pvm_post_attn_norm.default",
    "cross_attn.q_proj": "pvm_q_proj.default",
    "cross_attn.k_proj": "pvm_k_proj.default",
    "cross_attn.v_proj": "pvm_v_proj.default",
    "cross_attn.o_proj": "pvm_o_proj.default",
    "cross_attn.q_norm": "pvm_q_norm.default",
    "cross_attn.k_norm": "pvm_k_norm.default",
    "mlp.gate_proj": "pvm_gate_proj.default",
    "mlp.up_proj": "pvm_up_proj.default",
    "mlp.down_proj": "pvm_down_proj.default",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN, framework="pt") as file:
        device = torch.get_default_device()
        return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def model(golden):
    with safe_open(GOLDEN, framework="pt") as file:
        text, vision = (json.loads(file.metadata()[part]) for part in ("text", "vision"))
    r, layers = text.pop("pvm_hidden_size"), text.pop("pvm_layers")
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    config = Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **IDS)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float64).eval()
    peft_config = PVMConfig(r=r, layers_to_transform=layers, memory_visibility="sample")
    peft_model = get_peft_model(model, peft_config).eval()

    weights = {}
    for name, tensor in golden.items():
        if not name.startswith("w."):
            continue
        key = name.removeprefix("w.")
        if ".pvm_block." in key:
            layer, _, part = key.partition(".pvm_block.")
            stem, _, suffix = part.rpartition(".") if part != "gate_alpha" else (part, "", "")
            key = f"{layer}.pvm.{NAMES[stem]}" + (f".{suffix}" if suffix else "")
        weights[f"base_model.model.{key}"] = tensor
    missing, unexpected = peft_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing in ([], ["base_model.model.lm_head.weight"])
    return peft_model.to(torch.float64)


@pytest.mark.parametrize("case", ["single", "batch"])
def test_logits(model, golden, case: str):
    inputs, expected = _inputs(golden, case), golden[f"{case}.logits"]
    with torch.no_grad():
        on = model(**inputs).logits
        with model.disable_adapter():
            off = model(**inputs).logits
    assert difference(off[0], expected[0]) > 2, "the branch should matter"
    assert difference(on[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("case", ["single", "batch"])
def test_greedy_decoding(model, golden, case: str):
    expected = golden[f"{case}.step_logits"]
    output = _generate(model, _inputs(golden, case), steps=expected.shape[1])
    assert torch.equal(output.sequences[0], golden[f"{case}.sequences"][0])
    assert difference(torch.stack(output.logits, 1)[0].float(), expected[0]) < TOLERANCE


def test_padded_row_equals_itself_alone(model, golden):
    assert golden["batch.logits"][1].isnan().all()
    batch = _inputs(golden, "batch")
    length = int(batch["attention_mask"][1].sum())
    patches = int(batch["image_grid_thw"][2].prod())
    alone = {name: batch[name][1:, -length:] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    alone.update(pixel_values=batch["pixel_values"][-patches:], image_grid_thw=batch["image_grid_thw"][2:])
    steps = golden["batch.step_logits"].shape[1]
    together, apart = _generate(model, batch, steps), _generate(model, alone, steps)
    assert torch.equal(together.sequences[1, -length - steps :], apart.sequences[0])
    assert difference(torch.stack(together.logits, 1)[1], torch.stack(apart.logits, 1)[0]) < TOLERANCE


def _generate(model, inputs: dict[str, torch.Tensor], steps: int):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def _inputs(golden: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    inputs = {name: golden[f"{case}.{name}"] for name in names}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IDS["image_token_id"]).int()
    return inputs

"""Agreement with the authors' code: tests/data/dipe_qwen25vl.safetensors holds a tiny model and what it computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forwards import difference, logits
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from peft_pvm import DIPEConfig
from peft_pvm.utils.packages import CACHE


GOLDEN = Path(__file__).parents[2] / "data" / "dipe_qwen25vl.safetensors"
IDS = dict(image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293)
TOLERANCE = 1e-4  # rotation tables are fp32


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN, framework="pt") as file:
        device = torch.get_default_device()
        return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def model(golden) -> Qwen2_5_VLForConditionalGeneration:
    with safe_open(GOLDEN, framework="pt") as file:
        text, vision = (json.loads(file.metadata()[part]) for part in ("text", "vision"))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float64).eval()
    weights = {name.removeprefix("w."): tensor for name, tensor in golden.items() if name.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return model


@pytest.fixture
def inputs(golden) -> dict[str, torch.Tensor]:
    input_ids = golden["input_ids"]
    return {
        "input_ids": input_ids,
        "pixel_values": golden["pixel_values"].to(torch.float64),
        "image_grid_thw": golden["image_grid_thw"],
        "mm_token_type_ids": (input_ids == IDS["image_token_id"]).int(),
    }


def test_logits(model, golden, inputs):
    base, expected = golden["base_logits"], golden["dipe_logits"]
    assert difference(base, expected) > 3
    assert difference(logits(model, inputs), base) < TOLERANCE
    peft_model = get_peft_model(model, DIPEConfig(max_distance=0))
    assert difference(logits(peft_model, inputs), expected) < TOLERANCE


def test_decoding(model, golden, inputs):
    """The last 20 tokens one by one, on the path that does not copy the cache."""
    peft_model: PeftModel = get_peft_model(model, DIPEConfig(max_distance=0))
    length = inputs["input_ids"].shape[1]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    first = {name: tensor for name, tensor in inputs.items() if name != "mm_token_type_ids"}
    first |= {"input_ids": inputs["input_ids"][:, :-20], "position_ids": positions[..., :-20]}
    with torch.no_grad():
        output = peft_model(**first, use_cache=True)
        steps = [output.logits]
        for step in range(length - 20, length):
            one = slice(step, step + 1)
            output = peft_model(
                input_ids=inputs["input_ids"][:, one],
                position_ids=positions[..., one],
                **{CACHE: output[CACHE]},
                use_cache=True,
            )
            steps.append(output.logits)
    assert difference(torch.cat(steps, 1), golden["dipe_logits"]) < TOLERANCE

"""Text models of other shapes than one stack of layers with one residual stream; images that come by a Q-Former."""

from __future__ import annotations

import torch
import transformers as T
from tiny_vlms import HIDDEN, IMAGE, TEXT, VIDEO

from .rows import AnyVLM, Architecture


def _nemotron_h_omni():
    """Its stack is called `embeddings` and `layers`, and a layer has one mixer."""
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    text = T.NemotronHConfig(
        **text,
        layers_block_type=["full_attention", "moe", "linear_attention", "mlp", "full_attention", "moe"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        time_step_min=1e-9,  # a step of decoding takes no heed of it, and would differ from the whole
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=4,
        image_size=16,
        max_img_size=32,
        video_temporal_patch_size=2,
    )
    return T.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=HIDDEN,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _nemotron_image(model, generator):
    pixels = torch.randn(16, 3 * 4 * 4, generator=generator, device="cpu")
    return [IMAGE] * 4, {"pixel_values": pixels, "image_grid_hw": torch.tensor([[4, 4]])}


def _nemotron_video(model, generator):
    pixels = torch.randn(1, 2, 2 * 3, 16, 16, generator=generator, device="cpu")
    return [IMAGE] * 8, {"pixel_values_videos": pixels}


NOTHING_ROTATES = "has no layer that rotates queries and keys by position"

ROWS: dict[str, Architecture] = {
    "nemotron_h_omni": Architecture(
        "Nemotron 3 Nano Omni",
        AnyVLM("NemotronH_Omni_Reasoning_V3", _nemotron_h_omni, _nemotron_image, _nemotron_video),
        refused={
            "pvm": "each layer is attention or an FFN, not both",
            "pvm-hidden-states": "each layer is attention or an FFN, not both",
            "dipe": NOTHING_ROTATES,
        },
    ),
}

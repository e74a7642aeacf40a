"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import transformers as T
from tiny_vlms import (
    GRID,
    HIDDEN,
    HEADS,
    IMAGE,
    TEXT,
    VIDEO,
    VIDEO_BY_FRAME,
    _image_sizes,
    _llava,
    _mistral3,
    _square_visual,
)

from .rows import AnyVLM, Architecture


# Heads of queries and keys (8 + 8) are as wide as the branches of PVM, those of values are wider.
LATENT = dict(
    TEXT,
    num_key_value_heads=HEADS,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=24,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def _deepseek_v3(**text: Any):
    return T.DeepseekV3Config(**{**LATENT, **text})


def _kimi_k25():
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        pos_emb_height=8,
        pos_emb_width=8,
    )
    return T.Kimi_K25Config(
        text_config=_deepseek_v3(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        vision_config=vision,
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _mistral4():
    """Queries are scaled by their position, after the rotation."""
    config = _mistral3()
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    config.text_config = T.Mistral4Config(**{**LATENT, "n_group": 1, "topk_group": 1}, rope_parameters=rope)
    return config


def _llava_of(text_config: Any):
    config = _llava()
    config.text_config = text_config
    return config


MISTRAL_IMAGE = _square_visual(4, image_sizes=_image_sizes)
LLAVA = "LlavaForConditionalGeneration"

ROWS = {
    "mistral4": Architecture("Mistral Small 4", AnyVLM("Mistral3ForConditionalGeneration", _mistral4, MISTRAL_IMAGE)),
    "llava/deepseek_v3": Architecture(
        "", AnyVLM(LLAVA, lambda: _llava_of(_deepseek_v3(rope_interleave=False)), _square_visual(4))
    ),
    "llava/deepseek_v2": Architecture(
        "", AnyVLM(LLAVA, lambda: _llava_of(T.DeepseekV2Config(**LATENT)), _square_visual(4))
    ),
}

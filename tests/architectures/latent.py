"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    AUDIO,
    HEADS,
    HIDDEN,
    IMAGE,
    TEXT,
    VIDEO,
    _image_sizes,
    _llava,
    _mistral3,
    _square_visual,
)

from .rows import AnyVLM, Architecture


# Heads of queries and keys have 8 + 8 channels; those of values are narrower.
LATENT = dict(
    TEXT,
    num_key_value_heads=HEADS,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
# Each query sees a few keys alone, which an indexer chooses: by many heads, lest keys that none of them likes draw.
SPARSE = dict(LATENT, index_topk=8, index_head_dim=16, index_n_heads=16)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=4)


def _kimi_k25():
    rope = {**YARN, "original_max_position_embeddings": 32}
    return T.Kimi_K25Config(
        text_config=T.DeepseekV3Config(**LATENT, rope_parameters=rope),
        vision_config=dict(VISION, pos_emb_height=8, pos_emb_width=8),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _patches(modality: str, tokens: list[int], *shape: int, frames: int = 1):
    """Frames of 4 x 4 patches in one flat list, with their grid."""

    def make(model, generator):
        suffix = "_videos" if modality == "video" else ""
        pixels = torch.randn(16 * frames, *shape, generator=generator, device="cpu")
        return tokens, {f"pixel_values{suffix}": pixels, f"{modality}_grid_thw": torch.tensor([[frames, 4, 4]])}

    return make


def _mistral4():
    """Queries are multiplied by a number that grows with their position, after the rotation."""
    config = _mistral3()
    rope = {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
    config.text_config = T.Mistral4Config(**LATENT, rope_parameters=rope)
    return config


def _mistral_large4():
    """Layers without rotation, layers that take the latents of an earlier one, and keys that an earlier one chose."""
    text = dict(
        SPARSE,
        num_hidden_layers=5,
        no_rope_layers=[1, 0, 1, 1, 0],
        kv_source_layers=[0, 1, 0, 3, 1],
        indexer_types=["full", "shared", "full", "shared", "shared"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return T.MistralLarge4Config(
        text_config={name: value for name, value in text.items() if name != "q_lora_rank"},
        vision_config=T.PixtralVisionConfig(**{**VISION, "image_size": 28, "patch_size": 7}),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


class MistralLarge4(AnyVLM):
    """Its frequencies and the factors of its queries are learned."""

    def build_anyway(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        model = super().build_anyway(seed, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("alpha", "softmax_scaling.scale", "softmax_scaling.bias")):
                    parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator, device="cpu"))
        return model


def _dots3_note():
    """Layers of two kinds, with heads of different number; values of different size."""
    text = dict(
        SPARSE,
        head_dim=16,
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        sliding_window=8,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=16,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=12,
        shared_experts_intermediate_size=32,
    )
    return T.Dots3NoteConfig(
        text_config=text,
        vision_config=dict(
            VISION,
            pyramid_num_routed=[-1, -1],
            adapter_in_dim=32,
            adapter_out_dim=HIDDEN,
        ),
        audio_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            adapter_input_size=32,
            adapter_out_dim=HIDDEN,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )


def _llava_of(text_config: Any):
    config = _llava()
    config.text_config = text_config
    return config


MISTRAL_IMAGE = _square_visual(4, image_sizes=_image_sizes)
LLAVA = "LlavaForConditionalGeneration"

ROWS = {
    "kimi_k25": Architecture(
        "Kimi K2.5, Kimi K2.6",
        AnyVLM(
            "Kimi_K25ForConditionalGeneration",
            _kimi_k25,
            _patches("image", [IMAGE] * 4, 3, 4, 4),
            _patches("video", [VIDEO] * 4, 3, 4, 4),  # of one frame: transformers 5.16.1 miscounts several
        ),
    ),
    "mistral4": Architecture("Mistral Small 4", AnyVLM("Mistral3ForConditionalGeneration", _mistral4, MISTRAL_IMAGE)),
    "mistral_large4": Architecture(
        "Mistral Large 4",
        MistralLarge4("MistralLarge4ForConditionalGeneration", _mistral_large4, MISTRAL_IMAGE, is_noisy=True),
    ),
    "dots3_note": Architecture(
        "dots3-note",
        AnyVLM(
            "Dots3NoteForConditionalGeneration",
            _dots3_note,
            _patches("image", [IMAGE] * 4, 3 * 4 * 4),
            _patches("video", [VIDEO] * 8, 3 * 4 * 4, frames=2),
        ),
    ),
    # Halves are rotated, and neighbouring channels that stay where they are.
    "llava/deepseek_v3": Architecture(
        "",
        AnyVLM(LLAVA, lambda: _llava_of(T.DeepseekV3Config(**LATENT, rope_interleave=False)), _square_visual(4)),
    ),
    "llava/deepseek_v2": Architecture(
        "", AnyVLM(LLAVA, lambda: _llava_of(T.DeepseekV2Config(**LATENT)), _square_visual(4))
    ),
}

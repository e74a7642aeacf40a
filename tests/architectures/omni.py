"""Models of more than images and text, mixtures of experts, and kin of the core families."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    AUDIO,
    END,
    GLM_IDS,
    GLM_ROPE,
    GLM_VIDEO,
    GRID,
    HIDDEN,
    IMAGE,
    MOE,
    MROPE,
    MROPE_INTERLEAVED,
    QWEN3_VISION,
    QWEN_IDS,
    QWEN_VISION,
    SIGLIP,
    SLIDING,
    START,
    TEXT,
    VIDEO,
    VIDEO_BY_FRAME,
)

from .rows import SEVERAL_STREAMS, AnyVLM, Architecture


AUDIO_ENCODER = dict(
    num_mel_bins=16,
    d_model=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    max_source_positions=64,
    output_dim=HIDDEN,
)
MUSE_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO)


class Thinker(AnyVLM):
    """It makes positions of tokens, grids and times."""

    def _position_ids(self, model, rows, input_ids, types, attention_mask):
        visuals = self._collate([[arguments for _, arguments in row.visuals] for row in rows])
        grids = {name: visuals.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        times = visuals.get("video_second_per_grid")
        positions, _ = model.get_rope_index(input_ids, **grids, attention_mask=attention_mask, second_per_grids=times)
        return positions.long()


class Ernie(AnyVLM):
    """It is told which tokens go to the experts of images."""

    def inputs(self, model, *conversations, **cut):
        batch = super().inputs(model, *conversations, **cut)
        visual = torch.isin(batch["input_ids"], torch.tensor((START, IMAGE, VIDEO, END)))
        return {**batch, "moe_mm_token_type_ids": visual.int()}


class Gemma4Unified(AnyVLM):
    """Its scores are not scaled: what it trains for queries makes up for that."""

    def build_anyway(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        model = super().build_anyway(seed, **kwargs)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.data *= 0.3
        return model


class Gemma4UnifiedInBlocks(Gemma4Unified):
    """The tokens of an image attend to each other in both directions."""

    def inputs(self, model, *conversations, **cut):
        batch = super().inputs(model, *conversations, **cut)
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


def _qwen3_5_moe():
    linear = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2)
    text = dict(
        {name: value for name, value in TEXT.items() if name != "intermediate_size"},
        head_dim=32,
        rope_parameters={**MROPE_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
        layer_types=["linear_attention", "full_attention", "full_attention"],
        shared_expert_intermediate_size=32,
        **linear,
        **MOE,
    )
    return T.Qwen3_5MoeConfig(text_config=text, vision_config=QWEN3_VISION, **QWEN_IDS)


def _qwen3_omni():
    text = dict(
        TEXT, head_dim=16, rope_parameters=MROPE_INTERLEAVED, decoder_sparse_step=1, mlp_only_layers=[1], **MOE
    )
    return T.Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=dict(QWEN3_VISION, deepstack_visual_indexes=[0, 1]),
        audio_config=dict(AUDIO_ENCODER, downsample_hidden_size=16),
        audio_token_id=AUDIO,
        audio_start_token_id=304,
        **QWEN_IDS,
    )


def _qwen2_5_omni():
    return T.Qwen2_5OmniThinkerConfig(
        text_config=dict(TEXT, rope_parameters=MROPE, use_sliding_window=False),
        vision_config=dict(QWEN_VISION, intermediate_size=64, fullatt_block_indexes=[1], window_size=16),
        audio_config=AUDIO_ENCODER,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        audio_start_token_id=304,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _cosmos3_edge():
    return T.Cosmos3EdgeConfig(
        text_config=dict(TEXT, head_dim=16, rope_parameters=MROPE),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
            "spatial_merge_size": 2,
        },
        projector_hidden_size=64,
        **QWEN_IDS,
    )


def _cosmos3_omni():
    text = dict(TEXT, head_dim=16, rope_parameters=MROPE_INTERLEAVED)
    vision = dict(QWEN3_VISION, deepstack_visual_indexes=[0, 1])
    return T.Cosmos3OmniConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _glm46v(config_class: str, text: Any = None):
    vision = dict(QWEN_VISION, intermediate_size=64, image_size=32)
    text = text or dict(TEXT, rope_parameters=GLM_ROPE)
    return getattr(T, config_class)(text_config=text, vision_config=vision, **GLM_IDS)


def _glm46v_moe():
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)
    text = dict(TEXT, head_dim=16, rope_parameters=GLM_ROPE, first_k_dense_replace=1, **experts)
    return _glm46v("Glm46VConfig", T.Glm4vMoeTextConfig(**text))


def _ernie4_5_vl_moe():
    """Text and visual tokens have experts of their own."""
    return T.Ernie4_5_VLMoeConfig(
        text_config=dict(
            TEXT,
            rope_parameters={**MROPE, "mrope_section": [3, 3, 2]},
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=[32, 16],
        ),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4),
        **GLM_IDS,
    )


def _video_llama_3():
    return T.VideoLlama3Config(
        text_config=T.Qwen2Config(**TEXT),
        vision_config={**SIGLIP, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _gemma4_unified():
    """Heads of the layers with full attention are wider, fewer and their own values."""
    text = dict(
        {**TEXT, **SLIDING, "head_dim": 8}, global_head_dim=16, attention_k_eq_v=True, num_global_key_value_heads=1
    )
    return T.Gemma4UnifiedConfig(
        text_config=T.Gemma4UnifiedTextConfig(**text),
        vision_config=dict(
            patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32
        ),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
    )


MUSE_VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    pos_emb_height=8,
    pos_emb_width=8,
)
MUSE_TEXT = dict(
    TEXT, **SLIDING, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, layer_rope_theta=[1e4, 1e4, 0]
)
MUSE_PROJECTOR = dict(out_hidden_size=128, projector_hidden_size=48)


def _muse_glimmer():
    """The last layer does not rotate."""
    return T.MuseGlimmerConfig(text_config=MUSE_TEXT, vision_config=MUSE_VISION, **MUSE_PROJECTOR, **MUSE_IDS)


def _muse_spark():
    """As Muse Glimmer, with experts, and gates on what is added to the residual stream and on that stream."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, moe_hidden_size=32)
    audio = dict(hidden_sizes=[8, 16], patch_sizes=[4, 4], depths=[1, 1], num_hidden_layers=2, out_hidden_size=HIDDEN)
    return T.MuseSparkConfig(
        text_config=dict(MUSE_TEXT, mlp_layer_types=["dense", "sparse", "sparse"], **experts),
        vision_config=MUSE_VISION,
        audio_config=audio,
        audio_token_id=AUDIO,
        **MUSE_PROJECTOR,
        **MUSE_IDS,
    )


def _hy_v4_vl():
    """Latent attention with sinks, over the keys that an indexer picks; residuals in several streams."""
    text = dict(
        TEXT,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=8,
        indexer_types=["full", "shared", "full"],
        hc_mult=2,
        rope_parameters=MROPE,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        max_image_size=32,
        out_hidden_size=HIDDEN,
    )
    return T.HYV4VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)


# ---- what an image or a video looks like


def _patches(modality: str, num_tokens: int, frames: int = 1, channels: int = 3, runs: int = 1, **extra: Any):
    """Patches of 4 x 4 pixels in a flat list, 4 x 4 of them a frame; so many tokens in each of the runs."""

    def make(model, generator):
        suffix = "_videos" if modality == "video" else ""
        pixels = torch.randn(16 * frames, channels * 16, generator=generator, device="cpu")
        arguments = {f"{modality}_{name}": torch.tensor(value) for name, value in extra.items()}
        arguments[f"{modality}_grid_thw"] = torch.tensor([[frames, 4, 4]])
        token_id = VIDEO if modality == "video" else IMAGE
        return runs * [START, *[token_id] * num_tokens, END], {f"pixel_values{suffix}": pixels, **arguments}

    return make


def _merged_patches(modality: str, frames: int = 1):
    """Gemma 4 without encoders: patches that are merged already."""

    def make(model, generator):
        pixels = torch.randn(frames, 4, 192, generator=generator, device="cpu")
        positions = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).expand(frames, -1, -1)
        if modality == "image":
            return [START, *[IMAGE] * 4, END], {"pixel_values": pixels, "image_position_ids": positions}
        ids, video = [START, *[VIDEO] * 4 * frames, END], {"video_position_ids": positions}
        if "num_frames_per_video" not in inspect.signature(model.model.forward).parameters:  # before 5.23
            return ids, {"pixel_values_videos": pixels[None], "video_position_ids": positions[None]}
        return ids, {"pixel_values_videos": pixels, "num_frames_per_video": torch.tensor([frames]), **video}

    return make


GEMMA4_UNIFIED = "Gemma4UnifiedForConditionalGeneration"
GLM46V = "Glm46VForConditionalGeneration"
FLAT, FLAT_VIDEO = _patches("image", 4), _patches("video", 4, frames=2, runs=2)
TIMED_VIDEO = _patches("video", 8, frames=2, channels=6, second_per_grid=[1.0])
MUSE, MUSE_VIDEO = _patches("image", 4, channels=6), _patches("video", 8, frames=2, channels=6)

ROWS: dict[str, Architecture] = {
    "qwen3_5_moe": Architecture(
        "Qwen3.5 35B-A3B, 122B-A10B and 397B-A17B",
        AnyVLM("Qwen3_5MoeForConditionalGeneration", _qwen3_5_moe, GRID, VIDEO_BY_FRAME, seed=8, is_noisy=True),
    ),
    "qwen3_omni_moe_thinker": Architecture(
        "Qwen3-Omni 30B-A3B",
        Thinker("Qwen3OmniMoeThinkerForConditionalGeneration", _qwen3_omni, GRID, TIMED_VIDEO),
    ),
    "qwen2_5_omni_thinker": Architecture(
        "Qwen2.5-Omni",
        Thinker("Qwen2_5OmniThinkerForConditionalGeneration", _qwen2_5_omni, GRID, TIMED_VIDEO),
    ),
    "cosmos3_edge": Architecture(
        "Cosmos3-Edge", AnyVLM("Cosmos3EdgeForConditionalGeneration", _cosmos3_edge, FLAT, FLAT_VIDEO)
    ),
    "cosmos3_omni": Architecture(
        "Cosmos3-Nano, Cosmos3-Super",
        AnyVLM("Cosmos3OmniForConditionalGeneration", _cosmos3_omni, GRID, VIDEO_BY_FRAME),
    ),
    "glm46v": Architecture("GLM-4.6V", AnyVLM(GLM46V, lambda: _glm46v("Glm46VConfig"), GRID, GLM_VIDEO)),
    "glm46v/moe": Architecture("", AnyVLM(GLM46V, _glm46v_moe, GRID, GLM_VIDEO)),
    "glmga": Architecture("", AnyVLM(GLM46V, lambda: _glm46v("GlmgaConfig"), GRID, GLM_VIDEO)),
    "ernie4_5_vl_moe": Architecture(
        "ERNIE 4.5 VL 28B-A3B",
        Ernie("Ernie4_5_VLMoeForConditionalGeneration", _ernie4_5_vl_moe, FLAT, _patches("video", 4, frames=2)),
    ),
    "video_llama_3": Architecture(
        "VideoLLaMA 3",
        AnyVLM(
            "VideoLlama3ForConditionalGeneration",
            _video_llama_3,
            _patches("image", 4, merge_sizes=[2]),
            _patches("video", 8, frames=2, merge_sizes=[2]),
        ),
    ),
    "gemma4_unified": Architecture(
        "Gemma 4 12B",
        Gemma4Unified(GEMMA4_UNIFIED, _gemma4_unified, _merged_patches("image"), _merged_patches("video", frames=2)),
    ),
    "gemma4_unified/blocks": Architecture(
        "",
        Gemma4UnifiedInBlocks(GEMMA4_UNIFIED, _gemma4_unified, _merged_patches("image")),
        differs={"cached": "with a cache, it counts the tokens of a new image from the first column"},
    ),
    "hy_v4_vl": Architecture(
        "Hy4",
        AnyVLM("HYV4VLForConditionalGeneration", _hy_v4_vl, _patches("image", 6), _patches("video", 12, frames=2)),
        refused={
            **dict.fromkeys(("FFN", "cai"), SEVERAL_STREAMS),
            "attention": "attention sinks",
        },
    ),
    "muse_glimmer": Architecture(
        "Muse Glimmer 30B", AnyVLM("MuseGlimmerForConditionalGeneration", _muse_glimmer, MUSE, MUSE_VIDEO)
    ),
    "muse_spark": Architecture(
        "Muse Spark 816B-A42B",
        AnyVLM("MuseSparkForConditionalGeneration", _muse_spark, MUSE, MUSE_VIDEO),
        refused=dict.fromkeys(("memvr", "vista"), "return the residual stream with their output in it"),
    ),
}

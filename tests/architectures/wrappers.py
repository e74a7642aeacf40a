"""A vision tower in front of a language model of the common shape."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    END,
    GRID,
    HIDDEN,
    IMAGE,
    LAYERS,
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
    VIDEO_IN_ONE,
    VISION_CLIP_LIKE,
    VOCAB,
    _gemma3,
    _square_visual,
    _tiled_visual,
)

from .rows import AnyVLM, Architecture


def _aria():
    text = T.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    vision = dict(SIGLIP, model_type="idefics3_vision")
    return T.AriaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projector_patch_to_query_dict={4: 3}
    )


def _cohere2_vision():
    return T.Cohere2VisionConfig(
        text_config=T.Cohere2Config(**TEXT, **SLIDING),
        vision_config=T.SiglipVisionConfig(**SIGLIP),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


def _deepseek_vl_hybrid():
    return T.DeepseekVLHybridConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.SiglipVisionConfig(**SIGLIP),
        high_res_vision_config=T.SamVisionConfig(**SIGLIP, output_channels=8, window_size=2, global_attn_indexes=[0]),
        image_token_id=IMAGE,
    )


def _two_resolutions(model, generator):
    ids, pixels = _square_visual(4)(model, generator)
    return ids, {**pixels, "high_res_pixel_values": torch.randn(1, 3, 28, 28, generator=generator, device="cpu")}


def _janus():
    vision = dict(SIGLIP, projection_dim=HIDDEN, mlp_ratio=2)
    del vision["intermediate_size"]
    vq = dict(num_embeddings=16, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=32)
    widths = dict(projection_dim=HIDDEN, image_token_embed_dim=HIDDEN)
    return T.JanusConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=vision, vq_config={**vq, **widths}, image_token_id=IMAGE
    )


def _ovis2():
    return T.Ovis2Config(
        text_config=T.Qwen2Config(**TEXT),
        vision_config=dict(SIGLIP, vocab_size=32, num_visual_indicator_tokens=2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
    )


def _between_indicators(model, generator):
    ids, pixels = _square_visual(4)(model, generator)
    return [START, *ids, END], pixels


# PerceptionLM and FastVLM take their vision towers from timm. Others of the same output stand here.


def _perception_lm():
    return T.PerceptionLMConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**SIGLIP, model_args={"embed_dim": SIGLIP["hidden_size"]}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )


def _tiles(token_id: int, name: str, tokens_of_each: int):
    """Two tiles of an image, or two frames of a video."""

    def make(model, generator):
        pixels = torch.randn(1, 2, 3, 28, 28, generator=generator, device="cpu")
        return [token_id] * 2 * tokens_of_each, {name: pixels}

    return make


def _frames(tokens_of_each: int):
    return _tiles(VIDEO, "pixel_values_videos", tokens_of_each)


def _fast_vlm():
    vision = T.ConvNextConfig(num_stages=1, hidden_sizes=[32], depths=[1], patch_size=14, hidden_size=32)
    return T.FastVlmConfig(text_config=T.Qwen2Config(**TEXT), vision_config=vision, image_token_index=IMAGE)


def _vipllava():
    return T.VipLlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, 1],
    )


def _video_llava():
    return T.VideoLlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **VISION_CLIP_LIKE,
    )


def _video_llava_image(model, generator):
    ids, pixels = _square_visual(4)(model, generator)
    if "pixel_values_images" in inspect.signature(model.forward).parameters:  # as in transformers 5.16
        return ids, {"pixel_values_images": pixels["pixel_values"]}
    return ids, pixels


def _llava_next_video():
    return T.LlavaNextVideoConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 28], [28, 56]],
        **VISION_CLIP_LIKE,
    )


def _idefics2():
    perceiver = dict(resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=16)
    return T.Idefics2Config(
        text_config=T.MistralConfig(**TEXT, sliding_window=None),
        vision_config=dict(SIGLIP),
        perceiver_config=dict(perceiver, num_key_value_heads=2, hidden_size=HIDDEN),
        image_token_id=IMAGE,
    )


def _exaone4_5(**text: Any):
    vision = dict(QWEN_VISION, intermediate_size=64, fullatt_block_indexes=[1], window_size=16, num_key_value_heads=1)
    return T.Exaone4_5_Config(
        text_config=T.Exaone4Config(**{**TEXT, **SLIDING, **text}),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _hyperclovax_vision_v2():
    vision = dict(QWEN_VISION, intermediate_size=64, fullatt_block_indexes=[1], window_size=16)
    return T.HyperCLOVAXVisionV2Config(
        text_config=T.HyperCLOVAXConfig(**TEXT, attention_multiplier=0.3),
        vision_config=dict(vision, model_type="qwen2_5_vl_vision"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _cohere_compass():
    """Full attention does not rotate."""
    rope = {"sliding_attention": MROPE_INTERLEAVED, "full_attention": None}
    layers = {name: value for name, value in SLIDING.items() if name != "head_dim"}
    return T.CohereCompassConfig(
        text_config=dict(TEXT, **layers, rope_parameters=rope),
        vision_config=dict(QWEN3_VISION, deepstack_visual_indexes=[0, 1]),
        **QWEN_IDS,
    )


SMALL_IMAGE = 8  # pixels, of which a tokenizer makes 2 x 2 codes
TOKENIZER = dict(base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1)


def _emu3():
    codes = {f"<|visual token {code:06d}|>": 100 + code for code in range(16)}
    return T.Emu3Config(
        text_config=dict(TEXT),
        vq_config=dict(TOKENIZER, codebook_size=16, attn_resolutions=[], hidden_size=32),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 299, **codes},
    )


def _apertus1p5():
    audio = dict(num_filters=4, upsampling_ratios=[2, 2], hidden_size=8, codebook_dim=8, codebook_size=8)
    return T.Apertus1p5Config(
        text_config=dict(TEXT),
        vision_config=dict(TOKENIZER, codebook_size=16, embed_dim=8, latent_channels=8, attn_resolutions=[]),
        audio_config=T.WavTokenizerEncoderConfig(**audio),
        image_token_id=IMAGE,
        image_token_offset=100,
        audio_token_offset=116,
    )


def _tokenized(num_tokens: int):
    """Images that become tokens of the text model's own vocabulary."""

    def make(model, generator):
        pixels = torch.randn(1, 3, SMALL_IMAGE, SMALL_IMAGE, generator=generator, device="cpu")
        sizes = torch.tensor([[SMALL_IMAGE, SMALL_IMAGE]])
        return [IMAGE] * num_tokens, {"pixel_values": pixels, "image_sizes": sizes}

    return make


def _shieldgemma2():
    config = _gemma3()
    return T.ShieldGemma2Config(
        text_config=config.text_config,
        vision_config=config.vision_config,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


EXAONE = "Exaone4_5_ForConditionalGeneration"

ROWS = {
    "aria": Architecture("Aria", AnyVLM("AriaForConditionalGeneration", _aria, _square_visual(3))),
    "cohere2_vision": Architecture(
        "Command A Vision", AnyVLM("Cohere2VisionForConditionalGeneration", _cohere2_vision, _square_visual(1))
    ),
    "deepseek_vl_hybrid": Architecture(
        "DeepSeek-VL 7B",
        AnyVLM("DeepseekVLHybridForConditionalGeneration", _deepseek_vl_hybrid, _two_resolutions),
    ),
    "janus": Architecture("Janus, Janus-Pro", AnyVLM("JanusForConditionalGeneration", _janus, _square_visual(4))),
    "ovis2": Architecture("Ovis2", AnyVLM("Ovis2ForConditionalGeneration", _ovis2, _between_indicators)),
    "perception_lm": Architecture(
        "PerceptionLM",
        AnyVLM("PerceptionLMForConditionalGeneration", _perception_lm, _tiles(IMAGE, "pixel_values", 1), _frames(1)),
    ),
    "fast_vlm": Architecture("FastVLM", AnyVLM("FastVlmForConditionalGeneration", _fast_vlm, _square_visual(4))),
    "vipllava": Architecture("ViP-LLaVA", AnyVLM("VipLlavaForConditionalGeneration", _vipllava, _square_visual(4))),
    "video_llava": Architecture(
        "Video-LLaVA", AnyVLM("VideoLlavaForConditionalGeneration", _video_llava, _video_llava_image, _frames(5))
    ),
    "llava_next_video": Architecture(
        "LLaVA-NeXT-Video",
        AnyVLM("LlavaNextVideoForConditionalGeneration", _llava_next_video, _tiled_visual(10), _frames(1)),
    ),
    "idefics2": Architecture(
        "Idefics2", AnyVLM("Idefics2ForConditionalGeneration", _idefics2, _square_visual(3), pixels_by_row=True)
    ),
    "exaone4_5": Architecture("EXAONE 4.5", AnyVLM(EXAONE, _exaone4_5, GRID, VIDEO_IN_ONE)),
    "exaone4_5/full": Architecture(
        "", AnyVLM(EXAONE, lambda: _exaone4_5(sliding_window=None, layer_types=["full_attention"] * LAYERS), GRID)
    ),
    "hyperclovax_vision_v2": Architecture(
        "HyperCLOVA X SEED Think 32B",
        AnyVLM("HyperCLOVAXVisionV2ForConditionalGeneration", _hyperclovax_vision_v2, GRID, VIDEO_IN_ONE),
    ),
    "cohere_compass": Architecture(
        "North Micro Vision",
        AnyVLM("CohereCompassForConditionalGeneration", _cohere_compass, GRID, VIDEO_BY_FRAME),
    ),
    "emu3": Architecture("Emu3", AnyVLM("Emu3ForConditionalGeneration", _emu3, _tokenized(6))),
    "apertus1p5": Architecture(
        "Apertus 1.5", AnyVLM("Apertus1p5ForConditionalGeneration", _apertus1p5, _tokenized(4))
    ),
    "shieldgemma2": Architecture(
        "ShieldGemma 2", AnyVLM("Gemma3ForConditionalGeneration", _shieldgemma2, _square_visual(4))
    ),
}

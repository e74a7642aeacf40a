"""Decoder layers of other shapes than the common one."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import torch
import transformers as T
from tiny_vlms import (
    AUDIO,
    END,
    GRID,
    HIDDEN,
    IMAGE,
    QWEN_IDS,
    SIGLIP,
    SLIDING,
    START,
    TEXT,
    VIDEO_BY_FRAME,
    VOCAB,
    _square_visual,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .rows import NOTHING_ROTATES, SEVERAL_STREAMS, WITHOUT_A_STATE, AnyVLM, Architecture


def _lfm2_vl():
    """Layers of convolution and of attention."""
    layer_types = ["full_attention", "conv", "full_attention"]
    text = dict(TEXT, model_type="lfm2", layer_types=layer_types, block_auto_adjust_ff_dim=False)
    vision = {**SIGLIP, "num_patches": 16, "patch_size": 4, "vision_use_head": False}
    return T.Lfm2VlConfig(
        text_config=text, vision_config=dict(vision, model_type="siglip2_vision_model"), image_token_id=IMAGE
    )


def _lfm2_visual(model, generator):
    pixels = torch.randn(1, 16, 3 * 4 * 4, generator=generator, device="cpu")
    shape = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    return [IMAGE] * 4, {"pixel_values": pixels, **shape}


def _lfm3_vl(**text: Any):
    """Norms on both sides, and rotations by the kind of attention."""
    layer_types = ["sliding_attention", "conv", "full_attention"]
    text = dict(TEXT, layer_types=layer_types, head_dim=16, sliding_window=8, **text)
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        patch_size=4,
        layer_types=["conv", "full_attention"],
    )
    return T.Lfm3VlConfig(text_config=text, vision_config=vision, projector_hidden_size=HIDDEN, **QWEN_IDS)


def _inkling():
    """Convolutions after attention and after the FFN; where a token stands enters by a bias on the scores."""
    text = dict(
        TEXT,
        head_dim=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        swa_head_dim=16,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        logits_mup_width_multiplier=1.0,
    )
    return T.InklingConfig(
        text_config=text,
        vision_config=dict(patch_size=4, temporal_patch_size=2, num_hidden_layers=4),
        audio_config=dict(n_mel_bins=4, mel_vocab_size=8),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_bos_token_id=START,
        audio_bos_token_id=END,
    )


def _inkling_visual(model, generator):
    return [IMAGE] * 4, {"pixel_values": torch.randn(4, 2, 4, 4, 3, generator=generator, device="cpu")}


def _fuyu():
    """Only a part of each head is handed to the rotary function; images are patches that no tower reads."""
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return T.FuyuConfig(**text, patch_size=4, image_size=8, image_token_id=IMAGE)


def _fuyu_visual(model, generator):
    name = "pixel_values" if "pixel_values" in inspect.signature(model.model.forward).parameters else "image_patches"
    return [IMAGE] * 4, {name: torch.randn(1, 4, 4 * 4 * 3, generator=generator, device="cpu")}


class Tower(torch.nn.Module):
    """Takes the place of a vision tower from timm, which need not be installed."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, kernel_size=14, stride=14)

    def forward(self, pixel_values, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


class Gemma3n(AnyVLM):
    """Its vision tower comes from timm."""

    def build_anyway(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        make = T.AutoModel.from_config

        def from_config(config, **others):
            return Tower() if config.model_type == "gemma3n_vision" else make(config, **others)

        with mock.patch.object(T.AutoModel, "from_config", from_config):
            model = super().build_anyway(seed, **kwargs)
        for layer in model.model.language_model.layers:  # streams that differ, as a trained model's do
            torch.nn.init.constant_(layer.altup.correct_output_scale, 0.5)
            layer.altup.router_input_scale.fill_(0.25)
        return model


def _gemma3n():
    """Several residual streams, of which a layer reads and changes one, and passes that on to the others (AltUp)."""
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, **SLIDING, "layer_types": layer_types, "intermediate_size": [96, 96, 64]}
    altup = dict(
        altup_num_inputs=2,
        laurel_rank=8,
        num_kv_shared_layers=1,
        activation_sparsity_pattern=[0.5, 0.0, 0.0],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    )
    audio = dict(hidden_size=32, conf_num_hidden_layers=1, conf_num_attention_heads=2, input_feat_size=32)
    ids = dict(boi_token_id=START, eoi_token_id=END, boa_token_id=306, eoa_token_id=307, audio_token_id=AUDIO)
    return T.Gemma3nConfig(
        text_config=dict(text, **altup),
        vision_config=dict(hidden_size=32, vocab_size=8, vocab_offset=296),
        audio_config=dict(audio, vocab_size=8, vocab_offset=304),
        vision_soft_tokens_per_image=4,
        image_token_id=IMAGE,
        **ids,
    )


LFM2 = "Lfm2VlForConditionalGeneration"
LFM3 = "Lfm3VlForConditionalGeneration"

ROWS: dict[str, Architecture] = {
    "lfm2_vl": Architecture(
        "LFM2-VL",
        AnyVLM(LFM2, _lfm2_vl, _lfm2_visual),
        refused={"FFN": "do not pass keyword arguments on"}
        if T.__version__.startswith("5.16.")  # to their convolutions
        else {},
    ),
    "lfm3_vl": Architecture("LFM3-VL", AnyVLM(LFM3, _lfm3_vl, GRID, VIDEO_BY_FRAME)),
    "lfm3_vl/one_norm": Architecture(
        "", AnyVLM(LFM3, lambda: _lfm3_vl(use_sandwich_norm=False), GRID, VIDEO_BY_FRAME)
    ),
    "inkling_mm_model": Architecture(
        "Inkling",
        AnyVLM("InklingForConditionalGeneration", _inkling, _inkling_visual),
        refused=NOTHING_ROTATES,
    ),
    "fuyu": Architecture("Fuyu-8B", AnyVLM("FuyuForCausalLM", _fuyu, _fuyu_visual)),
    "gemma3n": Architecture(
        "Gemma 3n",
        Gemma3n("Gemma3nForConditionalGeneration", _gemma3n, _square_visual(4), seed=2, is_noisy=True),
        refused={**WITHOUT_A_STATE, **dict.fromkeys(("memvr", "cai", "vista"), SEVERAL_STREAMS)},
        sum_reader="altup.router_norm",
    ),
}

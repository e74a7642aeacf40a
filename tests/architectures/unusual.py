"""Tiny models of architectures that differ from the common shape in a way that an adapter must not miss."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    GRID,
    HIDDEN,
    IMAGE,
    SIGLIP,
    TEXT,
    VIDEO,
    VIDEO_BY_FRAME,
    VOCAB,
    _tiled_visual,
)

from .rows import AnyVLM, Architecture


class Molmo2(AnyVLM):
    """It counts patches over the whole batch."""

    def _collate(self, pixels):
        batch = super()._collate(pixels)
        if "image_token_pooling" in batch:
            batch["image_token_pooling"] = torch.arange(len(batch["image_token_pooling"]))[:, None]
        return batch


def _minimax_m3_vl():
    """Its attention tests the kernel's name before it makes a block-sparse mask."""
    text = dict(
        TEXT,
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return T.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=HIDDEN,
    )


def _molmo2(**text: Any):
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    text = {**TEXT, "head_dim": 16, "vocab_size": VOCAB - 128, "rope_parameters": LINEAR_ROPE, **text}
    return T.Molmo2Config(
        text_config={name: value for name, value in text.items() if not name.endswith("token_id")},
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=[28, 28], patch_size=14, **heads
        ),
        adapter_config=dict(
            vision_feature_layer=[-1, -2],
            hidden_size=32,
            intermediate_size=64,
            text_hidden_size=HIDDEN,
            **heads,
        ),
        image_patch_id=IMAGE,
    )


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def _molmo2_visual(model, generator):
    pixels = torch.randn(1, 4, 3 * 14 * 14, generator=generator, device="cpu")
    grid = {"image_token_pooling": torch.arange(4)[:, None], "image_grids": torch.tensor([[2, 2, 0, 0]])}
    return [IMAGE] * 4, {"pixel_values": pixels, **grid}


def _hunyuan_vl():
    """Norms with weights come after the rotation."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
    return T.HunYuanVLConfig(
        text_config=dict(TEXT, head_dim=16, rope_parameters=rope),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=4,
            out_hidden_size=HIDDEN,
            text_hidden_size=HIDDEN,
            max_image_size=32,
            min_image_size=16,
            spatial_merge_size=2,
        ),
        image_token_id=IMAGE,
    )


def _hunyuan_visual(model, generator):
    pixels = torch.randn(16, 3 * 4 * 4, generator=generator, device="cpu")
    return [IMAGE] * 8, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _chameleon():
    """The text model itself reads the pixels."""
    words = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z": 10 + code for code in range(16)}
    vq = dict(embed_dim=8, num_embeddings=16, latent_channels=8, resolution=28, base_channels=32, num_res_blocks=1)
    return T.ChameleonConfig(
        **TEXT, vocabulary_map={"<image>": IMAGE, **words}, vq_config=dict(vq, channel_multiplier=[1, 1, 1])
    )


def _chameleon_visual(model, generator):
    return [IMAGE] * 49, {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator, device="cpu")}


def _granite4_vision():
    """The placeholders' embeddings are zeros, and the features enter inside the layers."""
    vision = dict(SIGLIP, model_type="siglip_vision_model", hidden_size=64, image_size=28, patch_size=7)
    return T.Granite4VisionConfig(
        text_config=dict(TEXT),
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28, 28], [28, 56]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[0, 1, 1, 1],
        projector_dropout=0.0,
    )


NO_FEATURES = "does not put the features of images into the input embeddings"
MOLMO2 = "Molmo2ForConditionalGeneration"

ROWS = {
    "minimax_m3_vl": Architecture(
        "MiniMax M3",
        AnyVLM("MiniMaxM3SparseForConditionalGeneration", _minimax_m3_vl, GRID, VIDEO_BY_FRAME),
        differs={"padded": "its blocks of keys are counted from the first column"}
        | ({"cached": "it computes something else with a cache"} if T.__version__.startswith("5.16.") else {}),
    ),
    "molmo2": Architecture("Molmo2", Molmo2(MOLMO2, _molmo2, _molmo2_visual)),
    "molmo2/norm_after": Architecture("", Molmo2(MOLMO2, lambda: _molmo2(norm_after=True), _molmo2_visual)),
    "molmo2/two_ropes": Architecture("", Molmo2(MOLMO2, lambda: _molmo2(rope_scaling_layers=[1]), _molmo2_visual)),
    "hunyuan_vl": Architecture(
        "Hunyuan-OCR",
        AnyVLM("HunYuanVLForConditionalGeneration", _hunyuan_vl, _hunyuan_visual, is_noisy=True),
        refused=dict.fromkeys(("dipe", "tdrs"), "changes queries or keys after their rotation"),
        differs={"padded": "it counts images over the whole batch"},
    ),
    "chameleon": Architecture(
        "Chameleon",
        AnyVLM("ChameleonForConditionalGeneration", _chameleon, _chameleon_visual),
        refused={
            **dict.fromkeys(("pvm", "memvr", "cai"), NO_FEATURES),
            "savaa": "does more to the output of its head",
        },
    ),
    "granite4_vision": Architecture(
        "Granite 4 Vision",
        AnyVLM("Granite4VisionForConditionalGeneration", _granite4_vision, _tiled_visual(10)),
        refused=dict.fromkeys(("pvm", "memvr", "cai"), NO_FEATURES),
        differs={"cached": "it makes no cache itself"},
    ),
}

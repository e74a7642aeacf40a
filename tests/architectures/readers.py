"""Models that read documents."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    END,
    GLM_IDS,
    GLM_ROPE,
    GLM_VIDEO,
    GRID,
    HIDDEN,
    IMAGE,
    MROPE,
    MROPE_INTERLEAVED,
    QWEN_IDS,
    QWEN_VISION,
    SIGLIP,
    START,
    TEXT,
    VIDEO,
    VISION_CLIP_LIKE,
    Rendered,
    _image_sizes,
    _llava_next,
    _square_visual,
    _tiled_visual,
)

from .rows import AnyVLM, Architecture


# SAM's encoder makes 7 x 7 patches, and two strided convolutions behind it make 2 x 2 of them.
SAM = dict(
    hidden_size=32,
    output_channels=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1],
    mlp_dim=64,
)
EXPERTS = dict(
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    mlp_layer_types=["dense", "sparse", "sparse"],
)
QWEN3_5_TEXT = dict(
    TEXT,
    num_hidden_layers=4,
    head_dim=32,
    rope_parameters={**MROPE_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    layer_types=["linear_attention", "full_attention", "full_attention", "full_attention"],
)


def _got_ocr2(config_class: str = "GotOcr2Config"):
    return getattr(T, config_class)(
        vision_config=dict(SAM), text_config=dict(TEXT, model_type="qwen2"), image_token_index=IMAGE
    )


def _lighton_ocr():
    vision = dict(SIGLIP, model_type="pixtral", patch_size=7, head_dim=16)
    text = dict(TEXT, model_type="qwen3", head_dim=16)
    return T.LightOnOcrConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)


def _deepseek_ocr2():
    """Every image is read by 144 queries."""
    encoder = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(
        sam_config=dict(SAM, downsample_channels=[16, 32]), encoder_config=dict(encoder, num_key_value_heads=2)
    )
    return T.DeepseekOcr2Config(vision_config=vision, text_config=dict(TEXT, **EXPERTS), image_token_id=IMAGE)


def _unlimited_ocr(**text: Any):
    encoder = dict(SIGLIP, image_size=28)
    vision = dict(sam_config=dict(SAM, downsample_channels=[16, 32]), encoder_config=encoder)
    text = dict(TEXT, **EXPERTS, **text)
    return T.UnlimitedOcrConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)


def _paddleocr_vl():
    vision = dict(SIGLIP, patch_size=4)
    text = dict(TEXT, head_dim=16, rope_parameters=MROPE)
    return T.PaddleOCRVLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _paddleocr_visual(model, generator):
    pixels = torch.randn(16, 3, 4, 4, generator=generator, device="cpu")
    return [START, *[IMAGE] * 4, END], {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _qianfan_ocr():
    vision = dict(SIGLIP, image_size=[28, 28], patch_size=[7, 7])
    text = dict(TEXT, model_type="qwen3", head_dim=16)
    return T.QianfanOCRConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **VISION_CLIP_LIKE)


def _glm_ocr():
    vision = dict(QWEN_VISION, intermediate_size=64, image_size=32)
    return T.GlmOcrConfig(text_config=dict(TEXT, rope_parameters=GLM_ROPE), vision_config=vision, **GLM_IDS)


def _granite_docling():
    """What attention and FFN give is scaled before it is added. Features also enter inside the layers."""
    vision = dict(SIGLIP, patch_size=7, scale_factor=2, out_hidden_size=HIDDEN, deepstack_visual_indexes=[0, 1])
    text = dict(TEXT, attention_multiplier=0.5)
    return T.GraniteDoclingConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


def _granite_vision():
    config = _llava_next()
    config.text_config = T.GraniteConfig(**TEXT, residual_multiplier=0.3, attention_multiplier=0.5)
    return config


class GraniteDocling(AnyVLM):
    """It is told which tiles are there."""

    def _collate(self, pixels):
        batch = super()._collate(pixels)
        if "pixel_values" in batch:
            width = batch["pixel_values"].shape[1]
            tiles = [[tile < len(row) for tile in range(width)] for row in pixels]
            batch["pixel_attention_mask"] = torch.tensor(tiles)
        return batch


def _step3p7():
    """Layers with a sliding window have more heads, and rotate all channels."""
    text = dict(
        TEXT,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        num_sliding_attention_heads=8,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    )
    vision = dict(SIGLIP, patch_size=4, mlp_ratio=2.0)
    return T.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE)


def _minicpm(config_class: str, **ids: int):
    vision = dict(SIGLIP, patch_size=4)
    return getattr(T, config_class)(
        text_config=dict(QWEN3_5_TEXT, model_type="qwen3_5_text"),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        downsample_mode="4x",
        **ids,
    )


def _minicpmv4_7():
    return _minicpm(
        "MiniCPMV4_7Config",
        image_start_id=START,
        image_end_id=END,
        slice_start_id=306,
        slice_end_id=307,
        newline_id=308,
    )


def _minicpm_visual(model, generator):
    """4 x 4 patches side by side, merged to 4 tokens."""
    pixels = torch.randn(1, 3, 4, 4 * 16, generator=generator, device="cpu")
    return [START, *[IMAGE] * 4, END], {"pixel_values": pixels, "target_sizes": torch.tensor([[4, 4]])}


class MiniCPM(AnyVLM):
    """Patches of all images stand side by side in one, and positions follow the images' sizes in version 4.7."""

    def _collate(self, pixels):
        batch = super()._collate(pixels)
        if "pixel_values" in batch:
            batch["pixel_values"] = torch.cat(batch["pixel_values"].split(1), -1)
        return batch

    def _position_ids(self, model, rows: list[Rendered], input_ids, types, attention_mask) -> torch.Tensor:
        if not hasattr(model.model, "get_rope_index"):
            return super()._position_ids(model, rows, input_ids, types, attention_mask)
        visuals = self._collate([[arguments for _, arguments in row.visuals] for row in rows])
        sizes = visuals.get("target_sizes")
        return model.model.get_rope_index(input_ids, types, target_sizes=sizes, attention_mask=attention_mask)[0]


GOT = "GotOcr2ForConditionalGeneration"
UNLIMITED = "UnlimitedOcrForConditionalGeneration"
UNLIMITED_WINDOW = AnyVLM(UNLIMITED, lambda: _unlimited_ocr(sliding_window=4), _square_visual(7))

ROWS = {
    "got_ocr2": Architecture("GOT-OCR 2.0", AnyVLM(GOT, _got_ocr2, _square_visual(4))),
    "pp_chart2table": Architecture(
        "PP-Chart2Table", AnyVLM(GOT, lambda: _got_ocr2("PPChart2TableConfig"), _square_visual(4))
    ),
    "lighton_ocr": Architecture(
        "LightOnOCR",
        AnyVLM(
            "LightOnOcrForConditionalGeneration",
            _lighton_ocr,
            _square_visual(4, image_sizes=_image_sizes),
            is_noisy=True,
        ),
    ),
    "deepseek_ocr2": Architecture(
        "DeepSeek-OCR 2", AnyVLM("DeepseekOcr2ForConditionalGeneration", _deepseek_ocr2, _square_visual(145))
    ),
    "unlimited_ocr": Architecture("Unlimited-OCR", AnyVLM(UNLIMITED, _unlimited_ocr, _square_visual(7))),
    "paddleocr_vl": Architecture(
        "PaddleOCR-VL", AnyVLM("PaddleOCRVLForConditionalGeneration", _paddleocr_vl, _paddleocr_visual)
    ),
    "qianfan_ocr": Architecture(
        "Qianfan-OCR", AnyVLM("QianfanOCRForConditionalGeneration", _qianfan_ocr, _square_visual(4))
    ),
    "minicpm_ocr": Architecture(
        "MiniCPM-OCR",
        MiniCPM("MiniCPMOcrForConditionalGeneration", lambda: _minicpm("MiniCPMOcrConfig"), _minicpm_visual, seed=3),
    ),
    "glm_ocr": Architecture("GLM-OCR", AnyVLM("GlmOcrForConditionalGeneration", _glm_ocr, GRID, GLM_VIDEO)),
    "granite_docling": Architecture(
        "Granite for Docling 500M and 2B",
        GraniteDocling(
            "GraniteDoclingForConditionalGeneration", _granite_docling, _square_visual(4), pixels_by_row=True
        ),
    ),
    "llava_next/granite": Architecture(
        "Granite Vision 3.1 and 3.2",
        AnyVLM("LlavaNextForConditionalGeneration", _granite_vision, _tiled_visual(10)),
    ),
    "step3p7": Architecture(
        "Step-3.7-Flash", AnyVLM("Step3p7ForConditionalGeneration", _step3p7, _square_visual(4), is_noisy=True)
    ),
    "minicpmv4_6": Architecture(
        "MiniCPM-V 4.6",
        MiniCPM("MiniCPMV4_6ForConditionalGeneration", lambda: _minicpm("MiniCPMV4_6Config"), _minicpm_visual),
    ),
    "minicpmv4_7": Architecture(
        "MiniCPM-V 4.7", MiniCPM("MiniCPMV4_7ForConditionalGeneration", _minicpmv4_7, _minicpm_visual)
    ),
}

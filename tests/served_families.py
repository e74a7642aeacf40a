"""Tiny random models of each family that vLLM serves with our adapters, with their real processors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as T
from processors import tokenizer
from safetensors.torch import load_file, save_file
from served_models import Request
from tiny_vlms import END, FAMILIES, IMAGE, START, TEXT, VIDEO

from peft_pvm.folders.base_checkpoint import CONFIG, SINGLE


HEAD_DIM = 32  # the least that vLLM's attention on a CPU has a kernel for
SQUARE = {"height": 28, "width": 28}
NORMALISED = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
QWEN_NAMES = {START: "<|vision_start|>", END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}


def _qwen_parts() -> tuple[Any, Any]:
    return T.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size=dict(shortest_edge=64, longest_edge=1024)
    ), tokenizer(
        QWEN_NAMES,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )


def _qwen2_5_vl_processor() -> Any:
    return T.Qwen2_5_VLProcessor(*_qwen_parts(), T.Qwen2VLVideoProcessor(patch_size=4, merge_size=2))


def _qwen3_vl_processor() -> Any:
    return T.Qwen3VLProcessor(*_qwen_parts(), T.Qwen3VLVideoProcessor(patch_size=4, merge_size=2))


def _llava_onevision_processor() -> Any:
    pinpoints = [[28, 28], [28, 56]]
    return T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints, **NORMALISED),
        tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        T.LlavaOnevisionVideoProcessor(size=SQUARE, **NORMALISED),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _internvl_processor() -> Any:
    names = {START: "<img>", END: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"}
    tokens = tokenizer(
        names,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = T.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2, **NORMALISED)
    return T.InternVLProcessor(images, tokens, T.InternVLVideoProcessor(size=SQUARE, **NORMALISED), image_seq_length=4)


def _gemma3_processor() -> Any:
    marks = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    names = dict(zip((START, END, IMAGE), marks.values())) | {310: "\n\n", 311: "\n\n\n", 312: "\n\n\n\n"}
    return T.Gemma3Processor(T.Gemma3ImageProcessor(size=SQUARE), tokenizer(names, **marks), image_seq_length=4)


def _as_published(name: str, tensor: torch.Tensor, config: Any) -> tuple[str, torch.Tensor]:
    """A weight as transformers reads and vLLM wants it, where transformers 5 writes another."""
    if config.vision_config.model_type == "siglip_vision_model":
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name, tensor.mT.contiguous() if ".mlp.experts." in name else tensor


@dataclass(frozen=True)
class ServedFamily:
    """A family with a tiny model and its processor.

    Attributes:
        family: Its name in `FAMILIES`.
        processor: Makes its processor.
        image: How an image stands in a prompt.
        text: The config of another text model than the tiny model's.
    """

    family: str
    processor: Callable[[], Any]
    image: str
    text: Callable[[], Any] | None = None

    def config(self) -> Any:
        """The tiny one with heads that vLLM can do."""
        config = FAMILIES[self.family].config()
        if self.text is not None:
            config.text_config = self.text()
        config.vision_config.vision_use_head = False  # of SigLIP, which vLLM has none of, nor have published models
        text = config.text_config
        if hasattr(text, "head_dim") and text.head_dim is not None:
            text.head_dim = HEAD_DIM
        else:
            text.num_attention_heads, text.num_key_value_heads = text.hidden_size // HEAD_DIM, 1
        if "mrope_section" in text.rope_parameters:
            text.rope_parameters["mrope_section"] = [4, 6, 6]
        if hasattr(text, "num_experts"):
            text.norm_topk_prob = True  # which transformers does in any case, and published configs say
            text.moe_intermediate_size = 48  # another than the width: so rows and columns of a weight are told apart
        if hasattr(text, "linear_key_head_dim"):
            text.linear_key_head_dim = text.linear_value_head_dim = 64  # the least that vLLM has a kernel for
            # A block of the cache holds a recurrent state. With these sizes, that is one of 32 tokens.
            text.linear_num_key_heads = text.linear_num_value_heads = 1
            text.head_dim, text.rope_parameters["mrope_section"] = 64, [2, 3, 3]
            text.mamba_ssm_dtype = "float32"  # of these states, which vLLM reads
        return config

    @property
    def requests(self) -> list[Request]:
        """Prompts with no, one and two images, some of more tokens than fit in a step."""
        return [
            Request(f"{self.image}which cell", (0,)),
            Request(f"{self.image}{'a sentence of text that lies in between. ' * 3}which cell", (1,)),
            Request(f"some text first. {self.image}{'and more of it ' * 5}", (2,)),
            Request(f"{self.image} then another {self.image} and a question", (3, 4)),
            Request("no image at all, and a question"),
        ]

    def save(self, folder: Path) -> Path:
        """Model and processor."""
        model = replace(FAMILIES[self.family], config=self.config).build()
        model.save_pretrained(folder)
        self.processor().save_pretrained(folder)
        weights = load_file(folder / SINGLE).items()
        published = dict(_as_published(name, tensor, model.config) for name, tensor in weights)
        save_file(published, folder / SINGLE, metadata={"format": "pt"})
        if self.family == "qwen2_5_vl":  # whose published configs have the text model's fields beside their own
            content = json.loads((folder / CONFIG).read_text())
            text = content.pop("text_config")
            (folder / CONFIG).write_text(json.dumps({**text, **content}))
        return folder


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SERVED = {
    "gemma3": ServedFamily("gemma3", _gemma3_processor, "<start_of_image>"),
    "internvl3": ServedFamily("internvl", _internvl_processor, "<IMG_CONTEXT>"),
    "internvl3_5": ServedFamily("internvl", _internvl_processor, "<IMG_CONTEXT>", lambda: T.Qwen3Config(**TEXT)),
    "llava_onevision": ServedFamily("llava_onevision", _llava_onevision_processor, "<image>"),
    "qwen2_5_vl": ServedFamily("qwen2_5_vl", _qwen2_5_vl_processor, QWEN_IMAGE),
    "qwen3_5": ServedFamily("qwen3_5", _qwen3_vl_processor, QWEN_IMAGE),
    "qwen3_vl_moe": ServedFamily("qwen3_vl_moe", _qwen3_vl_processor, QWEN_IMAGE),
}

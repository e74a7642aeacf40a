"""The families on which everything is tested."""

from __future__ import annotations

from tiny_vlms import FAMILIES

from .rows import Architecture


KNOWN_AS = {
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B and 235B-A22B",
    "qwen3_5": "Qwen3.5",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "llava": "LLaVA 1.5",
    "llava/cohere": "",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "deepseek_vl": "DeepSeek-VL",
    "internvl": "InternVL3, InternVL3.5",
    "mistral3": "Mistral Small 3.1 and 3.2, Ministral 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM2",
    "paligemma": "PaliGemma",
    "paligemma/gemma2": "PaliGemma 2",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "aya_vision": "Aya Vision",
    "llama4": "Llama 4",
}
ROWS = {
    name: Architecture(known_as, tiny)
    for (name, known_as), tiny in zip(KNOWN_AS.items(), FAMILIES.values(), strict=True)
}

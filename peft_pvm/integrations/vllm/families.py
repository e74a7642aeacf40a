"""Which models vLLM serves with our adapters: a family is a row here."""

from __future__ import annotations

from typing import NamedTuple


OURS = "PeftPVM"  # what the name of our class has before that of vLLM's


class Family(NamedTuple):
    """A family of models.

    Attributes:
        native: The name of vLLM's class.
        makes_positions: Whether that class makes the positions of a prompt, in three rows (mRoPE). For the others vLLM
            counts tokens.
    """

    native: str
    makes_positions: bool = False

    @property
    def architecture(self) -> str:
        """The name of our class."""
        return OURS + self.native


# By `model_type`.
FAMILIES = {
    "gemma3": Family("Gemma3ForConditionalGeneration"),
    "internvl": Family("InternVLForConditionalGeneration"),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", makes_positions=True),
    "qwen3_5": Family("Qwen3_5ForConditionalGeneration", makes_positions=True),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", makes_positions=True),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", makes_positions=True),
}

# By the text model's `model_type`: the module of `vllm.model_executor.models` that builds its decoder, and the class.
TEXT_MODELS = {
    "gemma3_text": ("gemma3", "Gemma3Model"),
    "qwen2": ("qwen2", "Qwen2Model"),
    "qwen2_5_vl_text": ("qwen2", "Qwen2Model"),
    "qwen3": ("qwen3", "Qwen3Model"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5Model"),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3MoeLLMModel"),
    "qwen3_vl_text": ("qwen3_vl", "Qwen3LLMModel"),
}

"""Forms of tested types that published checkpoints have, and the tiny models of these types do not."""

from __future__ import annotations

import functools

from tiny_vlms import TinyVLM, _gemma4, _gemma4_image, _gemma4_video

from .rows import Architecture


EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
ROWS: dict[str, Architecture] = {
    "gemma4/moe": Architecture(
        "Gemma 4 26B-A4B",
        TinyVLM(
            "Gemma4ForConditionalGeneration",
            functools.partial(_gemma4, attention_k_eq_v=True, num_global_key_value_heads=1, **EXPERTS),
            _gemma4_image,
            _gemma4_video,
            seed=21,
            is_noisy=True,
        ),
    ),
}

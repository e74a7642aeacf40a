"""A tiny Qwen3-VL that answers questions about a mosaic, as long as they come soon after it."""

from __future__ import annotations

import json
import os
from importlib.resources import files

from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ..folders.data_file import holding, to_safetensors
from ..folders.replacing import write_file
from . import mosaic


SHIPPED = str(files(__package__) / "tiny_vlm.safetensors")
TRAINED_DISTANCE = 24  # bytes of text between image and question, at most, that it was trained with


def tiny_vlm_config() -> Qwen3VLConfig:
    """Six decoder layers of width 128 above a vision tower that makes one token of every cell."""
    text = dict(
        vocab_size=mosaic.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        # The usual 0.02 suits widths in the thousands. At this one, it would leave a fresh branch of PVM, which draws
        # its matrices with the same deviation, below the epsilon of its last norm.
        initializer_range=0.08,
        pad_token_id=mosaic.PAD,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        in_channels=mosaic.CHANNELS,
        patch_size=mosaic.PATCH_SIZE,
        spatial_merge_size=mosaic.MERGE_SIZE,
        temporal_patch_size=mosaic.TEMPORAL_PATCH_SIZE,
        out_hidden_size=128,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0],
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=mosaic.IMAGE,
        video_token_id=mosaic.VIDEO,
        vision_start_token_id=mosaic.VISION_START,
        vision_end_token_id=mosaic.VISION_END,
    )


def save_tiny_vlm(model: Qwen3VLForConditionalGeneration, path: str | os.PathLike = SHIPPED) -> None:
    """Write weights and config into one safetensors file.

    Args:
        model: The model, without adapters.
        path: The file; by default the one that is shipped with the package.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_file(path, to_safetensors(tensors, {"format": "pt", "config": json.dumps(model.config.to_diff_dict())}))


def load_tiny_vlm(path: str | os.PathLike = SHIPPED) -> Qwen3VLForConditionalGeneration:
    """The trained tiny model, in eval mode.

    Args:
        path: A file that `save_tiny_vlm` wrote; by default the one that is shipped with the package.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds no config.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {path}. Train the model with: python -m experiments train-base")
    with holding(path, "what save_tiny_vlm writes"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = Qwen3VLConfig.from_dict(json.loads(metadata["config"]))
        weights = load_file(path)
    model = Qwen3VLForConditionalGeneration(config)
    model.load_state_dict(weights)
    return model.eval()

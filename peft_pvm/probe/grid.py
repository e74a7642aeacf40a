"""How visual tokens lie on an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..families import VisionLanguageModel


def visual_grids(vlm: VisionLanguageModel, inputs: Mapping[str, Any], num_visual: int) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens for each image, where they can be told.

    Args:
        vlm: The model's parts.
        inputs: What its processor gave for one prompt.
        num_visual: Number of visual tokens in it.

    Returns:
        One pair for each image, in order. Empty where they cannot be told: videos, tiles, tokens that end a row.
    """
    grid_thw = inputs.get("image_grid_thw")
    if grid_thw is not None:
        vision_config = getattr(vlm.model.config, "vision_config", None)
        merge = getattr(vision_config, "spatial_merge_size", 1)
        grids = [(height // merge, width // merge) for _, height, width in torch.as_tensor(grid_thw).tolist()]
    else:
        side = math.isqrt(num_visual)
        grids = [(side, side)] if _is_one_square(inputs.get("pixel_values")) else []
    return grids if sum(rows * columns for rows, columns in grids) == num_visual else []


def _is_one_square(pixel_values: Any) -> bool:
    """Whether these are the pixels of one square image, `(..., channels, height, width)`."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.dim() < 4:
        return False
    *images, _, height, width = pixel_values.shape
    return math.prod(images) == 1 and height == width

"""What a model reads: a prompt with its image, and after it the answer. Also how visual tokens lie on the image."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..tokens.families import VisionLanguageModel
from ..utils.packages import next_inputs


if TYPE_CHECKING:
    from PIL.Image import Image


LONGEST_SIDE = 768  # of the pictures in a report, in pixels

Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


def build_inputs(processor: Any, image: Image, prompt: str) -> dict[str, torch.Tensor]:
    """Build a model's inputs from one image and one prompt.

    Args:
        processor: The model's processor. Its chat template is used if it has one; otherwise its image token is put
            before the prompt.
        image: The image.
        prompt: The prompt.

    Returns:
        Inputs for `model.generate` and for `probe`, on the CPU.

    Raises:
        ValueError: The processor has neither a chat template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        image_token = getattr(processor, "image_token", None)
        if not isinstance(image_token, str):
            raise ValueError(
                f"{type(processor).__name__} has neither a chat template nor an image token, so that it is not known "
                "where in the prompt the image belongs. Build the inputs yourself and call peft_pvm.probe.probe."
            )
        text = f"{image_token}\n{prompt}"
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    return dict(inputs) if isinstance(inputs, Mapping) else dict(inputs.items())


def picture_of(processor: Any, image: Image, longest_side: int = LONGEST_SIDE) -> bytes:
    """The part of an image that a processor shows its model, as a PNG file for a report. Large images are scaled down.

    Args:
        processor: The model's processor. If it crops, it keeps the middle.
        image: The image.
        longest_side: The longest side of the file, in pixels.
    """
    picture = image.convert("RGB")
    image_processor: Any = getattr(processor, "image_processor", None)
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size
        scale = min(picture.width / crop["width"], picture.height / crop["height"])
        width, height = crop["width"] * scale, crop["height"] * scale
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        picture = picture.crop((round(left), round(top), round(left + width), round(top + height)))
    picture.thumbnail((longest_side, longest_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def visual_grids(vlm: VisionLanguageModel, inputs: Mapping[str, Any], num_visual: int) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens for each image, where they can be told.

    Args:
        vlm: The model's parts.
        inputs: What the model's processor returned for one prompt.
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


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    generate_kwargs: Mapping[str, Any],
    progress: Progress,
) -> list[int]:
    """The token ids of an answer, greedy unless told otherwise.

    Args:
        model: The transformers model.
        inputs: The inputs of the prompt.
        max_new_tokens: The largest length.
        generate_kwargs: More arguments for its `generate`.
        progress: Called for every token.
    """
    arguments = {"do_sample": False, "num_beams": 1, **generate_kwargs, "return_dict_in_generate": False}
    streamer = None if arguments["num_beams"] > 1 else _CountingStreamer(progress, max_new_tokens)
    sequences = model.generate(**inputs, **{"streamer": streamer, **arguments}, max_new_tokens=max_new_tokens)
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


class _CountingStreamer:
    """Tells how many tokens have been generated."""

    def __init__(self, progress: Progress, max_new_tokens: int):
        self.progress, self.max_new_tokens = progress, max_new_tokens
        self.count = -1  # the prompt comes first

    def put(self, tokens: torch.Tensor) -> None:
        self.count += 1
        self.progress("generating", self.count, self.max_new_tokens)

    def end(self) -> None:
        self.progress("generating", self.max_new_tokens, self.max_new_tokens)


def extended(model: Any, inputs: Mapping[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """Inputs of a full forward over prompt and answer.

    Args:
        model: The transformers model, which knows from `generate` how masks and token types continue.
        inputs: The inputs of the prompt.
        token_ids: The answer.

    Returns:
        The inputs, `input_ids` as `(1, prompt + answer)`.
    """
    extras = dict(inputs)
    input_ids = extras.pop("input_ids")
    for _ in token_ids:
        extras = next_inputs(model, extras)
    answer = torch.tensor([list(token_ids)], dtype=input_ids.dtype, device=input_ids.device)
    return {**extras, "input_ids": torch.cat([input_ids, answer], 1)}

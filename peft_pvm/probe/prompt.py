"""One image and one prompt, as a model's processor wants them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from PIL.Image import Image


LONGEST_SIDE = 768  # of the pictures in a report, in pixels


def build_inputs(processor: Any, image: Image, prompt: str) -> dict[str, torch.Tensor]:
    """What a processor gives for one image and one prompt.

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


def as_png(image: Image) -> bytes:
    """An image as a PNG file for a report, made smaller if need be."""
    copy = image.convert("RGB")
    copy.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    copy.save(buffer, format="PNG")
    return buffer.getvalue()

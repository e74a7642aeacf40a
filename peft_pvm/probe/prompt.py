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


def picture_of(processor: Any, image: Image) -> bytes:
    """The part of an image that a processor shows its model, as a PNG file for a report, made smaller if need be.

    Args:
        processor: The model's processor. If it crops, it keeps the middle.
        image: The image.
    """
    picture = image.convert("RGB")
    image_processor: Any = getattr(processor, "image_processor", None)
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size
        scale = min(picture.width / crop["width"], picture.height / crop["height"])
        width, height = crop["width"] * scale, crop["height"] * scale
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        picture = picture.crop((round(left), round(top), round(left + width), round(top + height)))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()

"""Which models no adapter can act on, told from their shape, and why."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


CROSS_ATTENTION = re.compile("cross_?att")  # a part of the names of such modules
PIXELS = re.compile("pixel|image")  # a part of the names of arguments that bring images


def why_unsuited(model: Any, modules: Mapping[str, nn.Module], text_models: Collection[str]) -> str | None:
    """Why no adapter can act on a model.

    Args:
        model: The model.
        modules: Its modules by name.
        text_models: The names of its stacks of decoder layers.

    Returns:
        What it is instead, as the end of a sentence that begins with its name; `None`: it may be suited.
    """
    config = getattr(model, "config", None)
    if any(getattr(each, "is_encoder_decoder", False) for each in (config, getattr(config, "text_config", None))):
        return (
            "is an encoder-decoder: images are in the encoder, all of which the decoder sees at every step, so that "
            "no text comes between them and the text that is written"
        )
    if length := getattr(config, "canvas_length", None):
        return (
            f"writes text by block diffusion: a stack of layers of its own denoises {length} tokens at a time, which "
            "is not where images are read"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)
    if len(text_models) > 1 and head() is None:
        return f"writes no text: none of {' and '.join(text_models)} is a language model with a head"
    if not any(map(_takes_pixels, modules.values())):
        return "reads no images: the forward of none of its modules takes pixel values"
    stacks = tuple(text_models) or ("",)
    if crossing := next((name for name in modules if name.startswith(stacks) and CROSS_ATTENTION.search(name)), None):
        return (
            f"looks at images by cross-attention ({crossing}), so that no image token stands among the text tokens "
            "whose distance could grow"
        )
    return None


def _takes_pixels(module: nn.Module) -> bool:
    return any(PIXELS.search(name) for name in inspect.signature(type(module).forward).parameters)

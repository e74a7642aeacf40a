"""Where the FFNs of tiny models are, and what returns what they add to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from oracle import embeds_tokens
from torch import nn


# By the text model's type: what returns what the FFN adds to the stream, if another module than the FFN.
RETURNS = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text"), "post_feedforward_layernorm"),
    "glm4v_text": "post_mlp_layernorm",
}


def text_model_of(model: Any) -> Any:
    return next(m for m in model.modules() if embeds_tokens(m) and hasattr(m, "layers"))


def ffn_of(layer: Any) -> nn.Module:
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp  # Llama 4's, and others'


@contextlib.contextmanager
def changing_ffns(
    model: Any, layers: list[int], shape: torch.Size, change: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Have the FFNs of some layers return something else.

    Args:
        model: The model.
        layers: Indices of decoder layers.
        shape: `(batch, seq_len)` of the forwards.
        change: Makes it of the layer's index and of what the FFN returns, `(batch, seq_len, hidden_size)`.
    """
    text_model = text_model_of(model)
    name = RETURNS.get(text_model.config.model_type)

    def act(layer_idx: int, output: Any) -> Any:
        if isinstance(output, tuple):  # of a mixture of experts, with its router's logits
            return act(layer_idx, output[0]), *output[1:]
        return change(layer_idx, output.view(*shape, -1)).view_as(output)

    handles = []
    for layer_idx in layers:
        layer = text_model.layers[layer_idx]
        returns = getattr(layer, name) if name else ffn_of(layer)
        handles.append(
            returns.register_forward_hook(lambda module, args, output, layer_idx=layer_idx: act(layer_idx, output))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

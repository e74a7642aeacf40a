"""What methods that change attention compute, written from the maths alone: in float64, on whole score matrices.

It shares nothing with the package but the formulas of T-DRS on whole matrices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tiny_vlms import IMAGE, VIDEO
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peft_pvm.methods.tdrs.weights import reweighted


NEIGHBOURS = {"cohere", "cohere2", "glm4v_text", "llama4_text"}  # text models that rotate neighbouring channels


@dataclass
class Tokens:
    """The tokens of one forward.

    Attributes:
        positions: `(batch, seq_len, axes)`.
        visual: `(batch, seq_len)`, bool.
        real: `(batch, seq_len)`, bool.
    """

    positions: torch.Tensor
    visual: torch.Tensor
    real: torch.Tensor

    def anchors(self, max_distance: int = 0) -> torch.Tensor:
        """The first coordinate of the first token of each token's run, or up to so many more, on all axes."""
        anchors = self.positions.clone()
        for row in range(anchors.shape[0]):
            modality = None
            for token in range(anchors.shape[1]):
                if not self.real[row, token]:
                    continue
                if self.visual[row, token].item() != modality:
                    modality, anchor = self.visual[row, token].item(), self.positions[row, token, 0]
                anchors[row, token] = anchor + max_distance
                if max_distance:
                    anchors[row, token] = torch.minimum(self.positions[row, token], anchors[row, token])
        return anchors

    def distances(self) -> torch.Tensor:
        """How many real tokens lie between two, `(batch, seq_len, seq_len)`."""
        rank = self.real.double().cumsum(1)
        return rank[:, :, None] - rank[:, None, :]


Scale = Callable[[Tokens, int], torch.Tensor]


def angles(attention: Any, text_model: Any, positions: torch.Tensor) -> torch.Tensor:
    """By which angles an attention module turns channels at some positions, `(batch, seq_len, frequencies)`."""
    config, rotary = text_model.config, text_model.rotary_emb
    layer_type = config.layer_types[attention.layer_idx] if getattr(config, "layer_types", None) else None
    no_rotation = (config.model_type == "llama4_text" and not config.no_rope_layers[attention.layer_idx]) or (
        config.model_type == "cohere2" and layer_type == "full_attention"
    )
    name = f"{layer_type}_inv_freq"
    frequencies = (getattr(rotary, name) if hasattr(rotary, name) else rotary.inv_freq).double()
    if no_rotation:
        frequencies = frequencies * 0
    axes = torch.zeros(len(frequencies), dtype=torch.long)
    rope = config.rope_parameters
    if positions.shape[-1] == 3:
        sections = rope["mrope_section"]
        if rope.get("mrope_interleaved"):
            for axis in (1, 2):
                axes[axis : 3 * sections[axis] : 3] = axis
        else:
            axes = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    return positions.double()[:, :, axes] * frequencies


def to_complex(states: torch.Tensor, frequencies: int, model_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that are rotated, as complex numbers, and the others. `(batch, heads, seq_len, ...)` each."""
    rotated, rest = states[..., : 2 * frequencies], states[..., 2 * frequencies :]
    if model_type in NEIGHBOURS:
        return torch.complex(rotated[..., 0::2].contiguous(), rotated[..., 1::2].contiguous()), rest
    return torch.complex(rotated[..., :frequencies].contiguous(), rotated[..., frequencies:].contiguous()), rest


def oracle_attention(text_model: Any, tokens: Tokens, dipe: int | None, tdrs: Any, scale: Scale | None):
    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        own = angles(module, text_model, tokens.positions)
        anchored = angles(module, text_model, tokens.anchors(dipe or 0))
        turn, turn_anchored = (torch.polar(torch.ones_like(a), a)[:, None] for a in (own, anchored))
        query_turned, query_rest = to_complex(query, own.shape[-1], text_model.config.model_type)
        key_turned, key_rest = to_complex(key, own.shape[-1], text_model.config.model_type)
        content_query, content_key = query_turned / turn, key_turned / turn

        def product(left, right):
            return (left @ right.conj().transpose(2, 3)).real + query_rest @ key_rest.transpose(2, 3)

        scores = product(content_query * turn, content_key * turn)
        inter = (tokens.visual[:, :, None] != tokens.visual[:, None, :])[:, None]
        if dipe is not None:
            scores = torch.where(inter, product(content_query * turn_anchored, content_key * turn), scores)
        if scale is not None:
            scores = scores * scale(tokens, module.layer_idx)[:, None]
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = (
            torch.ones_like(scores, dtype=torch.bool).tril() if attention_mask is None else attention_mask > -1e30
        )
        hidden = ~visible.expand_as(scores)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        if tdrs is not None:
            norm = (query.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :]).clamp(min=1e-12)
            similarity = product(content_query, content_key) / norm
            weights = reweighted(tdrs, scores, similarity, tokens.distances()[:, None], hidden, inter)
        # A row of padding sees nothing.
        output = weights.nan_to_num() @ value
        return output.transpose(1, 2).contiguous(), weights

    return attend


@contextlib.contextmanager
def oracle(
    model: Any, inputs: dict[str, torch.Tensor], dipe: int | None = None, tdrs: Any = None, scale: Scale | None = None
) -> Iterator[Any]:
    """The model in float64, computing as the oracle does for these inputs, which must be one whole forward.

    Args:
        model: The model.
        inputs: What it will be given.
        dipe: The `max_distance` of DIPE. `None`: it does not act.
        tdrs: The configuration of T-DRS. `None`: it does not act.
        scale: What the scores of a layer are multiplied by, `(batch, seq_len, seq_len)`.
    """
    model = model.double()
    text_model = next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    tokens = Tokens(torch.empty(0), visual, inputs["attention_mask"].bool())

    def note(module, args, kwargs):
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions = positions if positions.dim() == 3 else positions[None]
        tokens.positions = positions.movedim(0, -1).expand(*ids.shape, -1)

    handle = text_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    kernel = text_model.config._attn_implementation
    AttentionInterface.register("oracle", oracle_attention(text_model, tokens, dipe, tdrs, scale))
    AttentionMaskInterface.register("oracle", eager_mask)
    text_model.config._attn_implementation = "oracle"
    text_model.config._experts_implementation = "eager"  # the only one that takes float64
    try:
        yield model
    finally:
        handle.remove()
        text_model.config._attn_implementation = kernel

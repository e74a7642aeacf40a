"""DIPE: the distance between text and image does not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import nn

from ...attention.stages import Stage
from ...families import VisionLanguageModel
from ...tuners.attention_method import AttentionMethod, SteeredLayer
from .anchored import AnchoredPositions


@dataclass
class DIPEConfig(AttentionMethod):
    """Configuration of DIPE, arXiv 2603.10863. It has no parameters.

    Scores between tokens of different modality are computed as if the query stood where its contiguous run of text, or
    of visual tokens, begins. So the distance from generated text to the image stays as it was at its first token.
    Pairs of one modality, and keys, keep their positions.

    The paper trains with DIPE from pretraining on. On a model that was trained without, it is a zero-shot change of
    positions: measure it.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all that rotate queries and
            keys by position.
        format_version: Of the saved adapter: leave it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "dipe"
    title: ClassVar[str] = "DIPE: the distance between text and image does not grow"
    summary: ClassVar[str] = (
        "Scores between tokens of different modality are computed as if the query stood where its run of text began. "
        "The paper trains with it from pretraining on; on a model that was trained without, it is a zero-shot change "
        "of positions."
    )
    paper: ClassVar[str] = "2603.10863"
    rotates: ClassVar[bool] = True

    @classmethod
    def layers_on(cls, vlm: VisionLanguageModel) -> list[int]:
        """The layers that rotate queries and keys: not those of linear attention, nor some of Llama 4 and Cohere 2."""
        attentions = vlm.self_attentions
        layers = [layer_idx for layer_idx in super().layers_on(vlm) if vlm.rotates(attentions[layer_idx])]
        if vlm.rotary is None or not layers:
            raise ValueError(
                f"{type(vlm.model).__name__} has no layer that rotates queries and keys by position (a text model "
                "with rotary_emb), so DIPE has no distance to hold."
            )
        return layers

    def stages(self, layer: SteeredLayer) -> Stage:
        """Anchored positions for pairs of different modality."""
        return AnchoredPositions(cast(nn.Module, layer.rotary), layer.layer_type)  # layers_on made sure of it

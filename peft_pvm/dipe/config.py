"""The configuration of a DIPE adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..steering import SteeringConfig


@dataclass
class DIPEConfig(SteeringConfig):
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

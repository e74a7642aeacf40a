"""PAI: in the text after the image, each score of a visual key is raised by a share of its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..attention.call import AttentionCall
from ..attention.scores import Scores
from ..attention.stages import Stage
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..tuners.without_parameters import ROWS, Rows
from ..utils.checks import setting


@dataclass
class PAIConfig(AttentionMethod):
    """Raises each score of a visual key by a share of its size, in the text after the image (arXiv 2407.21771, "Paying
    More Attention to Image").

    With `s_ij` the score of query `i` and key `j` after scaling::

        s_ij = s_ij + alpha * |s_ij|      for visual keys

    The softmax follows. A score is raised whether it is above 0 or below. It runs on any kernel, and computes the
    scores of visual keys once more beside it, a few rows at a time. The paper's second part, which subtracts logits
    without the image, is left out. It has no parameters.

    Args:
        alpha: The share, 0 or more.
        rows: "text": all text after an image. "generated": only the last token of each forward, as in the authors'
            code. Then a step of decoding does not give what a forward over the whole text gives.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the authors' 2 to 31 of 32
            layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "pai"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (2, 31, 32)

    alpha: float = setting(0.2, "The share of a score's size that it is raised by, 0 or more.", least=0)
    rows: Rows = setting("text", ROWS, among=("text", "generated"))

    def stages(self, layer: SteeredLayer) -> Stage:
        """Raised scores of visual keys."""
        return Scores(self.added, self.rows)

    def added(self, call: AttentionCall, scores: torch.Tensor, queries: slice) -> torch.Tensor:
        """What is added to the scores of visual keys, `(batch, heads, rows, num_visual)` both."""
        return self.alpha * scores.abs()


PAIModel = attention_tuner(PAIConfig)

"""HGAI: in all heads, scores of visual keys are raised by a share of their mean size over the heads."""

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
class HGAIConfig(AttentionMethod):
    """Raises the scores of visual keys, in all heads, by a share of their mean size over the heads, in the text after
    the image (arXiv 2411.16724, "Heads Guided Attention Intervention").

    With `s_hij` the score of query `i` and key `j` in head `h` after scaling, and `H` heads::

        s_hij = s_hij + alpha * (sum over g of |s_gij|) / H      for visual keys

    The softmax follows. A key on which many heads agree is also raised in the other heads. It runs on
    any kernel, and computes the scores of visual keys once more beside it, a few rows at a time. It has no parameters.

    Args:
        alpha: The share, 0 or more.
        rows: "text": all text after an image. "generated": only the last token of each forward, as in the authors'
            code. Then a step of decoding does not give what a forward over the whole text gives.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the authors' 5 to 17 of 32
            layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "hgai"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (5, 17, 32)

    alpha: float = setting(0.5, "The share of the mean size over heads that scores are raised by, 0 or more.", least=0)
    rows: Rows = setting("text", ROWS, among=("text", "generated"))

    def stages(self, layer: SteeredLayer) -> Stage:
        """Raised scores of visual keys."""
        return Scores(self.added, self.rows)

    def added(self, call: AttentionCall, scores: torch.Tensor, queries: slice) -> torch.Tensor:
        """What is added to the scores of visual keys, `(batch, 1, rows, num_visual)`: the same in all heads."""
        return self.alpha * scores.abs().mean(1, keepdim=True)


HGAIModel = attention_tuner(HGAIConfig)

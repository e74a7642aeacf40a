"""VAF: in the text after the image, scores of visual keys are raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..attention.call import AttentionCall
from ..attention.stages import KeyScale, Stage
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import setting


@dataclass
class VAFConfig(AttentionMethod):
    """Raises scores of visual keys and lowers scores of text before the image, in the text after the image
    (arXiv 2503.13107, "ClearSight").

    With `s_ij` the score of query `i` and key `j`, for queries of text with an image before them::

        s_ij = s_ij * visual      for visual keys
        s_ij = s_ij * before      for keys of text before the first image, which the paper takes for the system prompt

    The softmax follows. A factor above 1 pushes a score below 0 further down. Keys are multiplied instead of scores,
    so it runs on any kernel. In a forward with image tokens, each layer attends twice: once for text, and once for the
    other tokens (on sdpa, only up to the last of these). It has no parameters.

    Args:
        visual: What scores of visual keys are multiplied by, above 0.
        before: What scores of text before the first image are multiplied by, above 0.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the paper's 9 to 14 of 32
            layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "vaf"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (9, 14, 32)
    multiplies_scores: ClassVar[bool] = True

    visual: float = setting(1.15, "What scores of visual keys are multiplied by, above 0.", above=0)
    before: float = setting(0.95, "What scores of text before the first image are multiplied by, above 0.", above=0)

    def stages(self, layer: SteeredLayer) -> Stage:
        """Scaled keys."""
        return KeyScale(self.of_keys, rows="text")

    def of_keys(self, call: AttentionCall) -> torch.Tensor:
        """What the scores of each key are multiplied by, `(batch, num_keys)`."""
        dtype = call.key.dtype

        def make() -> torch.Tensor:
            factors = torch.where(call.keys.text_before_images, self.before, 1.0)
            return torch.where(call.visual_keys, self.visual, factors).to(dtype)

        return call.context.derived(("vaf", self.visual, self.before, call.key.shape[2], dtype), make)


VAFModel = attention_tuner(VAFConfig)

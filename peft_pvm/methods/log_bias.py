"""Log-bias, the null model: scores of visual keys are raised by the logarithm of the length of the text after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..attention.call import AttentionCall
from ..attention.stages import Bias, Stage
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import setting


@dataclass
class LogBiasConfig(AttentionMethod):
    """Raises the scores of visual keys by log(1 + t / t0), where t is the number of text tokens after the last image.
    It is ours and unpublished: a null model to compare other methods with.

    With `s_ij` the score of query `i` and key `j` after scaling, for queries of text with an image before them::

        s_ij = s_ij + log(1 + t_i / t0)      for visual keys

        t_i = p_i - p_start + 1              the tokens of text from the end of the last image before `i` up to `i`

    `p` are the positions of tokens, and `start` is the first token of the run of text that holds `i`. The softmax
    follows. If the attention on the image falls like 1 / (1 + t / t0), as in theorem 3.1 of PVM's paper
    (arXiv 2605.00814: O(1/t)), this multiplies it by the inverse, before the weights are normalised. What is added is
    a number of the query times a number of the key, so it runs on any kernel. It has no parameters.

    Args:
        t0: How many tokens of text double the weight of the image, above 0. The default is ours and not tuned.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all that it can act on.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "log_bias"
    title: ClassVar[str] = "Log-bias"

    t0: float = setting(128.0, "How many tokens of text double the weight of the image, above 0.", above=0)

    def stages(self, layer: SteeredLayer) -> Stage:
        """A bias of visual keys, by query."""
        return Bias(self.of_keys, rows="text", of_queries=self.of_queries)

    def of_keys(self, call: AttentionCall) -> torch.Tensor:
        """1 for visual keys and 0 for others, `(batch, num_keys)`."""
        return call.context.derived(("log-bias", call.key.shape[2]), call.visual_keys.float)

    def of_queries(self, call: AttentionCall) -> torch.Tensor:
        """What the scores of visual keys are raised by for each query, `(batch, num_queries)`."""
        num_queries = call.query.shape[2]

        def make() -> torch.Tensor:
            positions, anchors = call.context.noted()
            text = positions[:, -num_queries:, 0] - anchors[:, -num_queries:] + 1
            return (text.clamp(min=0).float() / self.t0).log1p()  # padding must not become NaN, wherever it is

        return call.context.derived(("log-bias", self.t0, num_queries), make)


LogBiasModel = attention_tuner(LogBiasConfig)

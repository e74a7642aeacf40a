"""The plain form of a layer's stages, on whole matrices of scores. The fast forms are compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .call import AttentionCall, Output
from .scores import Scores
from .stages import Bias, GroupWeights, KeyScale, LayerStages, Positions, Values, Weights, text_rows


LOWEST = torch.finfo(torch.float32).min / 2


@dataclass
class ReferenceStages(LayerStages):
    """What adapters do to the attention of one layer, step by step as `stages.py` defines it, in fp32 at least.

    Without dropout.
    """

    def attend(self, call: AttentionCall) -> Output:
        """See `LayerStages.attend`."""
        positions = self._of_kind(Positions)
        acting = [stage for stage in positions if stage.acts_on(call)]
        scores = acting[0].reference(call) if acting else products(call.query, call.key)
        for scale in self._of_kind(KeyScale):
            scores = scores * _by_pair(call, scale, 1)
        scores = scores * call.scaling
        softcap = call.kwargs.get("softcap")
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        for bias in self._of_kind(Bias):
            scores = scores + _by_pair(call, bias, 0)
        visible, mask_bias = call.visibility.mask(), call.visibility.bias()
        for added in (mask_bias, call.position_bias):
            scores = scores if added is None else scores + added
        hidden = scores.new_zeros(1, dtype=torch.bool).expand_as(scores) if visible is None else ~visible
        weights = None
        for stage in self._of_kind(Weights, Scores):
            if stage.reference is None:
                raise NotImplementedError("This kind of weights has no plain form.")
            weights = stage.reference(call, scores, hidden.expand_as(scores))
        weights = scores.masked_fill(hidden, LOWEST).softmax(-1) if weights is None else weights
        for grouping in self._of_kind(GroupWeights):
            weights = grouping.changed(call, weights)
        by_value = weights
        for values in self._of_kind(Values):
            by_value = by_value * _by_pair(call, values, 1)
        output = by_value.to(call.value.dtype) @ repeated(call.value, call.query.shape[1])
        return output.transpose(1, 2).contiguous(), weights.to(call.value.dtype)

    def _of_kind(self, *kinds: type) -> list:
        return [stage for stage in self.stages if isinstance(stage, kinds)]


def products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The products of all queries and keys, `(batch, heads, num_queries, num_keys)`, in fp32 at least."""
    scores = query @ repeated(key, query.shape[1]).transpose(2, 3)
    return scores if scores.dtype == torch.float64 else scores.float()


def repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values, `(batch, kv_heads, num_keys, ...)`, with one for each of the heads that share them."""
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _by_pair(call: AttentionCall, stage: KeyScale | Bias | Values, neutral: int) -> torch.Tensor:
    """What a stage says of each pair of query and key, `(batch or 1, 1, num_queries or 1, num_keys)`."""
    if isinstance(stage, Bias):
        of_queries, of_keys = stage.factors(call)
        by_pair = of_queries[:, None, :, None] * of_keys[:, None, None]
    else:
        by_pair = stage.of_keys(call)[:, None, None]
    if stage.rows == "all":
        return by_pair
    if call.context.memory.is_empty:
        return torch.full_like(by_pair, neutral)
    rows = text_rows(call)
    return by_pair if rows is None else torch.where(rows[:, None, :, None], by_pair, neutral)

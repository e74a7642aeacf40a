"""T-DRS on whole matrices, formula by formula (arXiv 2511.09868)."""

from __future__ import annotations

import math

import torch

from .weights import Steps


def reweighted(
    steps: Steps,
    scores: torch.Tensor,
    similarity: torch.Tensor,
    distance: torch.Tensor,
    hidden: torch.Tensor,
    inter: torch.Tensor | None,
) -> torch.Tensor:
    """The attention weights of T-DRS.

    Args:
        steps: The settings, a `TDRSConfig`.
        scores: What softmax would be taken of, `(batch, heads, num_queries, num_keys)`.
        similarity: The cosine of queries and keys without rotation, as `scores`.
        distance: How many real tokens lie between them, broadcastable to `scores`.
        hidden: Which keys a query does not see, as `scores`, bool.
        inter: Which pairs are of different modality, broadcastable to `scores`, bool. Read for `pairs="inter"`.

    Returns:
        As `scores`; of a query that sees nothing, NaN.
    """
    if steps.pairs == "inter" and inter is not None:
        applies = inter.expand_as(scores)
    else:
        applies = torch.ones_like(scores, dtype=torch.bool)
    semantic = (similarity + 1) / 2
    scale = 1 + semantic
    raised = scores + torch.where(applies, steps.sd_strength * semantic, 0)
    weights = raised.masked_fill(hidden, -math.inf).softmax(-1)
    least = weights.masked_fill(hidden, math.inf).amin(-1, keepdim=True)

    def floor(value: float, is_multiple: bool) -> torch.Tensor:
        return (value * least).clamp(max=0.999) if is_multiple else torch.full_like(least, value)

    dc_floor, re_floor = (floor(one.value, one.is_multiple) for one in steps.floors)
    far = distance.abs().expand_as(scores).masked_fill(hidden, 0).amax(-1, keepdim=True)
    far = torch.where(far > 0, far, 1)  # a query that sees but itself: every distance is 0
    sigma = far / (-2 * dc_floor.log()).sqrt()
    gaussian = torch.exp(-((distance / scale / sigma) ** 2) / 2)
    alpha = -re_floor.log() / torch.log1p(far**2 / (2 * sigma**2))
    rational = (1 + distance**2 / (2 * (sigma * scale) ** 2)) ** -alpha
    boost = torch.where(applies, steps.dc_strength * gaussian + steps.re_strength * rational, 0)
    if steps.form == "weights":
        raw = weights + weights * boost
        return raw / raw.sum(-1, keepdim=True)
    return (raised + scores * boost).masked_fill(hidden, -math.inf).softmax(-1)

"""The reweighting of T-DRS (arXiv 2511.09868) as pure functions: on blocks of scores, and in its plain form.

`docs/methods/t-drs.md` says which of this the paper states and which is our reading.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...utils.checks import is_number


LOG2_E = math.log2(math.e)
# sem_pos, how near a key is in meaning, from 0 to 1: the cosine of query and key without rotation, times the first and
# shifted by the second.
SEMANTIC_POSITION = (0.5, 0.5)
LARGEST_MULTIPLE = 1e30  # of a least weight, which falls with the length of the context
LARGEST_FLOOR = 0.999  # a multiple of the least weight is cut to this; at 1, distance would not matter at all


@dataclass(frozen=True)
class Floor:
    """What a factor falls to at the farthest key.

    Attributes:
        value: A number, or the multiple of the row's least attention weight.
        is_multiple: Which of the two.
    """

    value: float
    is_multiple: bool

    @staticmethod
    def of(value: float | str) -> Floor:
        """A floor from what a config says.

        Example:
            >>> Floor.of("3*min"), Floor.of(0.1)
            (Floor(value=3.0, is_multiple=True), Floor(value=0.1, is_multiple=False))
        """
        if isinstance(value, str):
            return Floor(float(value.partition("*")[0]), True)
        return Floor(float(value), False)

    @staticmethod
    def is_valid(value: object) -> bool:
        """Whether a config may say this."""
        if isinstance(value, str):
            is_multiple = re.fullmatch(r"[0-9]+(\.[0-9]+)?\*min", value) is not None
            return is_multiple and 0 < float(value.partition("*")[0]) <= LARGEST_MULTIPLE
        return is_number(value) and 0 < value < 1  # type: ignore[operator]

    def exponent(self, log_least: torch.Tensor | None) -> torch.Tensor | float:
        """Minus the logarithm of the floor.

        Args:
            log_least: Logarithm to base 2 of each row's least attention weight, any shape; may be `None` for a plain
                number.

        Returns:
            Shaped as `log_least`, or a number.

        Raises:
            ValueError: The floor is a multiple, and there is no `log_least`.

        Example:
            >>> Floor.of("3*min").exponent(torch.tensor([0.01]).log2()).neg().exp()
            tensor([0.0300])
        """
        if not self.is_multiple:
            return -math.log(self.value)
        if log_least is None:
            raise ValueError(f"The floor {self.value}*min needs the least weight of each row, but log_least is None.")
        exponent = torch.rsub(log_least, -math.log(self.value), alpha=1 / LOG2_E)
        return exponent.clamp(min=-math.log(LARGEST_FLOOR))


class Steps(Protocol):
    """What the three steps are done with: a `TDRSConfig`, whose docstring says what each is."""

    @property
    def form(self) -> str: ...
    @property
    def pairs(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def sd_strength(self) -> float: ...
    @property
    def dc_strength(self) -> float: ...
    @property
    def re_strength(self) -> float: ...
    @property
    def floors(self) -> tuple[Floor, Floor]: ...
    @property
    def knows_distance(self) -> bool: ...
    @property
    def counts_twice(self) -> bool: ...


def semantic_position(similarity: torch.Tensor) -> torch.Tensor:
    """sem_pos: how near a key is in meaning, from the cosine of query and key without rotation.

    Args:
        similarity: From -1 to 1, any shape.

    Returns:
        From 0 to 1.

    Example:
        >>> semantic_position(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    factor, shift = SEMANTIC_POSITION
    return similarity * factor + shift


def distance_boost(
    semantic: torch.Tensor,
    distance: torch.Tensor,
    farthest: torch.Tensor,
    dc_exponent: torch.Tensor | float,
    re_exponent: torch.Tensor | float,
    dc_strength: float,
    re_strength: float,
) -> torch.Tensor:
    """What the last two steps add to an attention weight of 1: lambda_dc w(d / scale) + lambda_re r_re(d / scale).

    With scale = 1 + sem_pos and x = d / (scale d_max), the Gaussian and the rational quadratic factor of the paper are
    w = exp(-a x^2) and r_re = (1 + a x^2)^(-b / log(1 + a)), where exp(-a) and exp(-b) are the floors: at the farthest
    key and scale 1 they fall to these.

    Args:
        semantic: sem_pos of every pair, `(..., queries, keys)`.
        distance: Number of tokens between query and key, broadcastable to `semantic`; its sign does not matter.
        farthest: The largest distance to a key that a query sees, d_max, broadcastable to `(..., queries, 1)`.
        dc_exponent: a, as `Floor.exponent` gives it, broadcastable to `(..., queries, 1)`.
        re_exponent: b, as `dc_exponent`.
        dc_strength: lambda_dc.
        re_strength: lambda_re.

    Returns:
        Shaped as `semantic`, 0 or more.

    Example:
        >>> semantic, distance = torch.zeros(2), torch.tensor([0.0, 8.0])
        >>> floor = Floor.of(0.1).exponent(None)
        >>> distance_boost(semantic, distance, torch.tensor(8.0), floor, floor, 1.0, 0.0)
        tensor([1.0000, 0.1000])
    """
    fall, strengths = fall_to(farthest), (dc_strength, re_strength)
    return boost_that_falls(1 + semantic, distance, fall, dc_exponent, re_exponent, *strengths)


def fall_to(farthest: torch.Tensor) -> torch.Tensor:
    """What `boost_that_falls` needs of the largest distance to a key that a query sees: -log2(e) / d_max^2."""
    return -LOG2_E / farthest.clamp(min=1).square()


def over(tensor: torch.Tensor) -> dict[str, Any]:
    """Lets an operation overwrite a tensor that is no longer needed, so that less leaves a CPU's cache.

    It does not do so if gradients may need the tensor.
    """
    return {} if torch.is_grad_enabled() else {"out": tensor}


def boost_that_falls(
    scale: torch.Tensor,
    distance: torch.Tensor,
    fall: torch.Tensor,
    dc_exponent: torch.Tensor | float,
    re_exponent: torch.Tensor | float,
    dc_strength: float,
    re_strength: float,
) -> torch.Tensor:
    """`distance_boost` from 1 + sem_pos, which it overwrites, and `fall_to` of the farthest, which layers share."""
    # Few steps over all pairs, and powers of two, which torch raises faster than those of e.
    part = torch.div(distance, scale, **over(scale))
    part = torch.square(part, **over(part))
    falling = torch.mul(part, dc_exponent * fall, **over(part))
    near = torch.exp2(falling) if dc_strength else torch.zeros_like(falling)
    if dc_strength not in (0, 1):
        near = torch.mul(near, dc_strength, **over(near))
    if not re_strength:
        return near
    log = torch.log1p(dc_exponent) if isinstance(dc_exponent, torch.Tensor) else math.log1p(dc_exponent)
    power = re_exponent * -LOG2_E / log
    rising = torch.mul(falling, -1 / LOG2_E, **over(falling))
    rising = torch.log1p(rising, **over(rising))
    rising = torch.mul(rising, power, **over(rising))
    return torch.add(near, torch.exp2(rising, **over(rising)), alpha=re_strength, **over(near))


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
    far = torch.where(far > 0, far, 1)  # a query that sees only itself: every distance is 0
    sigma = far / (-2 * dc_floor.log()).sqrt()
    gaussian = torch.exp(-((distance / scale / sigma) ** 2) / 2)
    alpha = -re_floor.log() / torch.log1p(far**2 / (2 * sigma**2))
    rational = (1 + distance**2 / (2 * (sigma * scale) ** 2)) ** -alpha
    boost = torch.where(applies, steps.dc_strength * gaussian + steps.re_strength * rational, 0)
    if steps.form == "weights":
        raw = weights + weights * boost
        return raw / raw.sum(-1, keepdim=True)
    if steps.counts_twice:
        boost = boost + applies
    return (raised + scores * boost).masked_fill(hidden, -math.inf).softmax(-1)

"""What is computed from recordings: laws of decay, visual sinks, divergences, the logit lens.

Everything is pure, except that the lens runs the model's own final layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


ROWS_AT_ONCE = 16  # vocabularies are large, and double precision doubles them


@dataclass(frozen=True)
class PowerLaw:
    """`mass = c / text_tokens ** exponent`.

    Attributes:
        exponent: 1 is the decay that PVM's paper derives (arXiv 2605.00814, theorem 3.1), 0 is none.
        standard_error: The standard error of the exponent.
        r_squared: The share of the variance of log mass that it explains. `None` if there is no variance.
        num_points: How many queries it was fitted to.
    """

    exponent: float
    standard_error: float
    r_squared: float | None
    num_points: int


@dataclass(frozen=True)
class Dilution:
    """`mass = a / (a + text_tokens)`: the share of the image if attention distinguishes tokens only by their modality.

    A softmax gives this share if all scores within a modality are equal. `a` is then the number of visual tokens,
    times the number of text tokens that weigh as much as one of them.

    Attributes:
        a: The number of text tokens after which half of the attention is left.
        r_squared: Share of the variance of the log-odds that it explains; negative if a constant would fit better.
            `None`: there is no variance.
        num_points: How many queries it was fitted to.
    """

    a: float
    r_squared: float | None
    num_points: int


def fit_power_law(text_tokens: Sequence[float], masses: Sequence[float]) -> PowerLaw | None:
    """Least squares of log mass on log text tokens.

    Args:
        text_tokens: For each query, how many non-visual tokens it sees.
        masses: The attention that reaches the image, in [0, 1]. Points where either is not positive are left out.

    Returns:
        The fit; `None` with fewer than 3 points, or if all see the same number of text tokens.

    Example:
        >>> fit_power_law([10, 20, 40], [0.4, 0.2, 0.1]).exponent
        1.0
    """
    points = [(math.log(t), math.log(mass)) for t, mass in zip(text_tokens, masses) if t > 0 and mass > 0]
    if len(points) < 3:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 1e-12 * len(points):
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    standard_error = math.sqrt(residual / (len(points) - 2) / spread)
    return PowerLaw(rounded(-slope), rounded(standard_error), _explained(residual, points, mean_y), len(points))


def fit_dilution(text_tokens: Sequence[float], masses: Sequence[float]) -> Dilution | None:
    """Least squares of the log-odds of the mass on `log a - log text_tokens`, which has one parameter.

    Args:
        text_tokens: For each query, how many non-visual tokens it sees.
        masses: The attention that reaches the image, in [0, 1]. Points at 0 or 1, or without text, are left out.

    Returns:
        The fit; `None` with fewer than 3 points, or if all see the same number of text tokens.

    Example:
        >>> fit_dilution([10, 20, 30], [0.75, 0.6, 0.5]).a
        30.0
    """
    points = [(math.log(t), math.log(m / (1 - m))) for t, m in zip(text_tokens, masses) if t > 0 and 0 < m < 1]
    if len(points) < 3 or max(x for x, _ in points) - min(x for x, _ in points) <= 1e-6:
        return None
    log_a = sum(x + y for x, y in points) / len(points)
    residual = sum((y - log_a + x) ** 2 for x, y in points)
    mean_y = sum(y for _, y in points) / len(points)
    return Dilution(rounded(math.exp(log_a)), _explained(residual, points, mean_y), len(points))


def _explained(residual: float, points: list[tuple[float, float]], mean_y: float) -> float | None:
    variance = sum((y - mean_y) ** 2 for _, y in points)
    return None if variance <= 1e-18 * len(points) else rounded(1 - residual / variance)


def find_sinks(per_token: torch.Tensor, sink_factor: float, sink_share: float) -> list[int]:
    """Visual tokens that draw attention whatever the query.

    Args:
        per_token: The attention that reaches each visual token, `(num_queries, num_visual)`.
        sink_factor: A sink has more than this many times the mean over all visual tokens ...
        sink_share: ... for at least this share of the queries.

    Returns:
        Indices of the sinks, ascending.

    Example:
        >>> find_sinks(torch.tensor([[0.01, 0.9, 0.01], [0.02, 0.8, 0.02]]), sink_factor=2, sink_share=0.9)
        [1]
    """
    exceeds = per_token > sink_factor * per_token.mean(1, keepdim=True)
    return (exceeds.float().mean(0) >= sink_share).nonzero().squeeze(1).tolist()


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || softmax(reference)), in nats.

    Args:
        logits: `(num_tokens, vocab_size)`.
        reference: Logits of the same shape.

    Returns:
        `(num_tokens,)`, fp64, on the CPU.
    """
    divergences = []
    for rows, reference_rows in zip(logits.split(ROWS_AT_ONCE), reference.split(ROWS_AT_ONCE)):
        log_p = rows.to(torch.float64).log_softmax(-1)
        log_q = reference_rows.to(rows.device, torch.float64).log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
    return torch.cat(divergences)


def logit_lens(hidden_states: list[torch.Tensor], norm: nn.Module, head: nn.Module) -> list[torch.Tensor]:
    """How far each layer's prediction, read out like that of the last layer, is from the final prediction.

    Args:
        hidden_states: What each decoder layer gave, `(1, num_tokens, hidden_size)`.
        norm: The text model's final norm.
        head: What makes logits of the norm's output. A soft cap or scale that the model applies afterwards is left
            out.

    Returns:
        For each layer, KL(last layer's prediction || this layer's) in nats, `(num_tokens,)`; the last one is 0.
    """
    final = head(norm(hidden_states[-1]))[0]
    return [kl_divergence(final, head(norm(hidden))[0]) for hidden in hidden_states]


def rounded(value: float) -> float:
    """Round to six significant digits, like all numbers of a result, so that what is saved is what was shown."""
    return float(f"{value:.6g}")


def numbers(values: Any) -> Any:
    """A tensor, or (nested) lists, as (nested) lists of rounded numbers."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    return [numbers(value) for value in values] if isinstance(values, list) else rounded(values)


def mean_over_layers(by_layer: list[list[float]]) -> list[float]:
    """The mean of each position over layers."""
    return [rounded(sum(position) / len(position)) for position in zip(*by_layer)]

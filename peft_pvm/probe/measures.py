"""What is computed from recordings: visual sinks, divergences, the logit lens. Pure, but for the lens's own layers."""

from __future__ import annotations

import torch
from torch import nn


ROWS_AT_ONCE = 16  # vocabularies are large, and double precision doubles them


def find_sinks(per_token: torch.Tensor, sink_factor: float, sink_share: float) -> list[int]:
    """Visual tokens that draw attention whatever the query.

    Args:
        per_token: The attention that reaches each visual token, `(num_queries, num_visual)`.
        sink_factor: A sink has more than so many times the mean over all visual tokens ...
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
        reference: The same shape.

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
    """How far each layer's prediction is from the final one, if it were read out as the last layer is.

    Args:
        hidden_states: What each decoder layer gave, `(1, num_tokens, hidden_size)`.
        norm: The text model's final norm.
        head: What makes logits of its output. A soft cap or scale that the model applies afterwards is left out.

    Returns:
        For each layer, KL(last layer's prediction || this layer's) in nats, `(num_tokens,)`; the last one is 0.
    """
    final = head(norm(hidden_states[-1]))[0]
    return [kl_divergence(final, head(norm(hidden))[0]) for hidden in hidden_states]

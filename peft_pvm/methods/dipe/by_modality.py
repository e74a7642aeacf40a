"""A prefill with anchored positions in as many products as plain attention, for rows of one layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory import Runs
from ...positions import VISUAL


@dataclass(frozen=True)
class Run:
    """Tokens of one modality in a row.

    Attributes:
        start: The first of them.
        stop: The first behind them.
        is_visual: Their modality.
    """

    start: int
    stop: int
    is_visual: bool


def runs_of(runs: Runs, seq_len: int) -> list[Run] | None:
    """The runs of a batch in which all rows have the same; `None` if they have not. Waits for the device.

    Args:
        runs: Of rows that start with this forward and have no padding.
        seq_len: Their length.
    """
    if not bool(((runs.starts == runs.starts[:1]) & (runs.modalities == runs.modalities[:1])).all()):
        return None
    starts, modalities = runs.starts[0].tolist(), runs.modalities[0].tolist()
    stops = [*starts[1:], seq_len]
    return [Run(start, stop, modality == VISUAL) for start, stop, modality in zip(starts, stops, modalities)]


def attend_by_modality(
    query: torch.Tensor,
    anchored: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: list[Run],
    scaling: float,
) -> torch.Tensor:
    """Causal attention in which tokens of different modality meet by anchored queries.

    The tokens of one modality, put together, attend to each other as in plain causal attention. Each run then attends
    to the tokens of the other modality before it, all of which it sees. The sums of both softmaxes tell how to put
    their outputs together. So every pair is computed once, on a fused kernel.

    Args:
        query: Rotated by their positions, `(batch, heads, seq_len, head_dim)`, on a CPU.
        anchored: Rotated by their anchors, as `query`.
        key: `(batch, kv_heads, seq_len, head_dim)`.
        value: As `key`.
        runs: As `runs_of` gives them.
        scaling: What products are multiplied by.

    Returns:
        `(batch, heads, seq_len, head_dim)`, without gradients.
    """
    own: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    keys: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    for is_visual in {run.is_visual for run in runs}:
        own_query, own_key, own_value = (
            torch.cat([tensor[:, :, run.start : run.stop] for run in runs if run.is_visual == is_visual], 2)
            for tensor in (query, key, value)
        )
        own[is_visual] = _fused(own_query, own_key, own_value, is_causal=True, scaling=scaling)
        keys[is_visual] = own_key, own_value
    outputs = []
    seen = {False: 0, True: 0}  # tokens of each modality before the run
    for run in runs:
        here = slice(seen[run.is_visual], seen[run.is_visual] + run.stop - run.start)
        output, log_sum = (tensor[:, :, here] for tensor in own[run.is_visual])
        if others := seen[not run.is_visual]:
            other_key, other_value = (tensor[:, :, :others] for tensor in keys[not run.is_visual])
            rows = anchored[:, :, run.start : run.stop]
            other, other_log_sum = _fused(rows, other_key, other_value, is_causal=False, scaling=scaling)
            share = torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1)
            output = output.to(share.dtype).lerp(other.to(share.dtype), share).to(output.dtype)
        outputs.append(output)
        seen[run.is_visual] = here.stop
    return torch.cat(outputs, 2)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_dot_product_attention` runs on a CPU, which also knows the logarithm of each row's sum."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, scale=scaling)

"""T-DRS in PyTorch, block by block with a running softmax: memory grows with the length, not with its square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..visibility import Visibility
from .config import TDRSConfig
from .weights import Floor, distance_boost, semantic_position


BLOCK_ELEMENTS = 2**17  # scores in a block, over all rows and heads: larger ones leave a CPU's cache
KEYS_IN_BLOCK = 256  # aimed at


@dataclass(frozen=True, eq=False)
class Inputs:
    """What reweighted attention is computed from.

    Attributes:
        query: What scores are made from, `(batch, heads, num_queries, score_dim)`.
        key: `(batch, kv_heads, num_keys, score_dim)`.
        value: `(batch, kv_heads, num_keys, value_dim)`.
        content_query: Without rotation and of length 1, `(batch, heads, num_queries, head_dim)`.
        content_key: `(batch, kv_heads, num_keys, head_dim)`.
        visibility: Which keys each query may attend to.
        inter: Modality of queries and keys, `(batch, num_queries)` and `(batch, num_keys)`, bool: only pairs of
            different modality are reweighted. `None`: all pairs.
        scaling: What products are multiplied by.
        softcap: Scores are bent towards at most this. `None`: they are not.
        dropout: Share of the weights that is dropped.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    content_query: torch.Tensor
    content_key: torch.Tensor
    visibility: Visibility
    inter: tuple[torch.Tensor, torch.Tensor] | None
    scaling: float
    softcap: float | None = None
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: fp32 at least."""
        return torch.promote_types(self.query.dtype, torch.float32)


def blockwise_attention(
    inputs: Inputs, config: TDRSConfig, wants_weights: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with reweighted scores.

    Under autograd every block of queries is computed again in the backward pass: memory stays linear there too.

    Args:
        inputs: What it is computed from.
        config: How it is reweighted.
        wants_weights: Whether to return the weights: of whole rows, so memory is no longer linear.

    Returns:
        `(batch, num_queries, heads, value_dim)`, and weights `(batch, heads, num_queries, num_keys)` or `None`, in the
        dtype of the values.
    """
    num_queries = inputs.query.shape[2]
    block = _Block(inputs, config, wants_weights)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.content_query, inputs.content_key)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    outputs, all_weights = [], []
    size = max(BLOCK_ELEMENTS // (KEYS_IN_BLOCK * inputs.query.shape[0] * inputs.query.shape[1]), 16)
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        # Scores want fp32 also where the model runs under autocast.
        with torch.autocast(inputs.query.device.type, enabled=False):
            output, weights = checkpoint(block.attend, rows, use_reentrant=False) if records else block.attend(rows)
        outputs.append(output.to(inputs.value.dtype))
        all_weights.append(weights)
    output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
    return output, torch.cat(all_weights, 2).to(inputs.value.dtype) if wants_weights else None


class _Block:
    """A block of queries against all keys, a block of keys at a time."""

    def __init__(self, inputs: Inputs, config: TDRSConfig, wants_weights: bool):
        self.inputs, self.config, self.wants_weights = inputs, config, wants_weights
        # A floor of a step that is off must not cost a pass over the keys.
        self.floors = Floor.of(config.dc_floor), Floor.of(config.re_floor if config.re_strength else 0.5)
        self.key_ranks, self.query_ranks = (ranks.to(inputs.dtype) for ranks in inputs.visibility.ranks())
        self.query = inputs.query.to(inputs.dtype) * inputs.scaling

    def attend(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(batch, heads, rows, value_dim)` and, if wanted, weights `(batch, heads, rows, num_keys)`."""
        inputs, config = self.inputs, self.config
        blocks = self._key_blocks(rows)
        farthest, dc_exponent, re_exponent = self._row_factors(rows, blocks)
        shape = *self.query.shape[:2], rows.stop - rows.start

        largest = self.query.new_full((*shape, 1), _lowest(self.query))
        total = self.query.new_zeros(*shape, 1)
        attended = self.query.new_zeros(*shape, inputs.value.shape[-1])
        for keys in blocks:
            scores, raised, semantic, visible, applies = self._scores(rows, keys)
            boost = None
            if config.knows_distance:
                strengths = config.dc_strength, config.re_strength
                distance = self._distance(rows, keys)
                boost = distance_boost(semantic, distance, farthest, dc_exponent, re_exponent, *strengths)
                if applies is not None:
                    boost = torch.where(applies, boost, 0)
            if boost is not None and config.form == "logits":
                raised = torch.addcmul(raised, scores, boost)
            raised = _hide(raised, visible)
            new_largest = torch.maximum(largest, raised.detach().amax(-1, keepdim=True))
            weights = torch.exp(raised - new_largest)
            if boost is not None and config.form == "weights":
                weights = torch.addcmul(weights, weights, boost)
            shrink = torch.exp(largest - new_largest)
            total = total * shrink + weights.sum(-1, keepdim=True)
            weights = F.dropout(weights, inputs.dropout)
            block_attended = self._by_kv_head(weights) @ inputs.value[:, :, keys].to(weights.dtype)
            attended = attended * shrink + block_attended.view_as(attended)
            largest = new_largest
        # With weights wanted, there is one block.
        return attended / total, weights / total

    def _key_blocks(self, rows: slice) -> list[slice]:
        inputs = self.inputs
        num_keys = inputs.key.shape[2]
        first_column = inputs.visibility.first_column
        if self.wants_weights:
            return [slice(0, num_keys)]
        if inputs.visibility.is_plain_causal and isinstance(first_column, int):
            num_keys = min(num_keys, first_column + rows.stop)  # no query of the block sees more
        per_key = inputs.query.shape[0] * inputs.query.shape[1] * (rows.stop - rows.start)
        size = max(BLOCK_ELEMENTS // per_key, 64)
        return [slice(start, min(start + size, num_keys)) for start in range(0, num_keys, size)]

    def _row_factors(
        self, rows: slice, blocks: list[slice]
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """What `distance_boost` needs of each row: the largest distance and the exponents of both factors."""
        farthest = self.query_ranks[..., rows].unsqueeze(-1)  # where the first real token is in sight
        if not self.config.knows_distance:
            return farthest, 0.0, 0.0
        plain, log_least = self.inputs.visibility.is_plain_causal, None
        if not plain:
            farthest = torch.zeros_like(farthest)
            for keys in blocks:
                visible = self.inputs.visibility.mask(rows, keys)
                distance = self._distance(rows, keys).abs()
                seen = distance if visible is None else distance * visible
                farthest = torch.maximum(farthest, seen.amax(-1, keepdim=True))
        if any(floor.is_multiple for floor in self.floors):
            log_least = self._log_least(rows, blocks)
        dc_exponent, re_exponent = (floor.exponent(log_least) for floor in self.floors)
        return farthest, dc_exponent, re_exponent

    def _log_least(self, rows: slice, blocks: list[slice]) -> torch.Tensor:
        """The logarithm of the least weight of each row, after the semantic step, `(batch, heads, rows, 1)`."""
        shape = *self.query.shape[:2], rows.stop - rows.start, 1
        log_total = self.query.new_full(shape, _lowest(self.query))
        least = self.query.new_full(shape, -_lowest(self.query))
        for keys in blocks:
            _, raised, _, visible, _ = self._scores(rows, keys)
            log_total = torch.logaddexp(log_total, _hide(raised, visible).logsumexp(-1, keepdim=True))
            seen = raised if visible is None else torch.where(visible, raised, -_lowest(raised))
            least = torch.minimum(least, seen.amin(-1, keepdim=True))
        return least - log_total

    def _scores(
        self, rows: slice, keys: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Scores, scores after the semantic step, sem_pos, what is visible and what is reweighted."""
        inputs = self.inputs
        scores = self._products(self.query[:, :, rows], inputs.key[:, :, keys])
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        visible, bias = inputs.visibility.mask(rows, keys), inputs.visibility.bias(rows, keys)
        if bias is not None and visible is not None:
            scores = scores + torch.where(visible, bias, 0)  # not -inf, of which gradients would be undefined
        semantic = semantic_position(self._products(inputs.content_query[:, :, rows], inputs.content_key[:, :, keys]))
        applies = None
        if inputs.inter is not None:
            of_queries, of_keys = inputs.inter
            applies = (of_queries[:, rows, None] != of_keys[:, None, keys]).unsqueeze(1)
        step = semantic if applies is None else torch.where(applies, semantic, 0)
        raised = torch.add(scores, step, alpha=self.config.sd_strength)
        return scores, raised, semantic, visible, applies

    def _products(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`(batch, heads, queries, keys)`, without repeating keys for the heads that share them."""
        dtype = self.inputs.dtype
        products = self._by_kv_head(query.to(dtype)) @ key.to(dtype).transpose(2, 3)
        return products.view(*query.shape[:3], key.shape[2])

    def _by_kv_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(batch, heads, queries, ...)` to `(batch, kv_heads, heads / kv_heads * queries, ...)`."""
        return tensor.reshape(tensor.shape[0], self.inputs.key.shape[1], -1, tensor.shape[-1])

    def _distance(self, rows: slice, keys: slice) -> torch.Tensor:
        """Number of real tokens between query and key, `(batch or 1, 1, rows, keys)`."""
        return self.query_ranks[..., rows].unsqueeze(-1) - self.key_ranks[..., keys].unsqueeze(-2)


def _hide(scores: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    return scores if visible is None else scores.masked_fill(~visible, _lowest(scores))


def _lowest(tensor: torch.Tensor) -> float:
    # Finite, so that the rows of padding, which see nothing, come out finite.
    return torch.finfo(tensor.dtype).min / 2

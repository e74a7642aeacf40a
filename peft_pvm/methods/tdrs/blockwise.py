"""T-DRS in PyTorch, a few whole rows of scores at a time: memory grows with the length, not with its square."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...attention.call import records_gradients
from ...tokens.visibility import Visibility
from .weights import LOG2_E, SEMANTIC_POSITION, Steps, boost_that_falls, fall_to, over


BLOCK_ELEMENTS = 2**19  # scores in a block: larger ones leave a CPU's cache
BLOCK_ELEMENTS_OF_A_GPU = 2**24  # smaller ones leave it waiting
ELEMENTS_IN_CACHE = 2**18  # of keys that are taken at once
LEAST_QUERIES = 32  # in a block, however long its rows
MOST_QUERIES = 128  # in a block, on a CPU: with more, more of its scores are hidden


ContentKey = torch.Tensor | Callable[[slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What reweighted attention is computed from.

    Attributes:
        query: What scores are made from, `(batch, heads, num_queries, score_dim)`.
        key: `(batch, kv_heads, num_keys, score_dim)`.
        value: `(batch, kv_heads, num_keys, value_dim)`.
        content_query: Without rotation, `(batch, heads, num_queries, head_dim)`. Its products with `content_key` are
            cosines.
        content_key: `(batch, kv_heads, num_keys, head_dim)`; or a function that makes this of a slice of the keys.
        visibility: Which keys each query may attend to.
        inter: Modality of queries and keys, `(batch, num_queries)` and `(batch, num_keys)`, bool: only pairs of
            different modality are reweighted. `None`: all pairs.
        scaling: What products are multiplied by.
        softcap: Scores are bent towards at most this. `None`: they are not.
        dropout: Share of the weights that is dropped.
        bias: What is added to scores after that, `(batch or 1, heads, num_queries, num_keys)`. `None`: nothing.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    content_query: torch.Tensor
    content_key: ContentKey
    visibility: Visibility
    inter: tuple[torch.Tensor, torch.Tensor] | None
    scaling: float
    softcap: float | None = None
    dropout: float = 0.0
    bias: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: fp32 at least."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def content_of(self, keys: slice) -> torch.Tensor:
        """`content_key` of some keys."""
        return self.content_key[:, :, keys] if isinstance(self.content_key, torch.Tensor) else self.content_key(keys)


def blockwise_attention(
    inputs: Inputs, config: Steps, wants_weights: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with reweighted scores.

    Under autograd every block of queries is computed again in the backward pass: memory stays linear there too.

    Args:
        inputs: What it is computed from.
        config: How it is reweighted.
        wants_weights: Whether to return the weights: all of them, so memory is no longer linear.

    Returns:
        `(batch, num_queries, heads, value_dim)`, and weights `(batch, heads, num_queries, num_keys)` or `None`, in the
        dtype of the values.
    """
    num_queries, num_keys, dtype = inputs.query.shape[2], inputs.key.shape[2], inputs.value.dtype
    records = records_gradients(
        inputs.query, inputs.key, inputs.value, inputs.content_query, inputs.content_key, inputs.bias
    )
    outputs, all_weights = [], []
    # Scores want fp32 also where the model runs under autocast.
    with torch.autocast(inputs.query.device.type, enabled=False):
        rows = _Rows(inputs, config, wants_weights)
        for start in range(0, num_queries, rows.num_queries):
            queries = slice(start, min(start + rows.num_queries, num_queries))
            output, weights = (
                checkpoint(rows.attend, queries, use_reentrant=False) if records else rows.attend(queries)
            )
            outputs.append(output.to(dtype))
            if weights is not None:
                all_weights.append(F.pad(weights, (0, num_keys - weights.shape[-1])).to(dtype))
    output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)).transpose(1, 2).contiguous()
    return output, torch.cat(all_weights, 2) if wants_weights else None


class _Rows:
    """Whole rows of scores: of a few queries, and of the heads that share the keys of one head, or of several.

    Scores are in powers of two, which torch raises faster than those of e. Tensors have the axes `(pairs, heads, ...)`
    inside: a pair is a head of keys in a row of the batch, heads are those that share it. An axis of 1 stands for all.
    """

    def __init__(self, inputs: Inputs, config: Steps, wants_weights: bool):
        self.inputs, self.config, self.wants_weights = inputs, config, wants_weights
        self.query = self._by_pair(inputs.query.to(inputs.dtype))
        self.content_query = self._by_pair(inputs.content_query.to(inputs.dtype))
        num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
        per_query, at_once = self.query.shape[1] * num_keys, num_keys
        if _streams(inputs):
            at_once = max(ELEMENTS_IN_CACHE * num_keys // inputs.key.numel(), 16)
            self.elements, self.num_queries = per_query * len(self.query), 1
        else:
            on_cpu = inputs.query.device.type == "cpu"
            self.elements, most = (BLOCK_ELEMENTS, MOST_QUERIES) if on_cpu else (BLOCK_ELEMENTS_OF_A_GPU, num_queries)
            self.num_queries = min(max(self.elements // per_query, LEAST_QUERIES), most, num_queries)
        self.key, self.content_key, self.value = (
            _Keys(of_keys, num_keys, at_once, inputs.dtype)
            for of_keys in (
                lambda keys: inputs.key[:, :, keys],
                inputs.content_of,
                lambda keys: inputs.value[:, :, keys],
            )
        )

    def attend(self, queries: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output `(batch, heads, queries, value_dim)` and, if wanted, weights `(batch, heads, queries, keys seen)`."""
        inputs, visibility = self.inputs, self.inputs.visibility
        keys, always = slice(0, visibility.num_keys), 0
        if visibility.is_plain_causal and isinstance(visibility.first_column, int):
            keys = slice(0, min(visibility.num_keys, visibility.first_column + queries.stop))
            always = visibility.first_column + queries.start + 1
        visible, bias = visibility.mask(queries, slice(always, keys.stop)), visibility.bias(queries, keys)
        hidden = None if visible is None else ~visible
        if bias is not None and hidden is not None:
            bias = (bias * LOG2_E).masked_fill(hidden, 0)  # not -inf, of which gradients would be undefined
        if inputs.bias is not None:
            own = inputs.bias[:, :, queries, keys].to(inputs.dtype) * LOG2_E
            bias = own if bias is None else bias + own
        applies = None
        if inputs.inter is not None:
            of_queries, of_keys = inputs.inter
            applies = (of_queries[:, queries, None] != of_keys[:, None, keys]).unsqueeze(1)
        distance, fall = self._distances(queries, keys, visible)
        block = _Block(always, self._by_pair(distance), self._by_pair(fall))
        block.hidden, block.bias, block.applies = (
            None if tensor is None else self._by_pair(tensor) for tensor in (hidden, bias, applies)
        )
        outputs, all_weights = [], []
        per_pair = self.query.shape[1] * (queries.stop - queries.start) * keys.stop
        num_pairs = max(self.elements // per_pair, 1)
        for start in range(0, len(self.query), num_pairs):
            pairs = slice(start, start + num_pairs)
            output, weights = self._attend_pairs(pairs, queries, keys, block.of(pairs))
            outputs.append(output)
            all_weights.append(weights)
        return self._by_head(outputs), self._by_head(all_weights) if self.wants_weights else None

    def _distances(
        self, queries: slice, keys: slice, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far queries are from keys, `(batch or 1, 1, queries, keys)`, and what `fall_to` makes of the largest."""
        visibility, dtype = self.inputs.visibility, self.inputs.dtype

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            key_ranks, query_ranks = (ranks.to(dtype) for ranks in visibility.ranks())
            to_first = query_ranks[..., queries].unsqueeze(-1)
            distance = to_first - key_ranks[..., keys].unsqueeze(-2)
            if visibility.is_plain_causal:
                return distance, fall_to(to_first)
            return distance, fall_to(
                (distance.abs() if visible is None else distance.abs() * visible).amax(-1, keepdim=True)
            )

        # Of a single query, layers share them. Of many they would be as large as scores.
        return visibility.derived((dtype, keys.stop), make) if visibility.num_queries == 1 else make()

    def _attend_pairs(
        self, pairs: slice, queries: slice, keys: slice, block: _Block
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(pairs, heads, queries, value_dim)` and weights `(pairs, heads, queries, keys)`."""
        inputs, config = self.inputs, self.config
        scores = self.key.products(self.query[pairs, :, queries], pairs, keys, inputs.scaling * LOG2_E)
        if inputs.softcap is not None:
            scores = inputs.softcap * LOG2_E * torch.tanh(scores / (inputs.softcap * LOG2_E))
        if block.bias is not None:
            scores = scores + block.bias
        scale = self._scale(pairs, queries, keys)
        # 1 + sem_pos serves as it is: adding 1 to every score does not change the softmax.
        step = scale if block.applies is None else torch.where(block.applies, scale, 1)
        is_literal = config.form != "weights" and (config.knows_distance or config.counts_twice)  # needs them again
        raised = torch.add(scores, step, alpha=config.sd_strength * LOG2_E, **({} if is_literal else over(scores)))
        needs_least = config.knows_distance and any(floor.is_multiple for floor in config.floors)
        weights, least = block.exponentials(raised.clone() if is_literal else raised, needs_least)
        if config.knows_distance:
            log_least = None if least is None else least - weights.sum(-1, keepdim=True).log2()
            boost = block.boost(scale, config, log_least)
            boost = boost + 1 if config.counts_twice else boost
        elif config.counts_twice:
            boost = torch.ones_like(scores)
        if config.knows_distance or config.counts_twice:
            if block.applies is not None:
                boost = torch.where(block.applies, boost, 0)
            if config.form == "weights":
                weights = torch.addcmul(weights, weights, boost, **over(weights))
            else:
                weights, _ = block.exponentials(torch.addcmul(raised, scores, boost))
        total = weights.sum(-1, keepdim=True)
        weights = F.dropout(weights, inputs.dropout)
        return self.value.weighted(weights, pairs, keys) / total, weights / total if self.wants_weights else weights

    def _scale(self, pairs: slice, queries: slice, keys: slice) -> torch.Tensor:
        """1 + sem_pos, `(pairs, heads, queries, keys)`."""
        query, (factor, shift) = self.content_query[pairs, :, queries], SEMANTIC_POSITION
        make = functools.partial(query.new_full, (1, 1, 1), 1 + shift)
        start = self.inputs.visibility.derived(("scale", query.dtype, query.device), make)
        return self.content_key.products(query, pairs, keys, factor, start)

    def _by_pair(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(batch or 1, heads or 1, ...)` as `(pairs or 1, heads that share keys or 1, ...)`."""
        if tensor.shape[:2] == (1, 1):
            return tensor
        batch, kv_heads = self.inputs.key.shape[:2]
        by_kv_head = tensor.unflatten(1, (kv_heads, -1)) if tensor.shape[1] > 1 else tensor.unsqueeze(1)
        return by_kv_head.expand(batch, kv_heads, *by_kv_head.shape[2:]).flatten(0, 1)

    def _by_head(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """All pairs, one after the other, as `(batch, heads, ...)`."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)  # of one, cat would make a copy
        return whole.view(*self.inputs.query.shape[:2], *parts[0].shape[2:])


def _streams(inputs: Inputs) -> bool:
    """Whether keys are taken a few at a time: by a single query on a CPU, which needs each of them once.

    What is made of them, without rotation and in the dtype that is computed in, then stays in the cache.
    """
    return inputs.query.shape[2] == 1 and inputs.query.device.type == "cpu" and not torch.compiler.is_compiling()


class _Keys:
    """Something that belongs to keys, by pair: as a whole, or made anew for every use, a few keys at a time.

    Args:
        make: Makes it of some keys, `(batch, kv_heads, keys, width)`.
        num_keys: How many there are.
        at_once: How many at a time.
        dtype: What to compute in.
    """

    def __init__(self, make: Callable[[slice], torch.Tensor], num_keys: int, at_once: int, dtype: torch.dtype):
        self._of = lambda keys: make(keys).to(dtype).flatten(0, 1)
        self._at_once = at_once
        self._whole = self._of(slice(0, num_keys)) if at_once >= num_keys else None

    def _pieces(self, pairs: slice, keys: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._whole is not None:
            yield keys, self._whole[pairs, keys]
            return
        for start in range(0, keys.stop, self._at_once):
            piece = slice(start, min(start + self._at_once, keys.stop))
            yield piece, self._of(piece)[pairs]

    def products(
        self, query: torch.Tensor, pairs: slice, keys: slice, factor: float, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Times a factor and shifted, `(pairs, heads, queries, keys)`, without repeating keys for the heads that share
        them: one operation."""
        rows, is_shifted = query.flatten(1, 2), shift is not None
        start = query.new_empty(1, 1, 1) if shift is None else shift  # what is empty is not read
        products = [
            torch.baddbmm(start, rows, key.transpose(1, 2), beta=int(is_shifted), alpha=factor)
            for _, key in self._pieces(pairs, keys)
        ]
        whole = products[0] if len(products) == 1 else torch.cat(products, -1)  # of one, cat would make a copy
        return whole.view(*query.shape[:3], -1)

    def weighted(self, weights: torch.Tensor, pairs: slice, keys: slice) -> torch.Tensor:
        """The sums of values by their weights, `(pairs, heads, queries, value_dim)`."""
        rows = weights.flatten(1, 2)
        sums = [torch.bmm(rows[..., piece], value) for piece, value in self._pieces(pairs, keys)]
        return functools.reduce(torch.add, sums).view(*weights.shape[:3], -1)


@dataclass(eq=False)
class _Block:
    """What is known of some queries and keys beside their scores; axes as in `_Rows`.

    Attributes:
        always: So many keys, from the first on, are seen by every query.
        distance: Number of real tokens between query and key, `(.., .., queries, keys)`.
        fall: What `fall_to` makes of the largest distance to a key that a query sees, `(.., .., queries, 1)`.
        hidden: Which of the other keys a query does not see, `(.., .., queries, keys - always)`. `None`: it sees all.
        bias: What a mask adds to the scores, shaped like `distance`, or `None`.
        applies: Which pairs are reweighted, shaped like `distance`. `None`: all.
    """

    always: int
    distance: torch.Tensor
    fall: torch.Tensor
    hidden: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    applies: torch.Tensor | None = None

    def of(self, pairs: slice) -> _Block:
        """What is known of some pairs."""
        own: dict[str, Any] = {
            name: fact[pairs] for name, fact in vars(self).items() if torch.is_tensor(fact) and len(fact) > 1
        }
        return replace(self, **own)

    def exponentials(
        self, scores: torch.Tensor, needs_least: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What softmax divides by its sum, and if needed each row's least logarithm of it. Overwrites the scores."""
        if self.hidden is not None:
            scores[..., self.always :].masked_fill_(self.hidden, _lowest(scores))
        scores = torch.sub(scores, scores.detach().amax(-1, keepdim=True), **over(scores))
        least = self.least(scores) if needs_least else None
        return torch.exp2(scores, **over(scores)), least

    def boost(self, scale: torch.Tensor, config: Steps, log_least: torch.Tensor | None) -> torch.Tensor:
        """`distance_boost` from 1 + sem_pos, which it overwrites, and the log of a query's least weight, if needed."""
        dc_floor, re_floor = config.floors
        dc_exponent = dc_floor.exponent(log_least)
        re_exponent = dc_exponent if re_floor == dc_floor else re_floor.exponent(log_least)
        strengths = config.dc_strength, config.re_strength
        return boost_that_falls(scale, self.distance, self.fall, dc_exponent, re_exponent, *strengths)

    def least(self, scores: torch.Tensor) -> torch.Tensor:
        """The least score that each query sees, `(.., .., queries, 1)`."""
        if self.hidden is None:
            return scores.amin(-1, keepdim=True)
        least = scores[..., self.always :].masked_fill(self.hidden, -_lowest(scores)).amin(-1, keepdim=True)
        return torch.minimum(least, scores[..., : self.always].amin(-1, keepdim=True)) if self.always else least


def _lowest(tensor: torch.Tensor) -> float:
    # Finite, so that the rows of padding, which see nothing, come out finite.
    return torch.finfo(tensor.dtype).min / 2

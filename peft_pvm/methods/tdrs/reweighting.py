"""How T-DRS weighs the scores of one layer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ...attention.call import AttentionCall, Output, records_gradients
from ...attention.reference import products
from ...attention.rotation import Tables, between, inverse, rotate, rotation_tables
from ...tokens.context import VisualContext
from .blockwise import Inputs, blockwise_attention
from .reference import reweighted
from .weights import Steps


POSITIONS = "position_ids"  # what is kept of every token in the memory


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def keep_positions(context: VisualContext) -> None:
    """Have the position of every token kept in the memory, as the rotary embedding is given it."""
    context.keeps[POSITIONS] = lambda context: context.noted()[0]


class Reweighting:
    """How the scores of one layer are weighed, by one adapter.

    Args:
        config: The adapter's configuration.
        rotary: The text model's rotary embedding; `None` in a layer that does not rotate.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
    """

    def __init__(self, config: Steps, rotary: nn.Module | None, layer_type: str | None):
        self.config = config
        self.rotary = rotary
        self.layer_type = layer_type

    def attend(self, call: AttentionCall) -> Output:
        """What the attention function returns."""
        query, key = call.scored_by
        inter = None
        if self.config.pairs == "inter":
            if call.context.memory.is_empty:  # no pair of a text and a visual token
                return call.run_kernel()
            inter = call.visual_queries, call.visual_keys
        content_query, content_key = self.contents(call)
        inputs = Inputs(
            query,
            key,
            call.value,
            content_query,
            content_key,
            call.visibility,
            inter,
            call.scaling,
            call.kwargs.get("softcap"),
            call.kwargs.get("dropout", 0.0),
        )
        if self.takes_triton(inputs, call.wants_weights):
            from .triton_kernel import triton_attention

            return triton_attention(inputs, self.config), None
        return blockwise_attention(inputs, self.config, call.wants_weights)

    def reference(self, call: AttentionCall, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The weights in their plainest form: see `Weights`."""
        content_query, content_key = self.contents(call)
        similarity = products(content_query, content_key(slice(None)))
        key_ranks, query_ranks = call.visibility.ranks()
        distance = (query_ranks.unsqueeze(-1) - key_ranks.unsqueeze(-2)).to(scores.dtype)
        inter = call.visual_queries[:, None, :, None] != call.visual_keys[:, None, None]
        return reweighted(self.config, scores, similarity, distance, hidden, inter).nan_to_num()

    def takes_triton(self, inputs: Inputs, wants_weights: bool) -> bool:
        """Whether the Triton kernel computes it."""
        if self.config.kernel == "blockwise":
            return False
        if self.config.kernel == "triton":
            if wants_weights:
                raise NotImplementedError(
                    "The Triton kernel does not return attention weights. Use TDRSConfig(kernel='auto')."
                )
            if not _has_triton():
                raise ImportError("TDRSConfig(kernel='triton') needs Triton, which is not installed.")
            if torch.compiler.is_compiling():
                raise NotImplementedError(
                    "torch.compile cannot take in the Triton kernel. Use TDRSConfig(kernel='auto'), which computes in "
                    "PyTorch there."
                )
            return True
        needs_blockwise = wants_weights or inputs.dropout > 0 or inputs.query.dtype == torch.float64
        records = records_gradients(inputs.query, inputs.key, inputs.value)
        needs_blockwise |= torch.compiler.is_compiling()  # inductor fails on the kernel
        return inputs.query.is_cuda and _has_triton() and not needs_blockwise and not records

    def contents(self, call: AttentionCall) -> tuple[torch.Tensor, Callable[[slice], torch.Tensor]]:
        """Queries without position, of length 1, and a function that gives the same of some keys."""
        rotary = self.rotary
        if rotary is None:
            return F.normalize(call.query, dim=-1), lambda keys: F.normalize(call.key[:, :, keys], dim=-1)
        context, num_queries, num_keys = call.context, call.query.shape[2], call.key.shape[2]
        own, _ = context.noted()
        positions = context.memory.kept.get(POSITIONS)
        if positions is None:
            raise RuntimeError(
                "The KV cache holds tokens whose positions nobody kept: T-DRS must be attached from the first token "
                "on. Start with a new cache."
            )
        of_keys = positions[:, max(positions.shape[1] - num_keys, 0) :]
        of_keys = F.pad(of_keys, (0, 0, 0, num_keys - of_keys.shape[1]))  # what a static cache has not filled yet

        def undo(what: str, positions: torch.Tensor) -> Tables:
            key = ("tdrs", what, self.layer_type, positions.shape[1])
            return context.derived(key, lambda: inverse(rotation_tables(rotary, positions, self.layer_type)))

        def content(states: torch.Tensor, tables: Tables) -> torch.Tensor:
            return F.normalize(rotate(call.module, states, tables), dim=-1)

        to_keys = undo("keys", of_keys)
        query = content(call.query, undo("queries", own[:, -num_queries:]))
        return query, lambda keys: content(call.key[:, :, keys], between(to_keys, keys.start, keys.stop))

"""How T-DRS weighs the scores of one layer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import AttentionCall
from ..rotation import Tables, between, inverse, rotate, rotation_tables
from .blockwise import Inputs, blockwise_attention
from .config import TDRSConfig


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Reweighting:
    """How the scores of one layer are weighed, by one adapter.

    Args:
        config: The adapter's configuration.
        rotary: The text model's rotary embedding; `None` in a layer that does not rotate.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
    """

    def __init__(self, config: TDRSConfig, rotary: nn.Module | None, layer_type: str | None):
        self.config = config
        self.rotary = rotary
        self.layer_type = layer_type

    def attend(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention function returns: `(batch, num_queries, heads, value_dim)`, and weights or `None`."""
        inter = None
        if self.config.pairs == "inter":
            if call.context.memory.is_empty:  # no pair of a text and a visual token
                return call.run_kernel(query, key, call.value)
            inter = call.visual_queries, call.context.visual_keys(key.shape[2])
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
        if self._takes_triton(inputs, call.wants_weights):
            from .triton_kernel import triton_attention

            return triton_attention(inputs, self.config), None
        return blockwise_attention(inputs, self.config, call.wants_weights)

    def _takes_triton(self, inputs: Inputs, wants_weights: bool) -> bool:
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
        needs_blockwise |= torch.compiler.is_compiling()  # inductor fails on the kernel
        records = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (inputs.query, inputs.key, inputs.value)
        )
        return inputs.query.is_cuda and _has_triton() and not needs_blockwise and not records

    def contents(self, call: AttentionCall) -> tuple[torch.Tensor, Callable[[slice], torch.Tensor]]:
        """Queries without position, of length 1, and a function that gives the same of some keys."""
        rotary = self.rotary
        if rotary is None:
            return F.normalize(call.query, dim=-1), lambda keys: F.normalize(call.key[:, :, keys], dim=-1)
        context, num_queries, num_keys = call.context, call.query.shape[2], call.key.shape[2]
        own, _ = context.noted()
        positions = context.memory.position_ids
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

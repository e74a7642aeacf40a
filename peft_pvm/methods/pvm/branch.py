"""What one PVM branch computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ...tokens.context import VisualContext
from ...tokens.positions import EMPTY_SLOT, causally_visible, gather_rows, pack, scatter_rows
from .config import BranchShape, PVMConfig


LOWEST = torch.finfo(torch.float32).min / 2


class Gate(nn.Module):
    """One learnable scalar. It is a module, so that offloading finds its weight as it finds any other.

    Args:
        value: Its initial value.
    """

    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), float(value)))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor times the scalar."""
        return self.weight * tensor


def fresh_weights(config: PVMConfig, shape: BranchShape) -> dict[str, Any]:
    """The modules of a new branch, initialised as `config` says, by their names in `WEIGHTS`."""
    width, heads, kv_heads = shape.r, shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    linears = {
        "text_reducer": (shape.hidden_size, width),
        "vision_reducer": (shape.hidden_size, width),
        "q_proj": (width, heads),
        "k_proj": (width, kv_heads),
        "v_proj": (width, kv_heads),
        "o_proj": (heads, width),
        "gate_proj": (width, shape.intermediate_size),
        "up_proj": (width, shape.intermediate_size),
        "down_proj": (shape.intermediate_size, width),
        "output_expander": (width, shape.hidden_size),
    }
    norms = {"input_norm": width, "q_norm": shape.head_dim, "k_norm": shape.head_dim, "post_attn_norm": width}
    gate = Gate(config.init_gate)
    if not config.init_weights:
        nn.init.normal_(gate.weight)
    weights: dict[str, Any] = {"gate": gate}
    for name, (in_features, out_features) in linears.items():
        linear = nn.Linear(in_features, out_features, bias=False)
        nn.init.normal_(linear.weight, std=shape.initializer_range)
        weights[name] = linear
    for name, features in norms.items():
        weights[name] = nn.RMSNorm(features, eps=shape.eps)
    return weights


@dataclass(eq=False)  # not frozen: torch.compile would hash it by its fields
class Branch:
    """One branch at one decoder layer. Its weights are submodules of the layer, where PEFT wants them.

    Keys and values are kept under the branch that projected them. With other weights, it is another branch.

    Attributes:
        config: What it was made with.
        shape: Its sizes.
        layer_idx: Index of the decoder layer.
        cast: Brings an input to the dtype of the weights, unless PEFT was told to leave it.
    """

    config: PVMConfig
    shape: BranchShape
    layer_idx: int
    cast: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    text_reducer: nn.Linear
    vision_reducer: nn.Linear
    input_norm: nn.RMSNorm
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.RMSNorm
    k_norm: nn.RMSNorm
    post_attn_norm: nn.RMSNorm
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    output_expander: nn.Linear
    gate: Gate

    def update(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """What it adds to the residual stream.

        Args:
            hidden_states: The residual stream after self-attention, `(batch, seq_len, hidden_size)`.
            context: What is known about visual tokens in a forward of only these tokens.

        Returns:
            `(batch, seq_len, hidden_size)` in the dtype of `hidden_states`, exactly 0 at visual tokens and in rows
            without images; `None` if no token reads.
        """
        bank = self._bank(hidden_states, context)
        view = view_of_memory(context, self.config.memory_visibility)
        if view is None:
            return None
        keys, values = self._project(bank, context)
        queries = self._queries(hidden_states, view)
        # Keys may have been kept under another autocast dtype.
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        is_grouped = self.shape.num_heads != self.shape.num_key_value_heads
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=view.mask, enable_gqa=is_grouped)
        update = self.complete(attended.transpose(1, 2).flatten(2)).to(hidden_states.dtype)
        if view.positions is not None:
            update = scatter_rows(update, view.positions, hidden_states.shape[1])
        return update if view.has_memory is None else torch.where(view.has_memory, update, 0)

    def queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The queries of hidden states: `(..., hidden_size)` to `(..., num_heads, head_dim)`."""
        text = self.input_norm(self.text_reducer(self.cast(hidden_states, self.text_reducer.weight.dtype)))
        return self.q_norm(self.q_proj(text).unflatten(-1, (-1, self.shape.head_dim)))

    def keys_and_values(self, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of visual tokens: `(..., hidden_size)` to `(..., num_key_value_heads, head_dim)` each."""
        memory = self.vision_reducer(self.cast(bank, self.vision_reducer.weight.dtype))
        keys = self.k_norm(self.k_proj(memory).unflatten(-1, (-1, self.shape.head_dim)))
        return keys, self.v_proj(memory).unflatten(-1, (-1, self.shape.head_dim))

    def complete(self, attended: torch.Tensor) -> torch.Tensor:
        """The update made of what attention read: `(..., num_heads * head_dim)` to `(..., hidden_size)`; 0 to 0."""
        attended = self.o_proj(attended)
        normed = self.post_attn_norm(attended)
        latent = attended + self.down_proj(
            ACT2FN[self.shape.hidden_act](self.gate_proj(normed)) * self.up_proj(normed)
        )
        expanded = self.output_expander(latent)
        return self.gate(F.rms_norm(expanded, expanded.shape[-1:], eps=self.shape.eps))

    def retrieval(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """Which visual tokens each token reads, for inspection: the weights of the cross-attention.

        Args:
            hidden_states: The residual stream after self-attention, `(batch, seq_len, hidden_size)`.
            context: What is known about visual tokens in a forward of only these tokens.

        Returns:
            `(batch, num_heads, seq_len, num_visual)`, fp32, each row adding up to 1, or 0 everywhere for a token that
            does not read; `None` if none does.
        """
        view = view_of_memory(context, self.config.memory_visibility)
        if view is None or context.memory.is_empty:
            return None
        keys, _ = self._project(self._bank(hidden_states, context), context)
        queries = self._queries(hidden_states, view).float()
        keys = keys.float().repeat_interleave(self.shape.num_heads // self.shape.num_key_value_heads, 1)
        scores = queries @ keys.transpose(2, 3) * self.shape.head_dim**-0.5
        if view.mask is not None:
            scores = scores.masked_fill(~view.mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if view.positions is not None:
            by_token = weights.transpose(1, 2).flatten(2)
            by_token = scatter_rows(by_token, view.positions, hidden_states.shape[1])
            weights = by_token.unflatten(2, (self.shape.num_heads, -1)).transpose(1, 2)
        return weights if view.has_memory is None else torch.where(view.has_memory.unsqueeze(1), weights, 0)

    def _bank(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor:
        """The states of visual tokens that keys and values are made from, `(batch, num_visual, hidden_size)`."""
        if context.memory.is_empty:  # no token reads it or, in training, only padding
            return hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[2])
        if self.config.memory_source == "hidden_states":
            return bank_of_hidden_states(context, self.layer_idx, hidden_states)
        return context.memory.embeddings

    def _queries(self, hidden_states: torch.Tensor, view: MemoryView) -> torch.Tensor:
        """The queries of the tokens that read, `(batch, num_heads, num_queries, head_dim)`."""
        readers = hidden_states if view.positions is None else gather_rows(hidden_states, view.positions)
        return self.queries(readers).transpose(1, 2)

    def _project(self, bank: torch.Tensor, context: VisualContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the memory, `(batch, num_key_value_heads, num_visual, head_dim)` each.

        In inference they are kept with the memory, so that every visual token is projected once.
        """
        keeps = not context.records_gradients
        known = context.memory.projections.get(weakref.ref(self)) if keeps else None
        num_known = 0 if known is None else known[0].shape[2]
        if known is not None and num_known == bank.shape[1]:
            return known
        keys, values = (tensor.transpose(1, 2) for tensor in self.keys_and_values(bank[:, num_known:]))
        if known is not None:
            keys, values = torch.cat([known[0], keys], 2), torch.cat([known[1], values], 2)
        if keeps:
            context.memory.keep_projections(self, keys, values)
        return keys, values


@dataclass(eq=False)
class MemoryView:
    """Which tokens of a forward read the memory, and which part of it each may see.

    Attributes:
        positions: Positions, inside this forward, of the tokens that read, `(batch, num_queries)`, int64, `EMPTY_SLOT`
            for padding. `None`: every token reads.
        mask: What each may attend to, `(batch, 1, num_queries or 1, num_visual)`, bool; no row is all False. `None`:
            everything.
        has_memory: Rows with something to read, `(batch, 1, 1)`, bool; the others get exactly zero. `None`: all.
    """

    positions: torch.Tensor | None
    mask: torch.Tensor | None
    has_memory: torch.Tensor | None


def view_of_memory(context: VisualContext, visibility: str) -> MemoryView | None:
    """Which tokens read the memory in a forward, for one rule of visibility; `None` if none does.

    If gradients are recorded, some token always reads, even if it is padding whose output is dropped: a rank of a
    sharded model that skipped the branch would leave the others waiting in their collectives.

    Args:
        context: Of the forward.
        visibility: "causal": a token sees the visual tokens before it. "sample": all known ones in its row of a batch.
    """
    return context.derived(("view", visibility), lambda: _make_view(context, visibility))


def _make_view(context: VisualContext, visibility: str) -> MemoryView | None:
    memory = context.memory
    if memory.is_empty:
        if not context.records_gradients:
            return None
        nobody = torch.full((context.batch_size, 1), EMPTY_SLOT, device=context.device)
        return MemoryView(nobody, None, None)
    if context.visual_mask is None and memory.is_dense:  # the decode path: all of it comes before every token
        return MemoryView(None, None, None)
    filled = memory.slots >= 0
    if context.visual_mask is None:
        has_memory = filled.any(1)[:, None, None]
        return MemoryView(None, (filled[:, None] | ~has_memory).unsqueeze(1), has_memory)

    # Only the tokens that are not silenced read: text with a visual token in sight.
    if visibility == "causal":
        reads = context.text_after_images()
    else:
        reads = ~context.visual_mask & filled.any(1, keepdim=True)
    positions = pack(reads, min_length=int(context.records_gradients))
    if positions.shape[1] == 0:
        return None
    if visibility == "causal":
        mask = causally_visible(memory.slots, context.own_slots().gather(1, positions.clamp(min=0)))
    else:
        mask = filled.unsqueeze(1).expand(-1, positions.shape[1], -1)
    mask = mask | (positions < 0).unsqueeze(-1)
    return MemoryView(positions, None if bool(mask.all()) else mask.unsqueeze(1), None)


def bank_of_hidden_states(context: VisualContext, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """The hidden states at one layer of all visual tokens in memory, this forward's included.

    Args:
        context: Of the forward.
        layer_idx: The layer.
        hidden_states: This forward's, `(batch, seq_len, hidden_size)`.

    Returns:
        `(batch, num_visual, hidden_size)`, detached.

    Raises:
        RuntimeError: The memory holds tokens whose hidden states were not kept.
    """
    memory = context.memory
    bank = memory.hidden_states.get(layer_idx)
    num_visual = memory.slots.shape[1]
    if bank is not None and bank.shape[1] == num_visual:
        return bank
    pieces = [] if bank is None else [bank]
    if context.visual_positions is not None:
        pieces.append(gather_rows(hidden_states.detach(), context.visual_positions))
    if sum(piece.shape[1] for piece in pieces) != num_visual:
        raise RuntimeError(
            f"Layer {layer_idx} did not keep the hidden states of all images in this KV cache: an adapter with "
            "memory_source='hidden_states' must be active from the first image on, in layers that compute the "
            "whole prompt. Start with a new cache."
        )
    bank = memory.hidden_states[layer_idx] = torch.cat(pieces, 1)
    return bank


class PlainBranch(Branch):
    """A branch that keeps nothing from one step to the next, in eager attention, for visual tokens as well.

    Its memory is of embeddings, and a token sees the visual tokens before it.
    """

    def update(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """See `Branch.update`."""
        bank, shape = context.memory.embeddings, self.shape
        if context.memory.is_empty:
            return None
        sees = causally_visible(context.memory.slots, context.own_slots())
        text = self.input_norm(self.text_reducer(hidden_states))
        memory = self.vision_reducer(bank)
        groups = shape.num_heads // shape.num_key_value_heads
        query = self.q_norm(self._heads(self.q_proj(text)))
        key = self.k_norm(self._heads(self.k_proj(memory))).repeat_interleave(groups, 1)
        value = self._heads(self.v_proj(memory)).repeat_interleave(groups, 1)
        scores = (query @ key.transpose(2, 3) * shape.head_dim**-0.5).float().masked_fill(~sees[:, None], LOWEST)
        attended = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        attended = self.o_proj(attended)
        normed = self.post_attn_norm(attended)
        latent = attended + self.down_proj(ACT2FN[shape.hidden_act](self.gate_proj(normed)) * self.up_proj(normed))
        expanded = self.output_expander(latent)
        update = self.gate(F.rms_norm(expanded, expanded.shape[-1:], eps=shape.eps))
        reads = sees.any(-1)
        if context.visual_mask is not None:
            reads = reads & ~context.visual_mask
        return update * reads.unsqueeze(-1)

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

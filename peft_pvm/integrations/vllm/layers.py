"""What is added to vLLM's decoder layers: PVM's branches in the paged cache, and attention with wider heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention

from ...methods.dipe import DIPEConfig
from ...methods.log_bias import LogBiasConfig
from ...methods.pvm import PVMConfig
from ...methods.pvm.branch import Branch, fresh_weights
from ...methods.pvm.config import BranchShape, weight_name
from ...methods.vaf import VAFConfig
from .widening import (
    BIAS_CHANNELS,
    anchored_across_modalities,
    scaled_for_some,
    supported_width,
    visual_keys_only,
    with_bias,
)


class Acting(NamedTuple):
    """An adapter that acts on a layer.

    Attributes:
        number: Which of the adapters it is.
        config: Its configuration.
    """

    number: int
    config: Any


class Tokens(NamedTuple):
    """What is known of the tokens of a forward. vLLM's layers hand it down as `positions`.

    Attributes:
        positions: `(axes, num_tokens)`, or of one axis `(num_tokens,)`, int64.
        visual_mask: `(num_tokens,)`, bool.
        after_image: Which have a visual token at their place or before it, `(num_tokens,)`, bool.
        anchors: `(num_tokens,)`, int64; where no adapter needs them, 0.
        inputs_embeds: What enters the first decoder layer, `(num_tokens, hidden_size)`.
        switches: 1 for each adapter that is on for a token, else 0, `(num_tokens, num_adapters)`, fp32.
    """

    positions: torch.Tensor
    visual_mask: torch.Tensor
    after_image: torch.Tensor
    anchors: torch.Tensor
    inputs_embeds: torch.Tensor
    switches: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions. vLLM's layers may ask for it."""
        return self.positions.shape

    def on(self, adapters: Sequence[Acting]) -> torch.Tensor:
        """The tokens for which one of some adapters is on, `(num_tokens,)`, bool."""
        return torch.stack([self.switches[:, adapter.number] for adapter in adapters]).any(0)

    def setting(self, adapters: Sequence[Acting], name: str) -> torch.Tensor:
        """The value of a setting in the one of some adapters that is on, `(num_tokens,)`, fp32; 0 where none is."""
        values = [getattr(adapter.config, name) * self.switches[:, adapter.number] for adapter in adapters]
        return torch.stack(values).sum(0)


class WideAttention(Attention):
    """An attention layer whose queries and keys have more channels than its values and its output.

    Args:
        least: How many channels queries and keys have at least; `head_size` is how many they must have.
        head_dim: How many values have.
        num_heads: Of queries.
        num_kv_heads: Of keys and values.
        scale: Of scores.
        like: A layer of the same model, for its backend.
        cache_config: vLLM's.
        prefix: Its name in the model.
        sliding_window: How far back a token sees; `None`: to the first.

    Raises:
        NotImplementedError: No kernel is wide enough, or vLLM gives a sliding window to a layer that shall have none.
    """

    def __init__(
        self,
        least: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        *,
        like: Attention,
        cache_config: CacheConfig | None,
        prefix: str,
        sliding_window: int | None = None,
    ):
        width = supported_width(least, like.attn_backend.supports_head_size)
        super().__init__(
            num_heads,
            width,
            scale,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            per_layer_sliding_window=sliding_window,
            prefix=prefix,
        )
        if self.sliding_window != sliding_window:
            raise NotImplementedError(
                f"The base attends within {self.sliding_window} tokens in all layers, and PVM's branch would as well."
            )
        self.head_dim = head_dim

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, heads * channels)` each, of up to `head_size` channels, to
        `(num_tokens, num_heads * head_dim)`."""
        wide = [
            self._widened(part, count)
            for part, count in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        ]
        return super().forward(*wide).unflatten(-1, (-1, self.head_size))[..., : self.head_dim].flatten(1)

    def _widened(self, part: torch.Tensor, num_heads: int) -> torch.Tensor:
        heads = part.unflatten(-1, (num_heads, -1))
        return F.pad(heads, (0, self.head_size - heads.shape[-1])).flatten(1)


class PagedBranches(nn.Module):
    """The branches of a PVM adapter in one decoder layer, with keys and values in the paged cache.

    Args:
        adapter: The adapter.
        text_config: The base model's, which the sizes come from.
        layer_idx: Of the decoder layer.
        like: The decoder layer's own attention.
        cache_config: vLLM's.
        prefix: What the names of its attention layers begin with.
    """

    def __init__(
        self,
        adapter: Acting,
        text_config: Any,
        layer_idx: int,
        like: Attention,
        cache_config: CacheConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.adapter = adapter
        config: PVMConfig = adapter.config
        self.branches: list[Branch] = []
        self.attentions = nn.ModuleList()
        for number, part in enumerate(config.parts()):
            if layer_idx not in part.layer_indices:
                continue
            shape = BranchShape.of(part, text_config)
            weights = fresh_weights(part, shape)
            for name, module in weights.items():
                self.add_module(weight_name(name, number), module)
            self.branches.append(Branch(part, shape, layer_idx, torch.Tensor.to, **weights))
            sizes = shape.head_dim + 1, shape.head_dim, shape.num_heads, shape.num_key_value_heads
            place = dict(like=like, cache_config=cache_config, prefix=f"{prefix}_{number}")
            self.attentions.append(WideAttention(*sizes, shape.head_dim**-0.5, **place))

    def forward(self, hidden_states: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What they add to the residual stream after self-attention, `(num_tokens, hidden_size)`.

        It is exactly 0 at visual tokens, where none has been seen, and where the adapter is off.
        """
        update = torch.zeros_like(hidden_states)
        for branch, attention in zip(self.branches, cast(Any, self.attentions)):
            bank = hidden_states if branch.config.memory_source == "hidden_states" else tokens.inputs_embeds
            keys, values = branch.keys_and_values(bank)
            visible = visual_keys_only(branch.queries(hidden_states), keys, values, tokens.visual_mask)
            update = update + branch.complete(attention(*(part.flatten(1) for part in visible)))
        reads = ~tokens.visual_mask & tokens.on([self.adapter])
        return update.masked_fill(~reads[:, None], 0)


class SteeredRotary(nn.Module):
    """A decoder layer's rotary embedding, which makes queries and keys for the scores that adapters want.

    Args:
        base: vLLM's.
        adapters: Those without parameters that act on the layer.
        head_dim: Channels of a head.
        scaling: Of scores.

    Attributes:
        width: Channels of the heads that it makes.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[Acting], head_dim: int, scaling: float):
        super().__init__()
        self.base, self.head_dim, self.scaling = base, head_dim, scaling
        self.dipe, self.vaf, self.log_bias = (
            [adapter for adapter in adapters if isinstance(adapter.config, kind)]
            for kind in (DIPEConfig, VAFConfig, LogBiasConfig)
        )
        self.width = head_dim * (2 if self.dipe else 1) * (2 if self.vaf else 1)
        self.width += BIAS_CHANNELS if self.log_bias else 0

    def forward(self, positions: Tokens, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(num_tokens, heads * head_dim)` each to `(num_tokens, heads * width)`."""
        tokens = positions
        # Kernels may rotate in place.
        anchored = self._rotated(self._reached(tokens), query.clone(), key.clone())[0] if self.dipe else None
        query, key = self._rotated(tokens.positions, query, key)
        if anchored is not None:
            query, key = anchored_across_modalities(query, anchored, key, tokens.visual_mask & tokens.on(self.dipe))
        text_after_image = tokens.after_image & ~tokens.visual_mask
        if self.vaf:
            factors = torch.where(tokens.visual_mask, tokens.setting(self.vaf, "visual"), 1)
            factors = torch.where(tokens.after_image, factors, tokens.setting(self.vaf, "before"))
            query, key = scaled_for_some(query, key, factors, text_after_image & tokens.on(self.vaf))
        if self.log_bias:
            query, key = with_bias(
                query, key, self._raised(tokens, text_after_image), tokens.visual_mask.float(), self.scaling
            )
        return query.flatten(1), key.flatten(1)

    def _rotated(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = self.base(positions, query, key)
        return query.unflatten(-1, (-1, self.head_dim)), key.unflatten(-1, (-1, self.head_dim))

    def _reached(self, tokens: Tokens) -> torch.Tensor:
        """The positions that tokens have for those of the other modality, with DIPE."""
        reached = tokens.anchors + tokens.setting(self.dipe, "max_distance").long()
        return torch.minimum(tokens.positions, reached.expand_as(tokens.positions))

    def _raised(self, tokens: Tokens, rows: torch.Tensor) -> torch.Tensor:
        """What Log-bias adds to the scores of visual keys for some queries."""
        first = tokens.positions if tokens.positions.dim() == 1 else tokens.positions[0]
        text = (first - tokens.anchors + 1).float()
        raised = (text / tokens.setting(self.log_bias, "t0")).log1p()
        return torch.where(rows & tokens.on(self.log_bias), raised, 0)


def steer_attention(attention: Any, adapters: Sequence[Acting], vllm_config: VllmConfig) -> None:
    """Give the scores that adapters want to a layer's attention, which may have a sliding window and own rotations."""
    narrow = attention.attn
    del vllm_config.compilation_config.static_forward_context[narrow.layer_name]
    rotary = SteeredRotary(attention.rotary_emb, adapters, attention.head_dim, attention.scaling)
    attention.attn = WideAttention(
        rotary.width,
        attention.head_dim,
        attention.num_heads,
        attention.num_kv_heads,
        attention.scaling,
        like=narrow,
        cache_config=vllm_config.cache_config,
        prefix=narrow.layer_name,
        sliding_window=narrow.sliding_window,
    )
    attention.rotary_emb = rotary
    attention.use_fused_qk_norm_rope_gate = False  # a kernel for Qwen3.5 on a GPU, which rotates by itself

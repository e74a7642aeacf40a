"""vLLM's models with PVM and DIPE: our classes are made from its own, whichever they are.

- A model (`served`) labels the positions of a prompt: which tokens are visual, and their anchors. vLLM carries them
  along and continues them for generated tokens.
- Its text model (`with_adapters`) takes the labels off again and hands them down to its layers as `Tokens`.
- In a decoder layer, PVM's branch is a second attention layer beside the layer's own. Its keys and values lie in
  vLLM's paged cache, of every token, but those of text are hidden (`export.py`): so they are batched, chunked, cached
  with a prefix and freed as any others are. DIPE makes the heads of the layer's own attention twice as wide.

Under tensor parallelism every rank computes the whole branch, which is small, and nothing is exchanged for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vllm import ModelRegistry
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.multimodal.inputs import MultiModalFeatureSpec

from ...methods.dipe import DIPEConfig
from ...methods.pvm import PVMConfig
from ...methods.pvm.branch import Branch, fresh_weights
from ...methods.pvm.config import BranchShape, weight_name
from .export import (
    acts_on,
    anchored_across_modalities,
    attach_labels,
    configs_of,
    detach_labels,
    supported_width,
    visual_keys_only,
)
from .families import FAMILIES, TEXT_MODELS, Family
from .standing import (
    refuse_other_layer,
    refuse_other_model,
    refuse_other_text_model,
    refuse_what_breaks,
    warn_of_other_version,
)


class Tokens(NamedTuple):
    """What is known of the tokens of a forward. vLLM's layers hand it down as `positions`.

    Attributes:
        positions: `(axes, num_tokens)`, or of one axis `(num_tokens,)`, int64.
        visual_mask: `(num_tokens,)`, bool.
        anchors: `(num_tokens,)`, int64; without DIPE, 0.
        inputs_embeds: What enters the first decoder layer, `(num_tokens, hidden_size)`.
    """

    positions: torch.Tensor
    visual_mask: torch.Tensor
    anchors: torch.Tensor
    inputs_embeds: torch.Tensor


class WideAttention(Attention):
    """An attention layer whose queries and keys have more channels than values and what comes out.

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
        """`(num_tokens, heads * head_size)` and values `(num_tokens, num_kv_heads * head_dim)` to `(num_tokens,
        num_heads * head_dim)`."""
        spare = (0, self.head_size - self.head_dim)
        attended = super().forward(query, key, F.pad(value.unflatten(-1, (-1, self.head_dim)), spare).flatten(1))
        return attended.unflatten(-1, (-1, self.head_size))[..., : self.head_dim].flatten(1)


class PagedBranches(nn.Module):
    """The PVM branches of one decoder layer, with keys and values in the paged cache.

    Args:
        config: The adapter's configuration.
        text_config: The base model's, which the sizes come from.
        layer_idx: Of the decoder layer.
        like: The decoder layer's own attention.
        cache_config: vLLM's.
        prefix: Its name in the model.
    """

    def __init__(
        self,
        config: PVMConfig,
        text_config: Any,
        layer_idx: int,
        like: Attention,
        cache_config: CacheConfig | None,
        prefix: str,
    ):
        super().__init__()
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
            place = dict(like=like, cache_config=cache_config, prefix=f"{prefix}.attn_{number}")
            self.attentions.append(WideAttention(*sizes, shape.head_dim**-0.5, **place))

    def forward(self, hidden_states: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What they add to the residual stream after self-attention, `(num_tokens, hidden_size)`.

        It is exactly 0 at visual tokens, and where none has been seen.
        """
        update = torch.zeros_like(hidden_states)
        for branch, attention in zip(self.branches, cast(Any, self.attentions)):
            bank = hidden_states if branch.config.memory_source == "hidden_states" else tokens.inputs_embeds
            keys, values = branch.keys_and_values(bank)
            visible = visual_keys_only(
                branch.queries(hidden_states), keys, values, tokens.visual_mask, attention.head_size
            )
            update = update + branch.complete(attention(*(part.flatten(1) for part in visible)))
        return update.masked_fill(tokens.visual_mask[:, None], 0)


class AnchoredRotary(nn.Module):
    """A decoder layer's rotary embedding, which makes queries and keys for DIPE's scores in a `WideAttention`.

    Args:
        base: vLLM's.
        head_dim: Channels of a head before.
        width: And after.
        max_distance: DIPE's.
    """

    def __init__(self, base: nn.Module, head_dim: int, width: int, max_distance: int):
        super().__init__()
        self.base, self.head_dim, self.width, self.max_distance = base, head_dim, width, max_distance

    def forward(self, positions: Tokens, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(num_tokens, heads * head_dim)` each to `(num_tokens, heads * width)`."""
        tokens = positions
        reached = (tokens.anchors + self.max_distance).expand_as(tokens.positions)
        if self.max_distance:
            reached = torch.minimum(tokens.positions, reached)
        anchored, _ = self.base(reached, query.clone(), key.clone())  # kernels may rotate in place
        rotated = *self.base(tokens.positions, query, key), anchored
        query, key, anchored = (part.unflatten(-1, (-1, self.head_dim)) for part in rotated)
        wide = anchored_across_modalities(query, anchored, key, tokens.visual_mask, self.width)
        return wide[0].flatten(1), wide[1].flatten(1)


def anchor_attention(attention: Any, dipe: DIPEConfig, vllm_config: VllmConfig) -> None:
    """Give DIPE's scores to a decoder layer's attention, which may have a sliding window and rotations of its own."""
    narrow, head_dim = attention.attn, attention.head_dim
    del vllm_config.compilation_config.static_forward_context[narrow.layer_name]
    attention.attn = WideAttention(
        2 * head_dim,
        head_dim,
        attention.num_heads,
        attention.num_kv_heads,
        attention.scaling,
        like=narrow,
        cache_config=vllm_config.cache_config,
        prefix=narrow.layer_name,
        sliding_window=narrow.sliding_window,
    )
    width = attention.attn.head_size
    attention.rotary_emb = AnchoredRotary(attention.rotary_emb, head_dim, width, dipe.max_distance or 0)


@functools.cache
def layer_with_adapters(native: type[nn.Module]) -> type[nn.Module]:
    """The class of a decoder layer that takes `Tokens`, made from vLLM's."""

    class DecoderLayer(native):  # type: ignore[valid-type,misc]
        pvm: PagedBranches | None

        def forward(
            self, positions: Tokens, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """As vLLM's, which returns what its FFN adds, and the residual stream after self-attention."""
            is_anchored = isinstance(self.self_attn.rotary_emb, AnchoredRotary)
            hidden_states, residual = super().forward(
                positions if is_anchored else positions.positions, hidden_states, residual, **kwargs
            )
            if self.pvm is not None:
                hidden_states = hidden_states + self.pvm(residual, positions)
            return hidden_states, residual

    return DecoderLayer


@functools.cache
def with_adapters(native: type[nn.Module]) -> type[nn.Module]:
    """The class of a text model that takes positions with labels, made from vLLM's."""

    class TextModel(native):  # type: ignore[valid-type,misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            pvm, dipe = configs_of(self.config)
            for layer_idx, layer in enumerate(self.layers):
                refuse_other_layer(layer)
                layer.__class__ = layer_with_adapters(layer.__class__)
                like, layer.pvm = layer.self_attn.attn, None
                if pvm is not None and layer_idx in pvm.layer_indices:
                    place = vllm_config.cache_config, f"{prefix}.layers.{layer_idx}.pvm"
                    layer.pvm = PagedBranches(pvm, self.config, layer_idx, like, *place)
                if dipe is not None and acts_on(dipe, layer_idx):
                    anchor_attention(layer.self_attn, dipe, vllm_config)

        def forward(
            self,
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            deepstack_input_embeds: Any = None,
        ) -> Any:
            """As vLLM's, of which only Qwen3-VL's have the last argument.

            vLLM's compilation finds arguments by these names.
            """
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(input_ids)
            # A copy: kernels that add in place write the residual stream of later layers into what enters the first.
            tokens = Tokens(*detach_labels(positions), inputs_embeds.clone())
            deepstack = () if deepstack_input_embeds is None else (deepstack_input_embeds,)
            return super().forward(None, tokens, intermediate_tensors, inputs_embeds, *deepstack)

    return TextModel


@contextmanager
def _text_model_with_adapters(text_type: str) -> Iterator[type[nn.Module]]:
    """vLLM has no other place to say which class a model's text model is of."""
    module, name = TEXT_MODELS[text_type]
    builder = import_module(f"vllm.model_executor.models.{module}")
    native = getattr(builder, name)
    setattr(builder, name, with_adapters(native))
    try:
        yield with_adapters(native)
    finally:
        setattr(builder, name, native)


@functools.cache
def served(family: Family) -> type[nn.Module]:
    """The class of a model with the adapters that `export_vllm` wrote into its config, made from vLLM's."""
    native = ModelRegistry.models[family.native].load_model_cls()

    class Model(native):  # type: ignore[valid-type,misc]
        """A model of vLLM's with adapters.

        Raises:
            NotImplementedError: vLLM has other insides than this stands on, or was started with what breaks this.
        """

        supports_mrope: ClassVar[Literal[True]] = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            text_config = vllm_config.model_config.hf_config.get_text_config()
            has_anchors = configs_of(text_config)[1] is not None
            warn_of_other_version()
            refuse_what_breaks(vllm_config, has_anchors)
            refuse_other_model(native, family)
            with _text_model_with_adapters(text_config.model_type) as text_model:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            refuse_other_text_model(self, text_model)
            self.has_anchors = has_anchors

        def forward(
            self,
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            """As vLLM's."""
            of_native = positions if family.makes_positions else positions[0]  # the three rows are the same
            return super().forward(input_ids, of_native, intermediate_tensors, inputs_embeds, **kwargs)

        def get_mrope_input_positions(
            self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
        ) -> tuple[torch.Tensor, int]:
            """Positions of a prompt and the constant for what follows, both with labels."""
            if family.makes_positions:
                positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
            else:
                positions, delta = torch.arange(len(input_tokens)).expand(3, -1), 0
            visual_mask = torch.zeros(len(input_tokens), dtype=torch.bool)
            for feature in mm_features:
                place = feature.mm_position
                is_visual = True if place.is_embed is None else place.is_embed
                visual_mask[place.offset : place.offset + place.length] = is_visual
            labelled, delta = attach_labels(positions, delta, visual_mask, self.has_anchors)
            return labelled, np.int64(delta)  # a Python int would be added to an int32 of numpy's, and not fit

    Model.__name__ = Model.__qualname__ = family.architecture
    return Model


def __getattr__(name: str) -> type[nn.Module]:
    """Our classes by name, as the plugin gives them to vLLM: only the one that is asked for is made."""
    for family in FAMILIES.values():
        if name == family.architecture:
            return served(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

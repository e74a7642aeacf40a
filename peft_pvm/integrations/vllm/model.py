"""Qwen3-VL with PVM and DIPE, for vLLM.

PVM's branch is a second attention layer beside a decoder layer's own. Its keys and values lie in vLLM's paged cache,
of every token, but those of text are hidden (`encoding.py`): so they are batched, chunked, cached with a prefix and
freed as any others are. DIPE makes the heads of the decoder's own attention twice as wide. Which tokens are visual,
and their anchors, come with the positions.

Under tensor parallelism every rank computes the whole branch, which is small, and nothing is exchanged for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
import vllm
from torch import nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import qwen3_vl
from vllm.model_executor.models.utils import extract_layer_index
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

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


VERSIONS = ("0.32.", "0.33.")  # of vLLM: the first was run, the files that this builds on are the same in the second


class Tokens(NamedTuple):
    """What is known of the tokens of a forward. vLLM's layers hand it down as `positions`.

    Attributes:
        positions: `(axes, num_tokens)`, int64.
        visual_mask: `(num_tokens,)`, bool.
        anchors: `(num_tokens,)`, int64; without DIPE, 0.
        inputs_embeds: What enters the first decoder layer, `(num_tokens, hidden_size)`.
    """

    positions: torch.Tensor
    visual_mask: torch.Tensor
    anchors: torch.Tensor
    inputs_embeds: torch.Tensor


def _wide_attention(
    least: int, num_heads: int, num_kv_heads: int, head_dim: int, like: Attention, config: CacheConfig, prefix: str
) -> Attention:
    """An attention layer of vLLM's with heads of at least `least` channels, for scores scaled as of `head_dim`."""
    width = supported_width(least, like.attn_backend.supports_head_size)
    return Attention(num_heads, width, head_dim**-0.5, num_kv_heads, cache_config=config, prefix=prefix)


def _attend(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """Run it on `(num_tokens, heads, width)` each, and keep `(num_tokens, heads * head_dim)` of what comes."""
    attended = attention(query.flatten(1), key.flatten(1), value.flatten(1))
    return attended.unflatten(-1, (-1, attention.head_size))[..., :head_dim].flatten(1)


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
        cache_config: CacheConfig,
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
            sizes = shape.head_dim + 1, shape.num_heads, shape.num_key_value_heads, shape.head_dim
            self.attentions.append(_wide_attention(*sizes, like, cache_config, f"{prefix}.attn_{number}"))

    def forward(self, hidden_states: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """What they add to the residual stream after self-attention, `(num_tokens, hidden_size)`.

        It is exactly 0 at visual tokens, and where none has been seen.
        """
        update = torch.zeros_like(hidden_states)
        for branch, attention in zip(self.branches, cast(Any, self.attentions)):
            bank = hidden_states if branch.config.memory_source == "hidden_states" else tokens.inputs_embeds
            keys, values = branch.keys_and_values(bank)
            wide = visual_keys_only(
                branch.queries(hidden_states), keys, values, tokens.visual_mask, attention.head_size
            )
            update = update + branch.complete(_attend(attention, *wide, branch.shape.head_dim))
        return update.masked_fill(tokens.visual_mask[:, None], 0)


class AnchoredAttention(nn.Module):
    """A decoder layer's attention, with DIPE's scores.

    Args:
        base: The attention that vLLM made, whose modules are taken over.
        cache_config: vLLM's.
        max_distance: DIPE's.
    """

    def __init__(self, base: Any, cache_config: CacheConfig, max_distance: int):
        super().__init__()
        self.max_distance = max_distance
        self.qkv_proj, self.o_proj = base.qkv_proj, base.o_proj
        self.q_norm, self.k_norm, self.rotary_emb = base.q_norm, base.k_norm, base.rotary_emb
        self.head_dim, self.sizes = base.head_dim, [base.q_size, base.kv_size, base.kv_size]
        narrow = base.attn
        del get_current_vllm_config().compilation_config.static_forward_context[narrow.layer_name]
        sizes = 2 * self.head_dim, base.num_heads, base.num_kv_heads, self.head_dim
        self.attn = _wide_attention(*sizes, narrow, cache_config, narrow.layer_name)

    def forward(self, positions: Tokens, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same."""
        tokens = positions
        projected, _ = self.qkv_proj(hidden_states)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected.split(self.sizes, -1))
        query, key = self.q_norm(query).flatten(1), self.k_norm(key).flatten(1)
        reached = (tokens.anchors + self.max_distance).expand_as(tokens.positions)
        if self.max_distance:
            reached = torch.minimum(tokens.positions, reached)
        anchored, _ = self.rotary_emb(reached, query.clone(), key.clone())  # kernels may rotate in place
        query, key = self.rotary_emb(tokens.positions, query, key)
        query, anchored, key = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, anchored, key))
        wide = anchored_across_modalities(query, anchored, key, value, tokens.visual_mask, self.attn.head_size)
        output, _ = self.o_proj(_attend(self.attn, *wide, self.head_dim))
        return output


class DecoderLayer(qwen3_vl.Qwen3VLDecoderLayer):
    """A decoder layer of Qwen3-VL, with what the adapters do to it. Arguments are the base's."""

    self_attn: Any

    def __init__(self, config: Any, cache_config: CacheConfig, quant_config: Any, prefix: str):
        super().__init__(config=config, cache_config=cache_config, quant_config=quant_config, prefix=prefix)
        layer_idx = extract_layer_index(prefix)
        pvm, dipe = configs_of(config)
        self.pvm: PagedBranches | None = None
        if pvm is not None and layer_idx in pvm.layer_indices:
            like = self.self_attn.attn
            self.pvm = PagedBranches(pvm, config, layer_idx, like, cache_config, f"{prefix}.pvm")
        if dipe is not None and acts_on(dipe, layer_idx):
            self.self_attn = AnchoredAttention(self.self_attn, cache_config, dipe.max_distance or 0)

    def forward(
        self, positions: Tokens, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base."""
        is_anchored = isinstance(self.self_attn, AnchoredAttention)
        hidden_states, residual = super().forward(
            positions if is_anchored else positions.positions, hidden_states, residual
        )
        if self.pvm is not None:  # the residual is the stream after self-attention
            hidden_states = hidden_states + self.pvm(residual, positions)
        return hidden_states, residual


class LanguageModel(qwen3_vl.Qwen3LLMModel):
    """The text model of Qwen3-VL, which takes positions with labels."""

    decoder_layer_type = DecoderLayer

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        deepstack_input_embeds: Any = None,
    ) -> Any:
        """As the base."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        # A copy: kernels that add in place write the residual stream of later layers into what enters the first.
        tokens = Tokens(*detach_labels(positions), inputs_embeds.clone())
        return super().forward(None, tokens, intermediate_tensors, inputs_embeds, deepstack_input_embeds)


@MULTIMODAL_REGISTRY.register_processor(
    qwen3_vl.Qwen3VLMultiModalProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PeftPVMQwen3VLForConditionalGeneration(qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL with the adapters that `export_vllm` wrote into its config. Arguments are the base's.

    Raises:
        NotImplementedError: Another version of vLLM, or one that was started with what breaks this.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        has_anchors = configs_of(vllm_config.model_config.hf_config.text_config)[1] is not None
        refuse_what_breaks(vllm_config, has_anchors)
        original = qwen3_vl.Qwen3LLMModel
        qwen3_vl.Qwen3LLMModel = LanguageModel  # vLLM has no other place to say which class the text model is of
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            qwen3_vl.Qwen3LLMModel = original
        self.has_anchors = has_anchors

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Positions of a prompt and the constant for what follows, both with labels."""
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        visual_mask = torch.zeros(len(input_tokens), dtype=torch.bool)
        for feature in mm_features:
            place = feature.mm_position
            is_visual = True if place.is_embed is None else place.is_embed
            visual_mask[place.offset : place.offset + place.length] = is_visual
        labelled, delta = attach_labels(positions, delta, visual_mask, self.has_anchors)
        return labelled, np.int64(delta)  # a Python int would be added to an int32 of numpy's, and not fit


def refuse_what_breaks(vllm_config: VllmConfig, has_anchors: bool) -> None:
    """Raise NotImplementedError for what is known to break, and for versions of vLLM that nobody looked into."""
    if not vllm.__version__.startswith(VERSIONS):
        raise NotImplementedError(
            f"PVM and DIPE stand on the insides of vLLM {' and '.join(VERSIONS)}, but this is {vllm.__version__}."
        )
    config = vllm_config.parallel_config
    sizes = config.pipeline_parallel_size, config.decode_context_parallel_size, config.prefill_context_parallel_size
    if max(sizes) > 1:
        raise NotImplementedError("PVM and DIPE in vLLM know tensor parallelism only: neither pipeline nor context.")
    if vllm_config.speculative_config is not None:
        raise NotImplementedError("PVM and DIPE in vLLM do not work with speculative decoding: leave it out.")
    if vllm_config.model_config.get_multimodal_config().is_multimodal_pruning_enabled():
        raise NotImplementedError("PVM and DIPE in vLLM do not work with the pruning of videos: leave it out.")
    if has_anchors and vllm_config.use_v2_model_runner:
        raise NotImplementedError(
            "DIPE needs 64 bits for a position, and vLLM's second model runner has 32. "
            "Set VLLM_USE_V2_MODEL_RUNNER=0 in the environment."
        )

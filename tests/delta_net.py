"""Gated delta nets of vLLM on a CPU, also in fp32, which its kernels do not take: by transformers' function."""

from __future__ import annotations

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

import torch
import torch.nn.functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import cpu_gdn_attention_core
from vllm.utils.torch_utils import _resolve_layer_name


def delta_nets(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: str
) -> None:
    """As `torch.ops.vllm.cpu_gdn_attention_core`. States are read from vLLM's cache and written into it."""
    if mixed_qkv.dtype == torch.bfloat16:
        cpu_gdn_attention_core(mixed_qkv, b, a, core_attn_out, layer_name)
        return
    context = get_forward_context()
    if context.attn_metadata is None:
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    metadata = context.attn_metadata[layer.prefix]
    conv_states, states = layer.kv_cache
    starts, slots = metadata.non_spec_query_start_loc.tolist(), metadata.non_spec_state_indices_tensor.tolist()
    for number in range(metadata.num_decodes + metadata.num_prefills):
        slot, tokens = slots[number], slice(starts[number], starts[number + 1])
        if metadata.has_initial_state is not None and not metadata.has_initial_state[number]:
            conv_states[slot], states[slot] = 0, 0
        window = torch.cat([conv_states[slot], mixed_qkv[tokens]])
        conv_states[slot] = window[-len(conv_states[slot]) :]
        mixed = F.silu(F.conv1d(window.T, layer.conv1d.weight, groups=window.shape[1])).T
        update, state = torch_recurrent_gated_delta_rule(
            *layer.rearrange_mixed_qkv(mixed),
            g=-layer.A_log.exp() * F.softplus(a[None, tokens] + layer.dt_bias),
            beta=b[None, tokens].sigmoid(),
            initial_state=states[slot, None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[tokens], states[slot] = update[0], state[0]

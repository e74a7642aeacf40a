"""The PVM branch of one decoder layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..context import CONTEXT, MemoryView, VisualContext, dropped_keywords
from ..families import DecoderBlock
from ..positions import gather_rows, scatter_rows
from ..tap import this_thread
from ..tuner import VisualTunerLayer
from .config import PVMConfig
from .shape import BranchShape


_identities = itertools.count()


class Gate(nn.Module):
    """One learnable scalar. A module of its own, so that what moves weights about (offloading) finds it like any.

    Args:
        value: Its initial value.
    """

    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), float(value)))

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor times the scalar."""
        return self.weight * tensor


class PVMLayer(VisualTunerLayer):
    """A cross-attention branch from the text tokens of one decoder layer to the visual memory.

    With `x` the residual stream after self-attention, the layer's output becomes `x + FFN(norm(x)) + PVM(x, memory)`,
    where PVM is exactly 0 at visual positions and in rows without images (arXiv 2605.00814, section 3).

    Every weight is held once per adapter, keyed by the adapter's name.

    Args:
        decoder_layer: The base layer to stand beside.
        block: How the base layer is put together.
        layer_idx: Its index.
    """

    adapter_layer_names = (
        "pvm_text_reducer",
        "pvm_vision_reducer",
        "pvm_input_norm",
        "pvm_q_proj",
        "pvm_k_proj",
        "pvm_v_proj",
        "pvm_o_proj",
        "pvm_q_norm",
        "pvm_k_norm",
        "pvm_post_attn_norm",
        "pvm_gate_proj",
        "pvm_up_proj",
        "pvm_down_proj",
        "pvm_output_expander",
        "pvm_gate",
    )
    other_param_names = ("pvm_config", "pvm_shape", "pvm_identity")

    pvm_text_reducer: Mapping[str, nn.Linear]
    pvm_vision_reducer: Mapping[str, nn.Linear]
    pvm_input_norm: Mapping[str, nn.RMSNorm]
    pvm_q_proj: Mapping[str, nn.Linear]
    pvm_k_proj: Mapping[str, nn.Linear]
    pvm_v_proj: Mapping[str, nn.Linear]
    pvm_o_proj: Mapping[str, nn.Linear]
    pvm_q_norm: Mapping[str, nn.RMSNorm]
    pvm_k_norm: Mapping[str, nn.RMSNorm]
    pvm_post_attn_norm: Mapping[str, nn.RMSNorm]
    pvm_gate_proj: Mapping[str, nn.Linear]
    pvm_up_proj: Mapping[str, nn.Linear]
    pvm_down_proj: Mapping[str, nn.Linear]
    pvm_output_expander: Mapping[str, nn.Linear]
    pvm_gate: Mapping[str, Gate]

    def __init__(self, decoder_layer: nn.Module, block: DecoderBlock, layer_idx: int):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.pvm_config: dict[str, PVMConfig] = {}
        self.pvm_shape: dict[str, BranchShape] = {}
        self.pvm_identity: dict[str, int] = {}  # tells adapters of one name apart that followed one another
        self.layer_idx = layer_idx
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._block = block
        self._decoder_layer = (decoder_layer,)  # in a tuple: the parent is no submodule
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Between the hooks of one forward, by thread: a server may run several conversations on one model.
        self._in_flight: dict[int, tuple[VisualContext | None, torch.Tensor | None]] = {}

    def update_layer(self, adapter_name: str, config: PVMConfig, shape: BranchShape) -> None:
        """Add an adapter, freshly initialised."""
        width, heads, kv_heads = shape.r, shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        linears = {
            "pvm_text_reducer": (shape.hidden_size, width),
            "pvm_vision_reducer": (shape.hidden_size, width),
            "pvm_q_proj": (width, heads),
            "pvm_k_proj": (width, kv_heads),
            "pvm_v_proj": (width, kv_heads),
            "pvm_o_proj": (heads, width),
            "pvm_gate_proj": (width, shape.intermediate_size),
            "pvm_up_proj": (width, shape.intermediate_size),
            "pvm_down_proj": (shape.intermediate_size, width),
            "pvm_output_expander": (width, shape.hidden_size),
        }
        norms = {
            "pvm_input_norm": width,
            "pvm_q_norm": shape.head_dim,
            "pvm_k_norm": shape.head_dim,
            "pvm_post_attn_norm": width,
        }
        gate = Gate(config.init_gate)
        if not config.init_weights:
            nn.init.normal_(gate.weight)
        weights: dict[str, nn.Module] = {"pvm_gate": gate}
        for name, (in_features, out_features) in linears.items():
            linear = nn.Linear(in_features, out_features, bias=False)
            nn.init.normal_(linear.weight, std=shape.initializer_range)
            weights[name] = linear
        for name, features in norms.items():
            weights[name] = nn.RMSNorm(features, eps=shape.eps)
        for name in self.adapter_layer_names:
            getattr(self, name)[adapter_name] = weights[name]
        self.pvm_config[adapter_name] = config
        self.pvm_shape[adapter_name] = shape
        self.pvm_identity[adapter_name] = next(_identities)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The dtype of the FFN's norm: unlike the matrices it is never quantised.
        norm = getattr(self._decoder_layer[0], self._block.ffn_norm or "input_layernorm")
        reference = next(itertools.chain(norm.parameters(), self._decoder_layer[0].parameters()))
        for name in self.adapter_layer_names:
            weights = getattr(self, name)
            if adapter_name not in weights:
                continue
            if any(parameter.device.type == "meta" for parameter in weights[adapter_name].parameters()):
                continue  # low_cpu_mem_usage: the weights come later
            weights[adapter_name] = weights[adapter_name].to(device or reference.device, dtype=reference.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for adapter_name in self.pvm_identity:  # what a cache kept was projected by the old weights
            self.pvm_identity[adapter_name] = next(_identities)

    def config_of(self, adapter_name: str) -> PVMConfig:
        return self.pvm_config[adapter_name]

    def join(self) -> None:
        if self._handles:
            return
        layer, block = self._decoder_layer[0], self._block
        mixer = block.token_mixer(layer)
        self._handles = [
            mixer.register_forward_pre_hook(self._take_context, with_kwargs=True),
            getattr(layer, block.ffn_norm or "input_layernorm").register_forward_pre_hook(self._take_residual),
            getattr(layer, block.ffn_end).register_forward_hook(self._add_branch),
        ]
        if block.ffn_norm is None:
            self._handles.append(mixer.register_forward_hook(self._add_to_residual))

    def part(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The hooks run in this order within one forward of the decoder layer, also when gradient checkpointing runs it
    # again.

    def _take_context(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = kwargs.get(CONTEXT)
        is_active = not self.disable_adapters and any(name in self.pvm_gate for name in self.active_adapters)
        if context is None and is_active:
            raise dropped_keywords(type(self._decoder_layer[0]).__name__)
        _, residual = self._in_flight.get(this_thread(), (None, None))  # of a parallel block, whose norm comes first
        self._in_flight[this_thread()] = (context, residual)

    def _take_residual(self, module: nn.Module, args: tuple) -> None:
        context, _ = self._in_flight.get(this_thread(), (None, None))
        self._in_flight[this_thread()] = (context, args[0])

    def _add_to_residual(self, module: nn.Module, args: tuple, output: Any) -> None:
        # Parallel block: the stream after attention exists only as a sum that the layer forms at its end.
        context, residual = self._in_flight[this_thread()]
        attention = output[0] if isinstance(output, tuple) else output
        self._in_flight[this_thread()] = (context, residual + attention)

    def _add_branch(self, module: nn.Module, args: tuple, output: Any) -> Any:
        context, hidden_states = self._in_flight.pop(this_thread(), (None, None))
        if context is None or hidden_states is None or self.disable_adapters:
            return None
        update = self(hidden_states, context)
        if update is None:
            return None
        if isinstance(output, tuple):  # a mixture of experts may return its router's logits as well
            return (output[0] + update.view_as(output[0]), *output[1:])
        return output + update.view_as(output)

    def forward(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """The sum of the active adapters' branches, or of each row's own adapter.

        Args:
            hidden_states: The residual stream after self-attention, `(batch, seq_len, hidden_size)`.
            context: What this forward knows about visual tokens.

        Returns:
            `(batch, seq_len, hidden_size)` in the dtype of `hidden_states`, exactly 0 at visual tokens and in rows
            without images; `None` if nothing is to be added.
        """
        context = context.tail(hidden_states.shape[1])
        total = None
        for adapter in dict.fromkeys(context.adapter_names or self.active_adapters):
            if adapter not in self.pvm_gate:
                continue
            context.check()
            update = self.branch(adapter, hidden_states, context)
            if update is None:
                continue
            if context.adapter_names is not None:
                update = torch.where(context.rows_of(adapter), update, 0)
            total = update if total is None else total + update
        return total

    def branch(self, adapter: str, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """What one adapter adds, as `forward` returns it, for the context of these tokens alone."""
        config, shape = self.pvm_config[adapter], self.pvm_shape[adapter]
        bank = self._bank(config, hidden_states, context)
        view = context.view(config.memory_visibility)
        if view is None:
            return None
        keys, values = self._project(adapter, bank, context)
        queries = self._queries(adapter, hidden_states, view)
        # Keys may have been kept under another autocast dtype.
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=view.mask, enable_gqa=shape.num_heads != shape.num_key_value_heads
        )
        attended = self.pvm_o_proj[adapter](attended.transpose(1, 2).flatten(2))
        normed = self.pvm_post_attn_norm[adapter](attended)
        activated = ACT2FN[shape.hidden_act](self.pvm_gate_proj[adapter](normed)) * self.pvm_up_proj[adapter](normed)
        latent = attended + self.pvm_down_proj[adapter](activated)
        expanded = self.pvm_output_expander[adapter](latent)
        update = self.pvm_gate[adapter](F.rms_norm(expanded, expanded.shape[-1:], eps=shape.eps))
        update = update.to(hidden_states.dtype)
        if view.positions is not None:
            update = scatter_rows(update, view.positions, hidden_states.shape[1])
        return update if view.has_memory is None else torch.where(view.has_memory, update, 0)

    def retrieval(self, adapter: str, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """Which visual tokens each token reads, for inspection: the weights of the branch's cross-attention.

        Args:
            adapter: The adapter's name.
            hidden_states: The residual stream after self-attention, `(batch, seq_len, hidden_size)`.
            context: What is known about visual tokens in a forward of these tokens alone.

        Returns:
            `(batch, num_heads, seq_len, num_visual)`, fp32, each row adding up to 1, or 0 everywhere for a token that
            does not read; `None` if none does.
        """
        config, shape = self.pvm_config[adapter], self.pvm_shape[adapter]
        view = context.view(config.memory_visibility)
        if view is None or context.memory.is_empty:
            return None
        keys, _ = self._project(adapter, self._bank(config, hidden_states, context), context)
        queries = self._queries(adapter, hidden_states, view).float()
        keys = keys.float().repeat_interleave(shape.num_heads // shape.num_key_value_heads, 1)
        scores = queries @ keys.transpose(2, 3) * shape.head_dim**-0.5
        if view.mask is not None:
            scores = scores.masked_fill(~view.mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if view.positions is not None:
            by_token = weights.transpose(1, 2).flatten(2)
            by_token = scatter_rows(by_token, view.positions, hidden_states.shape[1])
            weights = by_token.unflatten(2, (shape.num_heads, -1)).transpose(1, 2)
        return weights if view.has_memory is None else torch.where(view.has_memory.unsqueeze(1), weights, 0)

    def _bank(self, config: PVMConfig, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor:
        """What is read, `(batch, num_visual, hidden_size)`."""
        if context.memory.is_empty:  # read by nobody, or in training by padding
            return hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[2])
        if config.memory_source == "hidden_states":
            return context.hidden_states_bank(self.layer_idx, hidden_states)
        return context.memory.embeddings

    def _queries(self, adapter: str, hidden_states: torch.Tensor, view: MemoryView) -> torch.Tensor:
        """Of the tokens that read, `(batch, num_heads, num_queries, head_dim)`."""
        readers = hidden_states if view.positions is None else gather_rows(hidden_states, view.positions)
        text = self._cast_input_dtype(readers, self.pvm_text_reducer[adapter].weight.dtype)
        text = self.pvm_input_norm[adapter](self.pvm_text_reducer[adapter](text))
        head_dim = self.pvm_shape[adapter].head_dim
        return self.pvm_q_norm[adapter](_split_heads(self.pvm_q_proj[adapter](text), head_dim))

    def _project(self, adapter: str, bank: torch.Tensor, context: VisualContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the memory, `(batch, num_key_value_heads, num_visual, head_dim)` each.

        In inference they are kept with the memory, so that every visual token is projected once.
        """
        keeps = not context.records_gradients
        identity = self.pvm_identity[adapter]
        known = context.memory.projections.get(identity) if keeps else None
        num_known = 0 if known is None else known[0].shape[2]
        if known is not None and num_known == bank.shape[1]:
            return known
        head_dim = self.pvm_shape[adapter].head_dim
        memory = self._cast_input_dtype(bank[:, num_known:], self.pvm_vision_reducer[adapter].weight.dtype)
        memory = self.pvm_vision_reducer[adapter](memory)
        keys = self.pvm_k_norm[adapter](_split_heads(self.pvm_k_proj[adapter](memory), head_dim))
        values = _split_heads(self.pvm_v_proj[adapter](memory), head_dim)
        if known is not None:
            keys, values = torch.cat([known[0], keys], 2), torch.cat([known[1], values], 2)
        if keeps:
            context.memory.projections[identity] = (keys, values)
        return keys, values


def _split_heads(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`(batch, length, heads * head_dim)` to `(batch, heads, length, head_dim)`."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)

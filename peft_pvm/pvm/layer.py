"""The PVM branches of one decoder layer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..context import CONTEXT, VisualContext, dropped_keywords
from ..families import DecoderBlock
from ..fitting import PEFT_PREFIX
from ..tap import this_thread
from ..tuner import VisualTunerLayer
from .branch import WEIGHTS, Branch, fresh_weights, weight_name
from .config import PVMConfig
from .shape import BranchShape


_identities = itertools.count()


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

    adapter_layer_names = tuple(weight_name(name) for name in WEIGHTS)
    other_param_names = ("pvm_config", "pvm_branches")

    def __init__(self, decoder_layer: nn.Module, block: DecoderBlock, layer_idx: int):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.pvm_config: dict[str, PVMConfig] = {}
        # One for each adapter, or those that it was put together from: the weights above, seen by branch.
        self.pvm_branches: dict[str, list[Branch]] = {}
        self.layer_idx = layer_idx
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._block = block
        self._decoder_layer = (decoder_layer,)  # in a tuple: the parent is no submodule
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Between the hooks of one forward, by thread: a server may run several conversations on one model.
        self._in_flight: dict[int, tuple[VisualContext | None, torch.Tensor | None]] = {}

    def update_layer(self, adapter_name: str, config: PVMConfig, text_config: Any) -> None:
        """Add an adapter, freshly initialised.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            text_config: The base model's, which the sizes come from.
        """
        branches = []
        for number, part in enumerate(config.parts()):
            if self.layer_idx not in part.layer_indices:
                continue
            shape = BranchShape.of(part, text_config)
            weights = fresh_weights(part, shape)
            for name, module in weights.items():
                self._weights(weight_name(name, number))[adapter_name] = module
            branches.append(Branch(part, shape, self.layer_idx, next(_identities), self._cast_input_dtype, **weights))
        self.pvm_config[adapter_name] = config
        self.pvm_branches[adapter_name] = branches
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _weights(self, name: str) -> nn.ModuleDict:
        """A weight of all adapters. PEFT wants it flat, so that those of further branches have names of their own."""
        if not hasattr(self, name):
            setattr(self, name, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, name)
        return cast(nn.ModuleDict, getattr(self, name))

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
            weights[adapter_name].to(device or reference.device, dtype=reference.dtype)  # in place

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, branches in self.pvm_branches.items():  # what a cache kept was projected by the old weights
            self.pvm_branches[name] = [replace(branch, identity=next(_identities)) for branch in branches]

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
        is_active = not self.disable_adapters and any(name in self.pvm_config for name in self.active_adapters)
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
            if adapter not in self.pvm_config:
                continue
            context.check()
            for branch in self.pvm_branches[adapter]:
                update = branch.update(hidden_states, context)
                if update is None:
                    continue
                if context.adapter_names is not None:
                    update = torch.where(context.rows_of(adapter), update, 0)
                total = update if total is None else total + update
        return total


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors of a PVM adapter, not copied, by their keys in its file.

    Args:
        model: The model; wrapped by PEFT, compiled or neither.
        adapter_name: The adapter's name.
    """
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PVMLayer):
            continue
        name = name.replace("_orig_mod.", "").removeprefix(PEFT_PREFIX)  # of a compiled, of a wrapped model
        for key, tensor in layer.state_dict().items():
            weight, owner, rest = key.split(".", 2)
            if owner == adapter_name:
                found[f"{PEFT_PREFIX}{name}.{weight}.{rest}"] = tensor
    return found

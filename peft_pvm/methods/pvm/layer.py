"""The PVM branches of one decoder layer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ...tokens.context import CONTEXT, VisualContext
from ...tokens.families import VisionLanguageModel
from ...tuners.block_check import BlockCheck
from ...tuners.ffn_hooks import FFNCall, FFNHooks, ffns_missed, has_embeddings
from ...tuners.layers import VisualTunerLayer
from ...utils.packages import execution_device
from .branch import Branch, fresh_weights
from .config import WEIGHTS, BranchShape, PVMConfig, weight_name


branches_missed = functools.partial(ffns_missed, "PVM")


class PVMLayer(VisualTunerLayer):
    """A cross-attention branch from the text tokens of one decoder layer to the visual memory.

    With `x` the residual stream after self-attention, the layer's output becomes `x + FFN(norm(x)) + PVM(x, memory)`,
    where PVM is exactly 0 at visual positions and in rows without images (arXiv 2605.00814, section 3).

    Every weight is held once per adapter, keyed by the adapter's name.

    Args:
        vlm: The model's parts.
        layer_idx: Index of the decoder layer that it belongs to.
    """

    adapter_layer_names = tuple(weight_name(name) for name in WEIGHTS)
    other_param_names = ("configs", "pvm_branches")

    def __init__(self, vlm: VisionLanguageModel, layer_idx: int):
        super().__init__(vlm)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        # One for each adapter, or those that it was put together from: the weights above, seen by branch.
        self.pvm_branches: dict[str, list[Branch]] = {}
        self.layer_idx = layer_idx
        self._decoder_layer = (vlm.layers[layer_idx],)  # in a tuple: it is no submodule
        self._has_memory = False
        self._is_checked = False

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
            branches.append(Branch(part, shape, self.layer_idx, self._cast_input_dtype, **weights))
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
        decoder_layer = self.decoder_layer
        norm = self.vlm.block.norm(decoder_layer)
        parameters = [*norm.parameters(), *decoder_layer.parameters()]
        if self.vlm.block.has_streams:  # the FFN itself, whose vectors may be kept in fp32
            parameters = [parameter for name, parameter in decoder_layer.named_parameters() if "norm" in name]
        # A vector, where the block's first module is the FFN itself.
        reference = next((each for each in parameters if each.dim() == 1 and each.is_floating_point()), parameters[0])
        device = device or reference.device
        if device.type == "meta":  # the base's weights are on the disk, and accelerate brings them to where they run
            device = execution_device(norm)
        for name in self.adapter_layer_names:
            weights = getattr(self, name)
            if adapter_name not in weights:
                continue
            if any(parameter.device.type == "meta" for parameter in weights[adapter_name].parameters()):
                continue  # low_cpu_mem_usage: the weights come later
            weights[adapter_name].to(device, dtype=reference.dtype)  # in place

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, branches in self.pvm_branches.items():  # what caches kept of the old weights goes with the old ones
            self.pvm_branches[name] = [replace(branch) for branch in branches]

    @property
    def decoder_layer(self) -> nn.Module:
        """The decoder layer that it belongs to."""
        return self._decoder_layer[0]

    def new_hooks(self) -> list[Any]:
        hooks: list[Any] = [
            self.vlm.text_model.register_forward_pre_hook(self._start_forward, with_kwargs=True),
            FFNHooks(self.vlm, self.layer_idx, self.acting, self._add_branches),
        ]
        if not self._is_checked and not self.vlm.block.has_streams:
            hooks.append(BlockCheck(self.decoder_layer, self.vlm.block, self.acting, self._pass_check))
        return hooks

    def _pass_check(self) -> None:
        self._is_checked = True

    def _start_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = kwargs.get(CONTEXT)
        if context is not None and self.acting(context.adapter_names):
            context.check()
            context.await_layer(self.layer_idx, branches_missed)
            self._check_memory(context)

    def _check_memory(self, context: VisualContext) -> None:
        """Check, once for this layer, that there are embeddings to read. Waits for the device."""
        if self._has_memory:
            return
        names = self.acting(context.adapter_names)
        if any(branch.config.memory_source == "embeddings" for name in names for branch in self.pvm_branches[name]):
            what_works = "Use PVMConfig(memory_source='hidden_states')"
            self._has_memory = has_embeddings(context, type(self.vlm.model).__name__, what_works)

    def _add_branches(self, call: FFNCall) -> torch.Tensor | None:
        if self.disable_adapters:
            return None
        update = self(call.stream, call.context)
        call.context.reached(self.layer_idx, branches_missed)
        if update is None:
            return None
        if call.block.ffn_scale != 1:  # the layer will multiply it as well
            update = update / call.block.ffn_scale
        return call.output + update

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
        for adapter in self.acting(context.adapter_names):
            context.check()
            for branch in self.pvm_branches[adapter]:
                update = branch.update(hidden_states, context)
                if update is None:
                    continue
                if context.adapter_names is not None:
                    update = torch.where(rows_of(adapter, context), update, 0)
                total = update if total is None else total + update
        return total


def rows_of(adapter_name: str, context: VisualContext) -> torch.Tensor:
    """The rows of the batch on which an adapter acts, if each has its own adapter, `(batch, 1, 1)`, bool."""

    def compare() -> torch.Tensor:
        chosen = [name == adapter_name for name in context.adapter_names or ()]
        return torch.tensor(chosen, device=context.device)[:, None, None]

    return context.derived(("rows", adapter_name), compare)

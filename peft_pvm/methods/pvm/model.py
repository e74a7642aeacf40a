"""The PVM tuner: puts a branch beside the chosen decoder layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ...folders.companions import hash_of
from ...tokens.adapters_by_row import BASE
from ...tokens.tap import Tap
from ...tuners.base import VisualTuner, name_is_taken
from ...tuners.saving import own_tensors
from ...utils.packages import saved_along
from ...utils.text import quoted
from .config import BranchShape, PVMConfig, weight_name
from .layer import PVMLayer
from .merging import CombinationType, combine


# The paper's layer sets, by model type, depth and hidden size.
PAPER_LAYERS = {
    ("qwen3_vl_text", 36, 2560): [5, 11, 17],  # Qwen3-VL-4B
    ("qwen3_vl_text", 36, 4096): [8, 16, 24],  # Qwen3-VL-8B
}


def strided_layers(text_config: Any) -> list[int]:
    """What `layers_to_transform="strided"` means for a base model.

    Returns:
        The paper's layers for the models it names, else three layers at 2/9, 4/9 and 6/9 of the depth (fewer where
        these fall together).
    """
    depth = text_config.num_hidden_layers
    known = PAPER_LAYERS.get((text_config.model_type, depth, text_config.hidden_size))
    return known or sorted({min(round(depth * ninths / 9), depth - 1) for ninths in (2, 4, 6)})


def _starts_fresh(config: PVMConfig) -> bool:
    """Whether an adapter starts from initial weights, to be trained: its tensors come from no file."""
    return not config.inference_mode and (config.source is None or config.source.is_config_only())


class PVMModel(VisualTuner):
    """Attaches PVM (Persistent Visual Memory) to a vision-language model. Source: arXiv 2605.00814.

    Every chosen decoder layer gets a child `pvm` beside the base's modules, joined to them by hooks: no base parameter
    changes its name, and `unload()` gives back the model as it was.

    Args:
        model: A vision-language model from transformers.
        peft_config: The adapter's configuration.
        adapter_name: The adapter's name.
        **kwargs: PEFT's own; `low_cpu_mem_usage=True` leaves the weights on the meta device until they are loaded.

    Raises:
        ValueError: PVM cannot be attached to the model. Or the configuration, or the file of the adapter that it was
            loaded with, does not fit the model. The model is then as it was.

    Example:
        model = get_peft_model(model, PVMConfig(r=512, layers_to_transform="strided"))
        model.print_trainable_parameters()
    """

    prefix = "pvm_"
    child_name = "pvm"
    tuner_layer_cls = PVMLayer

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        given = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
        rows = next((tensor for tensor in given if tensor is not None), None)
        if rows is not None and len(rows) != len(adapter_names):
            raise ValueError(f"adapter_names has {len(adapter_names)} names, but the batch has {len(rows)} rows.")
        # Without rows, PEFT calls from a forward of its own, and not from generate, which may repeat them.
        with Tap.on(self.vlm).by_row.chosen(adapter_names, may_repeat=rows is not None):
            yield

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("adapter_names chooses adapters row by row only in inference, but the model is training.")
        if isinstance(adapter_names, str):
            raise TypeError("adapter_names is a list with the name of an adapter for each row, not one name.")
        known = self._adapter_names()
        unknown = sorted(set(adapter_names) - known - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names names {quoted(unknown)}, but the model has the PVM adapters {quoted(sorted(known))} "
                f"(and {BASE!r})."
            )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        force: bool = False,
    ) -> None:
        """Add an adapter that is made from others on this model. They stay as they are; it is not activated.

        Args:
            adapters: Their names.
            weights: One for each.
            adapter_name: The name of the new adapter.
            combination_type: "linear", "ties", "dare_linear" or "cat": see `peft_pvm.methods.pvm.merging.combine`.
            density: The share of values to keep, for "ties" and "dare_linear".
            majority_sign_method: How the sign of a value is chosen, for "ties".
            force: Average the adapters even if they are not known to be of one lineage.

        Raises:
            ValueError: There is no such adapter, the name is taken, or they cannot be combined this way. The model is
                then as it was.
        """
        known = self._adapter_names()
        if unknown := [name for name in adapters if name not in known]:
            raise ValueError(f"The model has no PVM adapters {quoted(unknown)}; it has {quoted(sorted(known))}.")
        if adapter_name in self.peft_config:
            raise name_is_taken(adapter_name)
        sources = [(self.peft_config[name], own_tensors(self.model, name)) for name in adapters]
        config, tensors = combine(sources, weights, combination_type, density, majority_sign_method, force)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.peft_config[adapter_name].lineage = config.lineage
        with torch.no_grad():
            for key, own in own_tensors(self.model, adapter_name).items():
                own.copy_(tensors[key])

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        in_text_model = {*self.vlm.text_model.modules(), self.vlm.head}
        for name, module in saved_along(self.model, adapter_name).items():
            Tap.on(self.vlm).by_row.choose_in(module, name, sees_rows=module in in_text_model)
        config = self.peft_config[adapter_name]
        if _starts_fresh(config):
            config.lineage = hash_of(own_tensors(self.model, adapter_name))

    def _adapter_names(self) -> set[str]:
        return {name for layer in self._tuner_layers() for name in layer.configs}

    def resolve(self, config: PVMConfig) -> PVMConfig:
        vlm = self.vlm
        _ = vlm.block  # raises where it is not known
        for part in config.parts():
            BranchShape.of(part, vlm.text_config)
        if _starts_fresh(config):
            config = copy.copy(config)  # the caller's can be used again, for another adapter or model
        if config.layers_to_transform == "auto":
            raise ValueError(
                "PVMConfig.layers_to_transform is 'auto', but the layers are read off the model and rows of data "
                "before the adapter is attached: PVMConfig(layers_to_transform=propose_layers(model, processor, "
                "read_chats(rows, 8)).layers), with propose_layers from peft_pvm.probe.layers and read_chats from "
                "peft_pvm.probe.rows."
            )
        if config.layers_to_transform == "strided":
            config = copy.copy(config)
            config.layers_to_transform = strided_layers(vlm.text_config)
        depth = len(vlm.layers)
        too_deep = [layer_idx for layer_idx in config.layer_indices if layer_idx >= depth]
        if too_deep:
            raise ValueError(
                f"PVMConfig.layers_to_transform names layers {quoted(too_deep)}, but the text model has only "
                f"{depth} layers (0 to {depth - 1})."
            )
        return config

    def targeted_names(self, config: PVMConfig) -> tuple[str, ...]:
        vlm = self.vlm
        return tuple(vlm.layer_name(layer_idx) for layer_idx in config.layer_indices)

    def expected_tensors(self, config: PVMConfig, layer: nn.Module) -> dict[str, torch.Tensor]:
        vlm = self.vlm
        return {
            f"{weight_name(name, number)}.weight": torch.empty(sizes, device="meta")
            for number, part in enumerate(config.parts())
            if vlm.index_of(layer) in part.layer_indices
            for name, sizes in BranchShape.of(part, vlm.text_config).weights().items()
        }

    def new_layer(self, target: nn.Module) -> PVMLayer:
        vlm = self.vlm
        return PVMLayer(vlm, vlm.index_of(target))

    def add_adapter_to(self, layer: Any, adapter_name: str, config: PVMConfig) -> None:
        layer.update_layer(adapter_name, config, self.vlm.text_config)

"""vLLM's models with our adapters: our classes are derived from vLLM's own, whichever they are.

- A model (`served`) labels the positions of a prompt: which tokens are visual, and their anchors. vLLM carries them
  along and continues them for generated tokens.
- Its text model (`with_adapters`) takes the labels off again, finds which adapters are on for each token, and hands
  all of it down to its layers as `Tokens`.
- In a decoder layer, whose own attention may be linear, PVM's branch is a second attention layer. Its keys and values
  lie in vLLM's paged cache, of every token, but those of text are hidden (`widening.py`): so they are batched,
  chunked, cached with a prefix and freed as any others are. Methods without parameters make the heads of the layer's
  own attention wider.

Under tensor parallelism every rank computes the whole branch, which is small, and nothing is exchanged for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.multimodal.inputs import MultiModalFeatureSpec

from ...methods.pvm import PVMConfig
from .export import (
    STEERING,
    adapters_of,
    attending_layers,
    choices_of,
    layers_of,
    needs_first_runner,
    switch_of,
)
from .families import FAMILIES, TEXT_MODELS, Family
from .labels import attach_labels, detach_labels
from .layers import Acting, PagedBranches, Tokens, steer_attention
from .standing import (
    refuse_other_layer,
    refuse_other_lora,
    refuse_other_model,
    refuse_other_text_model,
    refuse_what_breaks,
    warn_of_other_version,
)


@functools.cache
def layer_with_adapters(native: type[nn.Module]) -> type[nn.Module]:
    """The class of a decoder layer that takes `Tokens`, made from vLLM's."""

    class DecoderLayer(native):  # type: ignore[valid-type,misc]
        pvm: nn.ModuleDict  # by the adapters' numbers
        is_steered: bool  # whether the layer's rotary embedding takes `Tokens`

        def forward(
            self, positions: Tokens, hidden_states: torch.Tensor, residual: torch.Tensor | None, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Like vLLM's: it returns what its FFN adds, and the residual stream after self-attention."""
            of_native = positions if self.is_steered else positions.positions
            hidden_states, residual = super().forward(
                positions=of_native, hidden_states=hidden_states, residual=residual, **kwargs
            )
            for branches in self.pvm.values():
                hidden_states = hidden_states + branches(residual, positions)
            return hidden_states, residual

    return DecoderLayer


@functools.cache
def with_adapters(native: type[nn.Module]) -> type[nn.Module]:
    """The class of a text model that takes positions with labels, made from vLLM's."""

    class TextModel(native):  # type: ignore[valid-type,misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            adapters = [Acting(number, config) for number, config in enumerate(adapters_of(self.config))]
            self.num_adapters = len(adapters)
            self.switch = switch_of(self.config)
            if self.switch is not None:
                switch = ReplicatedLinear(1, len(adapters), bias=False, prefix=f"{prefix}.{self.switch}")
                self.add_module(self.switch, switch)
            attending = attending_layers(self.config)
            for layer_idx, layer in enumerate(self.layers):
                refuse_other_layer(layer, layer_idx in attending)
            like = self.layers[attending[0]].self_attn.attn
            for layer_idx, layer in enumerate(self.layers):
                layer.__class__ = layer_with_adapters(layer.__class__)
                layer.pvm = nn.ModuleDict()
                here = [a for a in adapters if layer_idx in layers_of(a.config, self.config)]
                for adapter in here:
                    if isinstance(adapter.config, PVMConfig):
                        place = f"{prefix}.layers.{layer_idx}.pvm.attn_{adapter.number}"
                        branches = PagedBranches(
                            adapter, self.config, layer_idx, like, vllm_config.cache_config, place
                        )
                        layer.pvm[str(adapter.number)] = branches
                steering = [a for a in here if isinstance(a.config, STEERING)]
                layer.is_steered = bool(steering)
                if steering:
                    steer_attention(layer.self_attn, steering, vllm_config)

        def forward(
            self,
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            deepstack_input_embeds: Any = None,
        ) -> Any:
            """Like vLLM's, of which only that of Qwen3-VL has the last argument.

            vLLM's compilation finds arguments by these names.
            """
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(input_ids)
            # A copy: kernels that add in place write the residual stream of later layers into what enters the first.
            tokens = Tokens(*detach_labels(positions), inputs_embeds.clone(), self._switches(inputs_embeds))
            deepstack = () if deepstack_input_embeds is None else (deepstack_input_embeds,)
            return super().forward(None, tokens, intermediate_tensors, inputs_embeds, *deepstack)

        def _switches(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            """`Tokens.switches`."""
            if self.switch is None:
                return inputs_embeds.new_ones(len(inputs_embeds), self.num_adapters, dtype=torch.float32)
            chosen, _ = getattr(self, self.switch)(inputs_embeds.new_ones(len(inputs_embeds), 1))
            return (chosen > 0.5).float()

    return TextModel


@contextmanager
def _text_model_with_adapters(text_type: str) -> Iterator[type[nn.Module]]:
    """Replace the class of a model's text model for a block: vLLM has no other place to choose it."""
    module, name = TEXT_MODELS[text_type]
    builder = import_module(f"vllm.model_executor.models.{module}")
    native = getattr(builder, name)
    setattr(builder, name, with_adapters(native))
    try:
        yield with_adapters(native)
    finally:
        setattr(builder, name, native)


@contextmanager
def _base_without_lora(vllm_config: VllmConfig, switch: str | None) -> Iterator[None]:
    """Have vLLM build the base without LoRA if only the switch takes one: it has other experts for LoRA."""
    config = vllm_config.lora_config
    if config is not None and config.target_modules == [switch]:
        vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = config


@functools.cache
def served(family: Family) -> type[nn.Module]:
    """The class of a model with the adapters that `export_vllm` wrote into its config, made from vLLM's."""
    native = ModelRegistry.models[family.native].load_model_cls()

    class Model(native, SupportsLoRA):  # type: ignore[valid-type,misc]
        """A model of vLLM's with adapters. Requests choose by LoRA, also if vLLM's own class takes none.

        Raises:
            NotImplementedError: vLLM's internal classes differ from those that the adapters need, or it was started
                with options that do not work with them.
        """

        supports_mrope: ClassVar[Literal[True]] = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            text_config = vllm_config.model_config.hf_config.get_text_config()
            has_anchors, switch = needs_first_runner(text_config), switch_of(text_config)
            warn_of_other_version()
            refuse_what_breaks(vllm_config, has_anchors)
            refuse_other_lora(vllm_config, native, switch, choices_of(text_config))
            refuse_other_model(native, family)
            with (
                _text_model_with_adapters(text_config.model_type) as text_model,
                _base_without_lora(vllm_config, switch),
            ):
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
            """Like vLLM's."""
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
            # A Python int would be added to an int32 of numpy, and not fit.
            return labelled, cast(int, np.int64(delta))

    Model.__name__ = Model.__qualname__ = family.architecture
    return Model


def __getattr__(name: str) -> type[nn.Module]:
    """Our classes by name, as the plugin gives them to vLLM: only the one that is asked for is made."""
    for family in FAMILIES.values():
        if name == family.architecture:
            return served(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

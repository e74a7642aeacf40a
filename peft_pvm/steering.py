"""What DIPE and T-DRS share: adapters without parameters that stand beside the text model and steer its attention."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import nn

from .adapter_file import FORMAT_VERSION, SAFETENSORS_WEIGHTS_NAME
from .attention import is_steerable, release, steer
from .checks import check, layer_list
from .context import CONTEXT, VisualContext
from .families import VisionLanguageModel
from .rotation import ROTARY_FUNCTIONS, has_rotary_function
from .text import quoted
from .tuner import VisualConfig, VisualTuner, VisualTunerLayer
from .writing import written_whole


@dataclass
class SteeringConfig(VisualConfig):
    """Fields of every adapter that steers attention.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all that it can act on.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    has_parameters: ClassVar[bool] = False

    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the decoder layers it acts on, or None: all that it can act on."},
    )
    init_weights: bool = field(default=True, metadata={"help": "Without effect: there are no weights."})

    def __post_init__(self):
        super().__post_init__()
        if self.layers_to_transform is not None:
            self.layers_to_transform = layer_list(self, "None")
        check(self, "init_weights", isinstance(self.init_weights, bool), "True or False")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the whole adapter: the configuration, a card, and a weights file without tensors.

        Of what PEFT and transformers write themselves, nothing else matters here: PEFT's file does not say what it
        belongs to, and transformers writes none.
        """
        metadata = {"format": "pt", "method": self.method, "version": FORMAT_VERSION}
        with written_whole(save_directory) as staged:
            super().save_pretrained(staged, **kwargs)
            save_file({}, staged / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)


Config = TypeVar("Config", bound=SteeringConfig)


class SteeringLayer(VisualTunerLayer, Generic[Config]):
    """A child of the text model that tells each forward what to do to the attention of which layers.

    Args:
        vlm: The model's parts.
        layers: The decoder layers that the method can act on.
    """

    adapter_layer_names = ()
    other_param_names = ("adapter_configs",)

    def __init__(self, vlm: VisionLanguageModel, layers: list[int]):
        super().__init__()
        self.layers = layers
        self.adapter_configs: dict[str, Config] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._vlm = (vlm,)  # in a tuple: the parent is no submodule
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def plan(self, context: VisualContext, configs: dict[str, Config]) -> None:
        """Put what the active adapters do into the context of a forward, by `Steering.add`.

        Args:
            context: It is complete but for positions.
            configs: Of the active adapters, by name, at least one.
        """
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # nothing to move

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapter_configs)

    def config_of(self, adapter_name: str) -> Config:
        return self.adapter_configs[adapter_name]

    def join(self) -> None:
        if self._handles:
            return
        vlm = self._vlm[0]
        self._handles = [
            vlm.text_model.register_forward_pre_hook(self._start_forward, with_kwargs=True),
        ]
        for attention in vlm.self_attentions.values():
            steer(attention)

    def part(self) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for attention in self._vlm[0].self_attentions.values():
            release(attention)

    def _start_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        self.prepare(context)
        if self.disable_adapters:
            return
        configs = {name: self.adapter_configs[name] for name in self.active_adapters if name in self.adapter_configs}
        if configs:
            context.check_keys()
            self.plan(context, configs)

    def prepare(self, context: VisualContext) -> None:
        """What a forward has to keep even while no adapter is active."""

    def layers_of(self, config: Config) -> list[int]:
        """The layers that an adapter acts on."""
        return self.layers if config.layers_to_transform is None else cast(list[int], config.layers_to_transform)


def steerable_attentions(vlm: VisionLanguageModel, needed_by: str) -> dict[int, nn.Module]:
    """By layer index, the self-attention modules, all of which look up their kernel where it can be steered.

    Args:
        vlm: The model's parts.
        needed_by: Who wants to steer or observe them, for the message.

    Raises:
        ValueError: There is none, or one that cannot be steered; the message says why.
    """
    if not vlm.self_attentions:
        raise ValueError(f"{type(vlm.model).__name__} has no layer with self-attention, which {needed_by} works on.")
    for layer_idx, attention in vlm.self_attentions.items():
        where = f"{type(attention).__name__} (decoder layer {layer_idx} of {type(vlm.model).__name__})"
        if not is_steerable(attention):
            raise ValueError(
                f"{where} does not look up its kernel in transformers' AttentionInterface, through which {needed_by} "
                "reaches attention."
            )
        unknown = [name for name in ("kv_lora_rank", "sinks") if hasattr(attention, name)]
        if unknown:
            raise ValueError(
                f"{where} has {unknown}: {needed_by} knows neither multi-head latent attention nor attention sinks."
            )
    return vlm.self_attentions


class SteeringTuner(VisualTuner):
    """Base of the tuners. A subclass says on which layers it can act."""

    def steerable_layers(self) -> list[int]:
        """The layers that the method can act on.

        Raises:
            ValueError: There is none, or one that is not known well enough; the message says why.
        """
        vlm = self.vlm
        attentions = steerable_attentions(vlm, type(self).__name__)
        for layer_idx, attention in attentions.items():
            if vlm.rotary is not None and vlm.rotates(attention) and not has_rotary_function(attention):
                raise ValueError(
                    f"{type(attention).__name__} (decoder layer {layer_idx} of {type(vlm.model).__name__}) rotates by "
                    f"none of {ROTARY_FUNCTIONS}, of which {type(self).__name__} needs one."
                )
        return list(attentions)

    def resolve(self, config: Any) -> Any:
        layers = self.steerable_layers()
        wrong = [layer_idx for layer_idx in config.layers_to_transform or () if layer_idx not in layers]
        if wrong:
            raise ValueError(
                f"{type(config).__name__}.layers_to_transform names layers {quoted(wrong)}, but on "
                f"{type(self.model).__name__} the method can act on layers {quoted(layers)} only."
            )
        return config

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} has no weights to combine. Attach one adapter with the settings wanted instead."
        )

    def targeted_names(self, config: Any) -> tuple[str, ...]:
        return (self.vlm.text_model_name,)

    def expected_tensors(self, config: Any, layer: nn.Module) -> dict[str, torch.Tensor]:
        return {}

    def new_layer(self, target: nn.Module) -> VisualTunerLayer:
        return self.tuner_layer_cls(self.vlm, self.steerable_layers())

    def add_adapter_to(self, layer: Any, adapter_name: str, config: Any) -> None:
        layer.adapter_configs[adapter_name] = config

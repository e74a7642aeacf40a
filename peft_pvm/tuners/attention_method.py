"""A method that changes attention is one class: its configuration, which says what stages it adds to a layer.

`attention_tuner` makes the rest of such a class, the tuner and its layer.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import nn

from ..attention.attention_check import AttentionCheck
from ..attention.dispatch import SteeringHandle, steerable_attentions
from ..attention.rotation import ROTARY_FUNCTIONS, has_rotary_function
from ..attention.stages import LayerStages, Stage
from ..folders.adapter_file import FORMAT_VERSION, SAFETENSORS_WEIGHTS_NAME
from ..folders.writing import written_whole
from ..tokens.context import CONTEXT, VisualContext, dropped_keywords
from ..tokens.families import VisionLanguageModel
from ..utils.checks import layer_list, setting
from ..utils.text import quoted
from .base import VisualConfig, VisualTuner, VisualTunerLayer


Rows = Literal["text", "generated"]
ROWS = "All text behind an image, or the last token of each forward alone, as the authors' code does."


@dataclass(frozen=True)
class SteeredLayer:
    """A decoder layer whose attention a method can change.

    Attributes:
        layer_idx: Its index.
        rotary: The rotary embedding that it uses; `None` in a layer that does not rotate queries and keys.
        layer_type: Its type, for a rotary embedding that tells types apart.
    """

    layer_idx: int
    rotary: nn.Module | None
    layer_type: str | None


@dataclass
class AttentionMethod(VisualConfig):
    """Base of the methods that change attention and have no parameters: a subclass is a whole method.

    A subclass has a name, `method`, fields made by `setting`, and `stages`. What model cards say of it (`title`,
    `summary`, `paper`) comes from its docstring unless it says otherwise: the first paragraph, and the first arXiv
    number in it.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the method's own choice, which
            is all that it can act on unless the method says otherwise.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    has_parameters: ClassVar[bool] = False
    rotates: ClassVar[bool] = False  # whether it rotates queries or keys itself
    multiplies_scores: ClassVar[bool] = False  # so that a score below 0 goes the other way
    # Its first and last layer in the paper, and of how many. `None`: all that it can act on.
    layers_of_paper: ClassVar[tuple[int, int, int] | None] = None

    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the decoder layers it acts on, or None: all that it can act on."},
    )
    init_weights: bool = setting(
        True,
        "Without effect: there are no weights.",
        valid=lambda value: isinstance(value, bool),
        accepted="True or False",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        summary = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
        paper = re.search(r"arXiv[: ](\d{4}\.\d{5})", summary)
        said = {
            "title": cls.__name__.removesuffix("Config"),
            "summary": re.sub(r" \(arXiv[^)]*\)", "", summary),
            "paper": paper.group(1) if paper else "",
        }
        for name, value in said.items():
            if not hasattr(cls, name):
                setattr(cls, name, value)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None:
            self.layers_to_transform = layer_list(self, "None")

    def stages(self, layer: SteeredLayer) -> Stage | Sequence[Stage]:
        """What it does to the attention of a layer: nothing, one stage or several.

        Called in every forward, for each layer that it acts on.
        """
        raise NotImplementedError

    @classmethod
    def layers_on(cls, vlm: VisionLanguageModel) -> list[int]:
        """The layers of a model that the method can act on.

        Raises:
            ValueError: There is none, or one that is not known well enough; the message says why.
        """
        attentions = steerable_attentions(vlm, cls.tuner_name())
        for layer_idx, attention in attentions.items():
            rotates = cls.rotates and vlm.rotary is not None and vlm.rotates(attention)
            if rotates and not has_rotary_function(attention):
                raise ValueError(
                    f"{type(attention).__name__} (decoder layer {layer_idx} of {type(vlm.model).__name__}) rotates by "
                    f"none of {ROTARY_FUNCTIONS}, of which {cls.tuner_name()} needs one."
                )
        return list(attentions)

    def default_layers(self, layers: list[int]) -> list[int]:
        """What `layers_to_transform=None` means, among the layers that the method can act on: the paper's part."""
        if self.layers_of_paper is None:
            return layers
        *ends, depth = self.layers_of_paper
        first, last = (round(layer_idx / (depth - 1) * (len(layers) - 1)) for layer_idx in ends)
        return layers[first : last + 1]

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        """Have a forward keep what the method needs later, even while no adapter is active."""

    @classmethod
    def tuner_name(cls) -> str:
        """The name of its tuner."""
        return cls.__name__.removesuffix("Config") + "Model"

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the whole adapter: the configuration, a card, and a weights file without tensors.

        Of what PEFT and transformers write themselves, nothing else matters here: PEFT's file does not say what it
        belongs to, and transformers writes none.
        """
        metadata = {"format": "pt", "method": self.method, "version": FORMAT_VERSION}
        with written_whole(save_directory) as staged:
            super().save_pretrained(staged, **kwargs)
            save_file({}, staged / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)


class AttentionMethodLayer(VisualTunerLayer):
    """A child of the text model that tells each forward what to do to the attention of which layers.

    Args:
        vlm: The model's parts.
    """

    method_cls: ClassVar[type[AttentionMethod]]
    adapter_layer_names = ()

    def __init__(self, vlm: VisionLanguageModel):
        super().__init__(vlm)
        self.layers = {
            layer_idx: SteeredLayer(layer_idx, vlm.rotary_of(layer_idx), vlm.layer_type(layer_idx))
            for layer_idx in self.method_cls.layers_on(vlm)
        }
        self._unchecked = set(self.layers)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # nothing to move

    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)

    def new_hooks(self) -> list[Any]:
        start = self.vlm.text_model.register_forward_pre_hook(self._start_forward, with_kwargs=True)
        attentions = self.vlm.self_attentions
        return [start, *map(SteeringHandle, attentions.values()), *map(self._new_check, sorted(self._unchecked))]

    def _new_check(self, layer_idx: int) -> AttentionCheck:
        layer, attention = self.layers[layer_idx], self.vlm.self_attentions[layer_idx]
        passed = functools.partial(self._unchecked.discard, layer_idx)
        rotates = self.method_cls.rotates
        return AttentionCheck(attention, layer.rotary, layer.layer_type, rotates, self.acting, passed)

    def _start_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        self.method_cls.start_forward(context)
        for adapter_name in self.acting():
            context.check_keys()
            self._add_stages(context, adapter_name)

    def _add_stages(self, context: VisualContext, adapter_name: str) -> None:
        config = self.configs[adapter_name]
        chosen = config.layers_to_transform
        for layer_idx in config.default_layers(list(self.layers)) if chosen is None else chosen:
            stages = config.stages(self.layers[layer_idx])
            for stage in [stages] if isinstance(stages, Stage) else stages:
                context.stages.setdefault(layer_idx, LayerStages()).add(stage, adapter_name, layer_idx)
                context.await_layer(layer_idx, dropped_keywords)


class AttentionMethodTuner(VisualTuner):
    """Base of the tuners that `attention_tuner` makes."""

    method_cls: ClassVar[type[AttentionMethod]]

    def steerable_layers(self) -> list[int]:
        """The layers that the method can act on: see `AttentionMethod.layers_on`."""
        return self.method_cls.layers_on(self.vlm)

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
        return self.tuner_layer_cls(self.vlm)


def attention_tuner(method_cls: type[AttentionMethod]) -> type[AttentionMethodTuner]:
    """The tuner of a method: the same class each time it is asked for."""
    known = _TUNERS.get(method_cls)
    if known is None:
        known = _TUNERS[method_cls] = _make_tuner(method_cls)
    return known


def _make_tuner(method_cls: type[AttentionMethod]) -> type[AttentionMethodTuner]:
    name = method_cls.__name__.removesuffix("Config")
    common = {"__module__": method_cls.__module__, "method_cls": method_cls}
    layer_doc = f"Stands beside the text model and has {name} act on attention."
    layer_cls = type(f"{name}Layer", (AttentionMethodLayer,), {**common, "__doc__": layer_doc})
    tuner = {
        **common,
        "__doc__": _TUNER_DOC.format(name=name, method=method_cls.method),
        "prefix": f"{method_cls.method}_",
        "child_name": method_cls.method,
        "tuner_layer_cls": layer_cls,
    }
    return cast(type[AttentionMethodTuner], type(method_cls.tuner_name(), (AttentionMethodTuner,), tuner))


_TUNERS: dict[type[AttentionMethod], type[AttentionMethodTuner]] = {}
_TUNER_DOC = """Attaches {name} to a vision-language model: the text model gets a child `{method}` without parameters.

Args:
    model: A vision-language model from transformers.
    peft_config: The adapter's configuration.
    adapter_name: The adapter's name.

Raises:
    ValueError: The model is not one that fits, or the configuration does not fit the model.

Example:
    model = get_peft_model(model, {name}Config())
"""

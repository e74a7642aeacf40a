"""A method without parameters is one class, its configuration: saved without tensors, with a tuner made from it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..folders.adapter_file import FORMAT_VERSION
from ..folders.data_file import to_safetensors
from ..folders.writing import written_whole
from ..utils.checks import layer_list, setting
from .base import VisualConfig, VisualTuner
from .layers import VisualTunerLayer


Rows = Literal["text", "generated"]
ROWS = "All text after an image, or only the last token of each forward, as in the authors' code."


def no_weights() -> Any:
    """The field `init_weights`, which each kind of method has after its own fields."""
    return setting(
        True,
        "Without effect: there are no weights.",
        valid=lambda value: isinstance(value, bool),
        accepted="True or False",
    )


@dataclass
class WithoutParameters(VisualConfig):
    """Base of the kinds of methods whose configuration is the whole method.

    A method has a name, `method`, and fields made by `setting`. What model cards say of it (`title`, `summary`,
    `paper`) comes from its docstring unless it says otherwise: the first paragraph, and the first arXiv number in it.
    """

    has_parameters: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "method"):  # a kind of methods
            return
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

    @classmethod
    def tuner(cls) -> type[VisualTuner]:
        """Its tuner: the same class each time."""
        raise NotImplementedError

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
            (staged / SAFETENSORS_WEIGHTS_NAME).write_bytes(to_safetensors({}, metadata))


@dataclass
class LayerMethod(WithoutParameters):
    """Base of the kinds of methods that act in decoder layers.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the method's own choice, which
            is all that it can act on unless the method says otherwise.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    # Its first and last layer in the paper, and of how many. `None`: all that it can act on.
    layers_of_paper: ClassVar[tuple[int, int, int] | None] = None

    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the decoder layers it acts on, or None: all that it can act on."},
    )
    init_weights: bool = no_weights()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None:
            self.layers_to_transform = layer_list(self, "None")

    def default_layers(self, layers: list[int]) -> list[int]:
        """What `layers_to_transform=None` means, among the layers that the method can act on: the paper's part."""
        if self.layers_of_paper is None:
            return layers
        *ends, depth = self.layers_of_paper
        first, last = (round(layer_idx / (depth - 1) * (len(layers) - 1)) for layer_idx in ends)
        return layers[first : last + 1]

    def layers_among(self, layers: list[int]) -> list[int]:
        """The layers that it acts on, among those that the method can act on."""
        chosen = self.layers_to_transform
        return self.default_layers(layers) if chosen is None else cast(list[int], chosen)


class _Made:
    """Base of the classes that `make_tuner` makes: pickle does not find them by their names."""

    method_cls: ClassVar[type[Any]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.method_cls, isinstance(self, VisualTunerLayer)), self.__dict__


def _blank(method_cls: type[WithoutParameters], is_layer: bool) -> Any:
    """What pickle then gives its attributes."""
    cls: Any = method_cls.tuner()
    cls = cls.tuner_layer_cls if is_layer else cls
    return cls.__new__(cls)


class LayerWithoutParameters(_Made, VisualTunerLayer):
    """A child of the text model that holds the settings of the adapters of one method."""

    adapter_layer_names = ()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # nothing to move

    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)


class TunerWithoutParameters(_Made, VisualTuner):
    """Base of the tuners that `make_tuner` makes."""

    def resolve(self, config: Any) -> Any:
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


Tuner = TypeVar("Tuner", bound=TunerWithoutParameters)


def make_tuner(
    method_cls: type[WithoutParameters], tuner_cls: type[Tuner], layer_cls: type[LayerWithoutParameters], does: str
) -> type[Tuner]:
    """The tuner of a method: the same class each time it is asked for.

    Args:
        method_cls: The method.
        tuner_cls: What its tuner is a subclass of.
        layer_cls: What its layer is a subclass of.
        does: What the layer has the method do, for its docstring.
    """
    if method_cls not in _TUNERS:
        name = method_cls.__name__.removesuffix("Config")
        common = {"__module__": method_cls.__module__, "method_cls": method_cls}
        layer_doc = f"A child of the text model that has {name} {does}."
        tuner = {
            **common,
            "__doc__": _TUNER_DOC.format(name=name, method=method_cls.method),
            "prefix": f"{method_cls.method}_",
            "child_name": method_cls.method,
            "tuner_layer_cls": type(f"{name}Layer", (layer_cls,), {**common, "__doc__": layer_doc}),
        }
        _TUNERS[method_cls] = type(method_cls.tuner_name(), (tuner_cls,), tuner)
    return cast(type[Tuner], _TUNERS[method_cls])


_TUNERS: dict[type[WithoutParameters], type[VisualTuner]] = {}
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

"""Adapters for the length of a `with` block."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from .steering import SteeringConfig
from .text import quoted
from .tuner import VisualConfig, VisualTuner, VisualTunerLayer


_numbers = itertools.count()  # blocks may stand inside one another
Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def attached(model: Model, *configs: VisualConfig) -> Iterator[Model]:
    """Attach fresh adapters to a model, all active beside those it has, and take them off at the end.

    They act also where the model's own adapters are disabled. The model is then as it was, also after an exception:
    modules, hooks, adapters and which of them act. What is trainable does not change, but what they bring is.

    Args:
        model: A vision-language model from transformers, or a PeftModel of one.
        configs: What to attach.

    Yields:
        The same model.

    Raises:
        TypeError: A configuration is not one of this package's.
        ValueError: A configuration was loaded with weights, which would not be, or does not fit the model.

    Example:
        with attached(model, DIPEConfig(), TDRSConfig()):
            model.generate(**inputs)
    """
    for config in configs:
        if not isinstance(config, VisualConfig):
            raise TypeError(f"attached takes the configurations of peft_pvm, not {type(config).__name__}.")
        if config._source is not None and not isinstance(config, SteeringConfig):
            raise ValueError(
                f"{type(config).__name__} was loaded from {quoted(config._source.path)}, but attached starts adapters "
                "afresh. Load the adapter with PeftModel.from_pretrained."
            )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    had_configs = hasattr(base, "peft_config")
    acting = {
        layer: (layer.active_adapters, layer.disable_adapters)
        for layer in base.modules()
        if isinstance(layer, VisualTunerLayer)
    }
    tuners: list[tuple[str, VisualTuner]] = []
    try:
        for config in configs:
            name = f"attached_{next(_numbers)}"
            tuner_cls = cast(Any, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type])  # type: ignore[index]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
                tuners.append((name, tuner_cls(base, copy.copy(config), name)))
            names = [name for name, _ in tuners]
            for layer in base.modules():
                if isinstance(layer, VisualTunerLayer):
                    others, disabled = acting.get(layer, ([], False))
                    layer.enable_adapters(True)
                    layer.set_adapter([*([] if disabled else others), *names])
        _set_trainable(trainable)
        yield model
    finally:
        for name, tuner in reversed(tuners):
            tuner.remove_adapter(name)
        for layer, (names, disabled) in acting.items():
            layer.set_adapter(names)
            layer.enable_adapters(not disabled)
        _set_trainable(trainable)
        if not had_configs and not getattr(base, "peft_config", True):
            del base.peft_config


def _set_trainable(trainable: dict[nn.Parameter, bool]) -> None:
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad = requires_grad

"""Adapters for the length of a `with` block."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ..text import quoted
from .active import base_of, restored
from .base import VisualConfig, VisualTuner, VisualTunerLayer


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
        if config.source is not None and config.has_parameters:
            raise ValueError(
                f"{type(config).__name__} was loaded from {quoted(config.source.path)}, but attached starts adapters "
                "afresh. Load the adapter with PeftModel.from_pretrained."
            )
    base = base_of(model)
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    with contextlib.ExitStack() as stack:
        if not hasattr(base, "peft_config"):
            stack.callback(_forget_configs, base)
        acting = stack.enter_context(restored(base))
        names = [f"attached_{next(_numbers)}" for _ in configs]
        for name, config in zip(names, configs):
            tuner_cls = cast(Any, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type])  # type: ignore[index]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
                tuner: VisualTuner = tuner_cls(base, copy.copy(config), name)
            stack.callback(tuner.remove_adapter, name)
        for layer in base.modules():
            if isinstance(layer, VisualTunerLayer):
                layer.enable_adapters(True)
                layer.set_adapter([*acting.get(layer, []), *names])
        for parameter, requires_grad in trainable.items():  # attaching has frozen the base
            parameter.requires_grad = requires_grad
        yield model


def _forget_configs(base: nn.Module) -> None:
    if not getattr(base, "peft_config", True):
        del base.peft_config

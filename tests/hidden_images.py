"""Forwards of training with images hidden: what they compute, and what they leave behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from forwards import difference
from tiny_vlms import IMAGE, VIDEO

from peft_pvm.attention.dispatch import ConfigView
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.active import base_of


def in_training(model: torch.nn.Module) -> torch.nn.Module:
    """Without dropout, and with flex attention, which has no backward pass on a CPU, without gradients."""
    model.train()
    if model.get_base_model().config.get_text_config()._attn_implementation == "flex_attention":
        model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trained_on(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a forward of training."""
    with torch.compiler.set_stance("force_eager"):  # flex attention would compile for half a minute
        return model(**inputs, use_cache=False).logits.detach()


def with_other_pixels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: -tensor.flip(-1) if "pixel_values" in name else tensor for name, tensor in inputs.items()}


def visual_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def text_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["attention_mask"].bool() & ~visual_tokens(inputs)


@contextlib.contextmanager
def gates_at_zero(model: torch.nn.Module) -> Iterator[None]:
    """PVM is active, and adds nothing."""
    gates = [parameter for name, parameter in model.named_parameters() if "pvm_gate." in name]
    before = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    yield
    with torch.no_grad():
        for gate, value in zip(gates, before):
            gate.copy_(value)


def changes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """By how much text changes with the pixels, in training."""
    text = text_tokens(inputs)
    return difference(trained_on(model, inputs)[text], trained_on(model, with_other_pixels(inputs))[text])


def leftovers(model: torch.nn.Module) -> list[str]:
    """The attention modules that are steered, and the hooks that PVM and the tap have not put on."""
    gc.collect()
    text_model = find_vlm(base_of(model)).text_model
    steered = [
        name for name, module in model.named_modules() if isinstance(getattr(module, "config", None), ConfigView)
    ]
    hooks = [f"{hook.__module__}" for module in text_model.modules() for hook in module._forward_pre_hooks.values()]
    return steered + [hook for hook in hooks if hook.startswith("peft_pvm.training")]

"""With its image hidden, a model knows of it what PVM tells: on every family and kernel, in training alone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from forwards import GENERATE, TOLERANCE, difference, logits
from methods_under_test import METHODS, Method, Together
from peft import LoraConfig, PeftModel, get_peft_model
from test_five_properties import _is_supported, _routes_tokens_together
from tiny_vlms import FAMILIES, IMAGE, VIDEO, TinyVLM

from peft_pvm import PVMConfig, add_adapters
from peft_pvm.attention.dispatch import ConfigView
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.families import find_vlm
from peft_pvm.training import hidden_image
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")  # two images, one, none
KERNELS = ("eager", "sdpa", "flex_attention", "flash_stand_in")


def built(family: TinyVLM, kernel: str = "sdpa", method: str = "pvm") -> PeftModel:
    """A model in training with an adapter that acts. Skips kernels that transformers has not for the family."""
    if kernel == "flash_stand_in":
        model = family.build()
        model.config.get_text_config()._attn_implementation = kernel
    elif _is_supported(family, kernel):
        model = family.build(attn_implementation=kernel)
    else:
        pytest.skip(f"{family.model_class} does not run on {kernel}")
    return in_training(METHODS[method].attach(model))


def in_training(model: torch.nn.Module) -> torch.nn.Module:
    """Without dropout, and where flex attention runs on a CPU, which has no backward pass there, without parameters."""
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


@pytest.mark.parametrize("kernel", KERNELS)
def test_text_learns_of_the_image_from_pvm_alone(family: TinyVLM, kernel: str):
    model = built(family, kernel)
    base = model.get_base_model()
    # A mixture of experts computes an expert's tokens in one product: equal, but for the last bit.
    least = TOLERANCE if _routes_tokens_together(base) else 0
    for rows in (ROWS, ("t4 v t6",)) if family.video else (ROWS,):
        inputs = family.inputs(base, *rows)
        with hidden_image(model):
            assert changes(model, inputs) > 100 * TOLERANCE
        with gates_at_zero(model):
            assert changes(model, inputs) > 100 * TOLERANCE, "in sight, it is seen"
            with hidden_image(model):
                assert changes(model, inputs) <= least

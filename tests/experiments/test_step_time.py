"""What is measured of a training step: memory without the weights, and LoRA as large as PVM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3VLForConditionalGeneration

from experiments.base import new_tiny_vlm
from experiments.step_time import Step, bytes_kept, lora_of_size, middle_config, operations_of
from peft_pvm import PVMConfig


class Exponential(torch.nn.Linear):
    def forward(self, tensor, use_cache):
        return SimpleNamespace(loss=super().forward(tensor).exp().sum())


def test_memory_is_what_the_forward_keeps_without_weights():
    tensor = torch.zeros(2, 1000, requires_grad=True)
    assert bytes_kept(Step(Exponential(1000, 50, bias=False), {"tensor": tensor})) == 4 * (2 * 1000 + 2 * 50)


def test_lora_is_as_large_as_pvm():
    pvm = get_peft_model(new_tiny_vlm(), PVMConfig(r=64)).get_nb_trainable_parameters()[0]
    lora = get_peft_model(new_tiny_vlm(), lora_of_size(new_tiny_vlm(), pvm)).get_nb_trainable_parameters()[0]
    assert lora == pytest.approx(pvm, rel=0.05)


def test_the_middle_model_is_one():
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(middle_config())
    assert model.num_parameters() == pytest.approx(0.36e9, rel=0.05)


def test_operations_of_a_forward_and_backward():
    tensor = torch.zeros(2, 1000, requires_grad=True)
    one_product = 2 * 2 * 1000 * 50
    assert operations_of(Step(Exponential(1000, 50, bias=False), {"tensor": tensor})) == 3 * one_product

"""PVM starts from the unchanged model, can learn, and has the right gradients however the forward is run."""

from __future__ import annotations

import copy

import pytest
import torch
from forwards import difference, logits
from methods_under_test import METHODS, give_weight
from peft import PeftModel, get_peft_model
from tiny_vlms import FAMILIES, TinyVLM
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")


def loss_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels, use_cache=False).loss


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in one.values())
    for name, gradient in one.items():
        assert difference(gradient, other[name]) < 1e-5, name


def test_starts_unchanged_and_every_parameter_learns(family: TinyVLM):
    model = family.build().requires_grad_(False)  # as PEFT has it
    inputs = family.inputs(model, *ROWS)
    base = logits(model, inputs)
    model = get_peft_model(model, PVMConfig(r=32))
    assert torch.equal(logits(model, inputs), base)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".pvm_" in name for name in trainable)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model, inputs).backward()
    first = {
        name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters() if name in trainable
    }
    assert all(first[name] > 0 for name in trainable if "pvm_gate." in name), "the gate learns at once"
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, inputs).backward()
    second = gradients(model)
    assert {name for name in trainable if second[name].abs().max() == 0} == set(), "and the rest from the second step"


def test_parameter_count_of_the_papers_8b_model():
    """Source: arXiv 2605.00814, 27,922,179 parameters for Qwen3-VL-8B."""
    text = dict(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text))
    model = get_peft_model(model, PVMConfig())
    assert model.get_nb_trainable_parameters()[0] == 27_922_179
    assert model.peft_config["default"].layers_to_transform == [8, 16, 24]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("memory_source", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "gemma3", "aya_vision", "qwen3_5"])
def test_gradient_checkpointing(name: str, reentrant: bool, memory_source: str):
    family = FAMILIES[name]
    model = METHODS["pvm"].attach(family.build(), memory_source=memory_source).train()
    _no_dropout(model)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    loss_of(model, inputs).backward()
    expected = gradients(model)

    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss_of(model, inputs).backward()
    assert_equal_gradients(gradients(model), expected)

    # Another forward, with other images, between a forward and its backward.
    other = family.inputs(model.get_base_model(), "t5 i t8")
    loss = loss_of(model, inputs)
    other_loss = loss_of(model, other)
    loss.backward()
    assert_equal_gradients(gradients(model), expected)
    other_loss.backward()
    checkpointed = gradients(model)
    model.gradient_checkpointing_disable()
    loss_of(model, other).backward()
    assert_equal_gradients(checkpointed, gradients(model))


def test_two_forwards_before_one_backward(family: TinyVLM):
    model = METHODS["pvm"].attach(family.build()).train()
    _no_dropout(model)
    one, other = family.inputs(model.get_base_model(), "t4 i t6"), family.inputs(model.get_base_model(), "t5 i i t8")
    expected: dict[str, torch.Tensor] = {}
    for inputs in (one, other):
        loss_of(model, inputs).backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient
    (loss_of(model, one) + loss_of(model, other)).backward()
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("memory_source", ["embeddings", "hidden_states"])
def test_batch_without_images_still_runs_the_branch(memory_source: str):
    """A rank that skipped it would leave the others of a sharded model waiting; what it gets is gradients of zero."""
    family = FAMILIES["qwen3_vl"]
    model = METHODS["pvm"].attach(family.build(), memory_source=memory_source).train()
    inputs = family.inputs(model.get_base_model(), "t9", "t5")
    with model.disable_adapter():
        base = logits(model, inputs)
    output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert torch.equal(output.logits.detach(), base)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_memory_carries_no_gradient_into_the_vision_tower():
    family = FAMILIES["qwen2_5_vl"]
    model = METHODS["pvm"].attach(family.build())
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    captured = []
    handle = model.get_base_model().model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(kwargs["visual_context"]), with_kwargs=True
    )
    model.get_base_model().model.visual.requires_grad_(True)
    loss_of(model, inputs)
    handle.remove()
    assert not captured[0].memory.embeddings.requires_grad


def test_trained_adapter_evaluates_as_it_trained():
    """With gradients nothing of the memory is kept between steps; without, keys and values are: both give the same."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    inputs = family.inputs(model.get_base_model(), *ROWS)
    assert torch.equal(model(**inputs).logits.detach(), logits(model, inputs))
    length = inputs["input_ids"].shape[1]
    whole = family.inputs(model.get_base_model(), ROWS[0])
    cache = model(**family.inputs(model.get_base_model(), ROWS[0], stop=length - 2), use_cache=True)[CACHE]
    rest = model(**family.inputs(model.get_base_model(), ROWS[0], start=length - 2), **{CACHE: cache}).logits
    assert difference(rest.detach(), logits(model, whole)[:, -2:]) < 1e-5


def test_deepcopied_model_is_its_own():
    """Hooks of a copied model must read the copy's adapter."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    inputs = family.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    give_weight(model, seed=1)
    assert torch.equal(logits(twin, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)


def test_bfloat16_base():
    family = FAMILIES["qwen3_vl"]
    base = family.build().to(torch.bfloat16)
    inputs = family.inputs(base, *ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = logits(base, inputs)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(base, PVMConfig(r=32), autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if ".pvm_" in name} == {dtype}
        assert torch.equal(logits(model, inputs), expected)
        give_weight(model)
        on = logits(model, inputs)
        assert on.dtype == torch.bfloat16
        assert difference(on[:2], expected[:2]) > 0.01
        assert torch.equal(on[2], expected[2])
        base = model.unload()


def _no_dropout(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

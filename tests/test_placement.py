"""Bases in half precision, quantised, offloaded: the adapter computes beside them as it does on a plain one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS, STEERING, Combination, Method, give_weight
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_vlms import TinyVLM
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from peft_pvm import DIPEConfig, PVMConfig, load_adapters
from peft_pvm.methods.var import sizes
from peft_pvm.probe.observers import visual_mask
from peft_pvm.tokens.blocks import layer_input
from peft_pvm.tokens.families import find_vlm


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")


def in_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(tiny: TinyVLM, dtype: torch.dtype, autocast_adapter_dtype: bool):
    """The adapter's weights are fp32 by default, the base's dtype otherwise, and the output near that in fp32."""
    exact = METHODS["pvm"].attach(tiny.build())
    inputs = tiny.inputs(exact.get_base_model(), *ROWS)
    expected = logits(exact, inputs)
    base = tiny.build().to(dtype)
    real = inputs["attention_mask"].bool()
    off = logits(base, in_dtype(inputs, dtype))
    model = get_peft_model(base, PVMConfig(r=32), autocast_adapter_dtype=autocast_adapter_dtype).eval()
    fresh = logits(model, in_dtype(inputs, dtype))
    if dtype == torch.float16:  # whose matrix products on a CPU round by how memory lies: LoRA has it as well
        assert difference(fresh[real], off[real]) < 0.01
    else:
        assert torch.equal(fresh[real], off[real])
    give_weight(model)
    wanted = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for name, p in model.named_parameters() if ".pvm_" in name} == {wanted}
    on = logits(model, in_dtype(inputs, dtype))
    assert on.dtype == dtype
    with exact.disable_adapter():
        rounding = difference(off.float()[real], logits(exact, inputs)[real])
    assert difference(on.float()[real], expected[real]) < 3 * max(rounding, 0.01)
    assert difference(on.float()[real], off.float()[real]) > 0.3
    model.train()(**in_dtype(inputs, dtype)).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


STRONG = {
    "vaf": {"visual": 4.0},
    "pai": {"alpha": 1.0},
    "hgai": {"alpha": 1.5},
    "cai": {"slope": 1.0, "layers_to_transform": [0, 1, 2]},
    "var": {"rho": 1.0, "least_visual": 0.0, "p": 0.0},
    "memvr": {"ratio": 0.8},
}
"""Fields for a method whose defaults change less than few bits round."""


def strong(name: str, base: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`STRONG`, with a channel and a threshold so far from what any token has that rounding takes none across."""
    if name != "var":
        return STRONG.get(name, {})
    found: list[torch.Tensor] = []
    vlm = find_vlm(base)

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = layer_input(args, kwargs, len(ROWS), vlm.text_config.hidden_size)
        found.append(sizes(states).abs())

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in vlm.layers]
    logits(base, inputs)
    for handle in handles:
        handle.remove()
    of_images = torch.stack(found)[:, visual_mask(vlm, inputs)].flatten(0, 1).quantile(0.9, dim=0)  # a tenth is above
    size = torch.cat(found).flatten(0, 1).sort(0).values  # (tokens of all layers, channels)
    some_are_visual = (size[1:] <= of_images) & (size[:-1] > size.median(0).values)
    number, channel = divmod(int((size.diff(dim=0) * some_are_visual).argmax()), size.shape[1])
    return {**STRONG["var"], "sink_channels": [channel], "tau": float(size[number : number + 2, channel].mean())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [*STEERING, "tdrs-inter", "memvr"])
def test_half_precision_bases_are_changed(tiny: TinyVLM, name: str, dtype: torch.dtype):
    """As in fp32, to a few times what the base itself loses by the dtype."""
    base = tiny.build()
    inputs = tiny.inputs(base, *ROWS)
    fields = strong(name, base, inputs)
    exact = METHODS[name].attach(base, **fields)
    expected = logits(exact, inputs)
    model = METHODS[name].attach(tiny.build().to(dtype), **fields)
    real = inputs["attention_mask"].bool()
    on = logits(model, in_dtype(inputs, dtype)).float()[real]
    with exact.disable_adapter(), model.disable_adapter():
        exact_off, off = logits(exact, inputs)[real], logits(model, in_dtype(inputs, dtype)).float()[real]
    rounding = difference(off, exact_off)
    assert difference(on, expected[real]) < 4 * rounding
    assert difference(expected[real], exact_off) > 4 * rounding, "what it changes must be more than rounding"


# ---- quantised


QUANTISED = {
    "8 bits": dict(load_in_8bit=True),
    "4 bits": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


def wide(tiny: TinyVLM) -> PreTrainedModel:
    """Widths in multiples of 64, which four bits on a CPU want."""
    config = tiny.config()
    config.text_config.intermediate_size = 128
    return dataclasses.replace(tiny, config=lambda: config).build()


@pytest.fixture(params=QUANTISED)
def load_quantised(request: pytest.FixtureRequest, tiny: TinyVLM, tmp_path: Path) -> Callable[[], PreTrainedModel]:
    """Loads the tiny model in few bits, all but what sees, projects and predicts."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is installed for `make test-oldest` alone")
    wide(tiny).save_pretrained(tmp_path / "base")
    skipped = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]

    def load() -> PreTrainedModel:
        quantisation = BitsAndBytesConfig(**QUANTISED[request.param], llm_int8_skip_modules=skipped)
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, device_map="cpu"
        )
        assert {type(module).__name__ for module in model.modules()} & {"Linear8bitLt", "Linear4bit"}
        return model.eval()

    return load


def test_quantised_bases(tiny: TinyVLM, load_quantised: Callable[[], PreTrainedModel], tmp_path: Path):
    base = load_quantised()
    inputs = tiny.inputs(base, *ROWS)
    off = logits(base, inputs)
    model = get_peft_model(base, PVMConfig(r=32)).eval()
    assert {p.dtype for name, p in model.named_parameters() if ".pvm_" in name} == {torch.float32}
    assert torch.equal(logits(model, inputs), off)
    give_weight(model)
    on = logits(model, inputs)
    assert difference(on, off) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), off)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load_quantised(), tmp_path / "adapter").eval(), inputs), on)
    model.train()(**inputs).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    beside = get_peft_model(load_quantised(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    pvm = get_peft_model(beside.get_base_model(), PVMConfig(r=32), "pvm").eval()  # as QLoRA with PVM
    give_weight(pvm)
    assert difference(logits(pvm, inputs), off) > 0.1


@pytest.mark.parametrize("name", STEERING)
def test_quantised_bases_are_steered(tiny: TinyVLM, name: str, load_quantised: Callable[[], PreTrainedModel]):
    """As a plain base with the weights that the few bits stand for."""
    base = load_quantised()
    inputs = tiny.inputs(base, *ROWS)
    fields = strong(name, base, inputs)
    model = METHODS[name].attach(base, **fields)
    with model.disable_adapter():
        off = logits(model, inputs)
    assert torch.equal(off, logits(load_quantised(), inputs))
    on = logits(model, inputs)
    plain = METHODS[name].attach(load_quantised().dequantize(), **fields)
    with plain.disable_adapter():
        rounding = difference(logits(plain, inputs), off)
    # On a CPU without instructions for few bits, bitsandbytes computes with the plain weights: nothing is rounded.
    assert difference(logits(plain, inputs), on) <= 2 * rounding < difference(on, off)


# ---- offloaded


@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_offloaded_bases(tiny: TinyVLM, method: Method | Combination, where: str, tmp_path: Path):
    """accelerate moves weights in and out by hooks on the very modules that ours are on."""
    model = method.attach(tiny.build())
    base = model.get_base_model()
    inputs = tiny.inputs(base, *ROWS)
    expected = logits(model, inputs)
    execution: Any = {"execution_device": torch.device("cpu")}
    if where == "cpu":
        cpu_offload(base, **execution)
    elif where == "disk":
        disk_offload(base, str(tmp_path), **execution)
    else:
        names = [name for name, _ in base.named_children() if name != "lm_head"]
        device_map = {**dict.fromkeys(names, "disk"), "lm_head": "cpu"}
        dispatch_model(base, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert difference(logits(model, inputs), expected) < TOLERANCE


@pytest.mark.parametrize("through", ["peft_pvm", "transformers"])
def test_a_base_that_comes_offloaded(tiny: TinyVLM, tmp_path: Path, through: str):
    """From a checkpoint with a device map, one layer on the disk; then the adapter from its file.

    PeftModel.from_pretrained fails on such a base with any adapter, LoRA as well (PEFT 0.21.2).
    """
    plain = METHODS["pvm"].attach(tiny.build())
    inputs = tiny.inputs(plain.get_base_model(), *ROWS)
    expected = logits(plain, inputs)
    plain.save_pretrained(tmp_path / "adapter")
    tiny.build().save_pretrained(tmp_path / "base")
    on_disk = "model.language_model.layers.1"
    leaves = {
        name
        for name, module in tiny.build().named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    device_map = {name: "disk" if name.startswith(f"{on_disk}.") else "cpu" for name in sorted(leaves)}
    offload = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", **offload)
    assert {parameter.device.type for parameter in base.get_submodule(on_disk).parameters()} == {"meta"}
    if through == "peft_pvm":
        load_adapters(base, [str(tmp_path / "adapter")])
    else:
        base.load_adapter(tmp_path / "adapter")
    assert difference(logits(base.eval(), inputs), expected) < TOLERANCE


@pytest.mark.parametrize("moves_whole_model", [False, True])
def test_the_context_goes_where_a_module_is(tiny: TinyVLM, method: Method | Combination, moves_whole_model: bool):
    """accelerate moves the arguments of every module with a device of its own. "cpu:0" stands in for another one."""
    model = method.attach(tiny.build())
    base = model.get_base_model()
    inputs = tiny.inputs(base, *ROWS)
    expected = logits(model, inputs)
    text_model = base.model.language_model
    moved = []

    def move(forward):
        def call(*args, **kwargs):
            context = kwargs["visual_context"].to("cpu:0")
            moved.append(context is not kwargs["visual_context"] and context.to("cpu:0") is context)
            return forward(*args, **{**kwargs, "visual_context": context})

        return call

    for module in [text_model] if moves_whole_model else text_model.layers:
        module.forward = move(module.forward)
    assert difference(logits(model, inputs), expected) < TOLERANCE
    assert all(moved)
    assert len(moved) == (1 if moves_whole_model else len(text_model.layers))


def test_swapping_copies_nothing_of_the_base(tiny: TinyVLM, tmp_path: Path):
    """Four adapters loaded, switched and deleted: the base's tensors stay where they are, and no more are there."""
    METHODS["pvm"].attach(tiny.build()).save_pretrained(tmp_path / "a")
    get_peft_model(tiny.build(), DIPEConfig(max_distance=0)).save_pretrained(tmp_path / "dipe")
    base = tiny.build()
    places = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="one")
    for name in ("two", "three", "four"):
        model.load_adapter(tmp_path / "a", adapter_name=name)
        model.set_adapter(name)
        logits(model, tiny.inputs(base, *ROWS))
    model.delete_adapter("three")
    after = {name: parameter.data_ptr() for name, parameter in base.named_parameters() if ".pvm." not in name}
    assert after == places

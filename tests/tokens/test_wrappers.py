"""An adapter beside modules that others wrapped: it computes, is saved and comes off as if nothing were wrapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from environment import on_a_cpu
from forwards import counted_graphs, difference, logits
from methods_under_test import LEADING, METHODS, give_weight
from packaging.version import Version
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from tiny_vlms import FAMILIES, TinyVLM
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_pvm.tokens.families import find_vlm
from peft_pvm.training import hidden_image
from peft_pvm.utils.wrapping import plain_name


ROWS = ("t4 i t3 i t6", "t7 i t5")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpoint_layers(model: nn.Module) -> None:
    layers = set(find_vlm(model).layers)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: m in layers)


def replace_layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def replace(model: nn.Module) -> None:
        layers = find_vlm(model).text_model.layers
        for layer_idx, layer in enumerate(layers):
            layers[layer_idx] = wrap(layer)

    return replace


WRAPS = {
    "checkpointed": checkpoint_layers,
    "checkpointed and compiled": replace_layers(
        lambda layer: torch.compile(checkpoint_wrapper(layer), backend="eager")
    ),
    "sharded": replace_layers(lambda layer: FullyShardedDataParallel(layer, use_orig_params=True, device_id="cpu")),
}
HOW = [
    "PEFT",
    pytest.param(
        "transformers",
        marks=pytest.mark.skipif(
            Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="this transformers wants a newer PEFT"
        ),
    ),
]


@pytest.fixture
def tiny() -> TinyVLM:
    return FAMILIES["qwen3_vl"]


def attach(name: str, model: nn.Module, how: str = "PEFT") -> nn.Module:
    if how == "PEFT":
        return METHODS[name].attach(model)
    model.add_adapter(METHODS[name].config())
    METHODS[name].activate(model)
    return model.eval()


def wrapped_and_attached(name: str, tiny: TinyVLM, wrap: str, order: str, how: str = "PEFT") -> nn.Module:
    base = tiny.build()
    if order == "wrapped first":
        WRAPS[wrap](base)
    model = attach(name, base, how)
    if order == "attached first":
        WRAPS[wrap](base)
    return model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("order", ["wrapped first", "attached first"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", [*LEADING, "vaf"])
def test_as_without_wrappers(tiny: TinyVLM, name: str, wrap: str, order: str, how: str, tmp_path: Path):
    base = tiny.build()
    inputs = tiny.inputs(base, *ROWS)
    bare = logits(base, inputs)
    plain = attach(name, base, how)
    plain.save_pretrained(tmp_path / "plain")
    expected = logits(plain, inputs)
    assert difference(expected, bare) > 1e-4

    model = wrapped_and_attached(name, tiny, wrap, order, how)
    assert torch.equal(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "wrapped")
    saved, needed = (load_file(tmp_path / kind / WEIGHTS) for kind in ("wrapped", "plain"))
    assert saved.keys() == needed.keys()
    assert all(torch.equal(tensor, needed[key]) for key, tensor in saved.items())
    elsewhere = PeftModel.from_pretrained(tiny.build(), tmp_path / "wrapped")
    assert torch.equal(logits(elsewhere, inputs), expected)

    if how == "PEFT":
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), bare)
        model.add_adapter("second", METHODS[name].config())
        model.delete_adapter("second")
        assert torch.equal(logits(model, inputs), expected)
        unloaded = model.unload()
    else:
        model.disable_adapters()
        assert torch.equal(logits(model, inputs), bare)
        model.delete_adapter("default")
        unloaded = model
    assert torch.equal(logits(unloaded, inputs), bare)
    if how == "PEFT":
        again = tiny.build()
        WRAPS[wrap](again)
        assert [key for key, _ in unloaded.named_modules()] == [key for key, _ in again.named_modules()]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in find_vlm(unloaded).layers)


@pytest.mark.parametrize("order", ["wrapped first", "attached first"])
@pytest.mark.parametrize("name", ["pvm", "pvm-hidden-states"])
def test_gradients_under_activation_checkpointing(tiny: TinyVLM, name: str, order: str):
    found = {}
    for wrapped in (False, True):
        model = wrapped_and_attached(name, tiny, "checkpointed", order) if wrapped else attach(name, tiny.build())
        model.train()
        inputs = tiny.inputs(model.get_base_model(), *ROWS)
        model(**inputs, use_cache=False).logits.square().mean().backward()
        gradients = {plain_name(key): parameter.grad for key, parameter in model.named_parameters()}
        found[wrapped] = {key: gradient for key, gradient in gradients.items() if gradient is not None}
    assert found[True].keys() == found[False].keys()
    assert len(found[True]) == 30
    for key, gradient in found[False].items():
        assert difference(gradient, found[True][key]) < 1e-6, key


@pytest.mark.parametrize("order", ["wrapped first", "attached first"])
def test_modules_to_save_inside_a_wrapped_layer(tiny: TinyVLM, order: str, tmp_path: Path):
    base = tiny.build()
    if order == "wrapped first":
        checkpoint_layers(base)
    model = METHODS["pvm"].attach(base, modules_to_save=["post_attention_layernorm"])
    if order == "attached first":
        checkpoint_layers(base)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.mul_(1.5)
    inputs = tiny.inputs(tiny.build(), *ROWS)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.build(), tmp_path), inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), logits(tiny.build(), inputs))


def test_a_compiled_model(tiny: TinyVLM, tmp_path: Path):
    """The whole of it, below PEFT and around it."""
    plain = METHODS["pvm"].attach(tiny.build())
    inputs = tiny.inputs(tiny.build(), *ROWS)
    around = torch.compile(METHODS["pvm"].attach(tiny.build()), backend="eager")
    below = METHODS["pvm"].attach(torch.compile(tiny.build(), backend="eager"))
    for name, model in {"around": around, "below": below}.items():
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / name)
        assert torch.equal(logits(loaded, inputs), logits(plain, inputs))


@on_a_cpu
@pytest.mark.parametrize(
    ("family", "name", "what"),
    [("llava", "pvm", "model"), ("qwen3_vl", "pvm", "each layer"), ("llava", "memvr", "each layer")],
)
def test_training_compiled_equals_training(family: str, name: str, what: str):
    """Layers with an adapter, layers without, and layers that hide the image for a while: Dynamo tells them apart."""
    model = METHODS[name].attach(FAMILIES[family].build()).train()
    inputs = FAMILIES[family].inputs(model.get_base_model(), *ROWS)
    hiding = [contextlib.nullcontext, lambda: hidden_image(model)] if name == "pvm" else [contextlib.nullcontext] * 2

    def step(run: nn.Module, block: Callable) -> list[torch.Tensor]:
        with block():
            found = run(**inputs, use_cache=False).logits
        if name == "pvm":
            found.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [found.detach(), *gradients]

    expected = [step(model, block) for block in hiding]
    graphs, backend = counted_graphs()
    if what == "model":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        for layer in find_vlm(model.get_base_model()).layers:
            layer.compile(backend=backend)
    for number in (0, 1, 0):
        for tensor, right in zip(step(compiled, hiding[number]), expected[number], strict=True):
            assert difference(tensor, right) < 1e-6
    assert len(graphs) >= len(find_vlm(model.get_base_model()).layers)


@pytest.mark.usefixtures("alone")
def test_the_state_of_a_distributed_model(tiny: TinyVLM, tmp_path: Path):
    model = METHODS["pvm"].attach(tiny.build())
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    state = DistributedDataParallel(model).state_dict()
    assert all(key.startswith("module.") for key in state)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lost", ["all", "one"])
def test_an_adapter_without_all_its_tensors_is_not_written(tiny: TinyVLM, how: str, lost: str, tmp_path: Path):
    model = tiny.build()
    config = METHODS["pvm"].config(modules_to_save=["lm_head"])
    if how == "PEFT":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    give_weight(model, seed=1)
    state = model.state_dict()
    gone = [key for key in state if ".pvm_" in key][: 1 if lost == "one" else None]
    for key in gone:
        del state[key]
    with pytest.raises(ValueError, match=rf"lacks {len(gone)} of its \d+ tensors.*pvm_.*nothing was written"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(
    not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"), reason="PEFT before 0.21 does not ask the tuner"
)
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPS)
def test_weights_for_an_adapter_that_is_there(tiny: TinyVLM, wrap: str, tmp_path: Path):
    model = METHODS["pvm"].attach(tiny.build())
    model.save_pretrained(tmp_path)
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    give_weight(model, seed=1)
    WRAPS[wrap](model.get_base_model())
    assert difference(logits(model, inputs), expected) > 1e-3
    set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(model, inputs), expected)


def test_weights_are_not_loaded_below_wrappers(tiny: TinyVLM, tmp_path: Path):
    METHODS["pvm"].attach(tiny.build()).save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, lambda model, path: model.load_adapter(path)):
        model = tiny.build()
        checkpoint_layers(model)
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match="Load the adapter first"):
            load(model, tmp_path)
        assert [name for name, _ in model.named_modules()] == names
        assert not hasattr(model, "peft_config")

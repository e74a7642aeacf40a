"""What an adapter is joined to may be replaced or copied behind its back. Then it acts, or it says that it cannot."""

from __future__ import annotations

import copy
from pathlib import Path

import fresh
import pytest
import torch
from architectures import ARCHITECTURES
from forwards import TOLERANCE, difference, logits
from fresh import needs_fork
from methods_under_test import METHODS, PACKAGED, STEERING, Combination, Method, give_weight
from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from stepwise import STEPWISE
from tiny_vlms import FAMILIES
from torch import nn

from peft_pvm import MemVRConfig, PVMConfig
from peft_pvm.tokens.families import find_vlm


class Fused(nn.Module):
    """Stands in for a module, and computes the same without calling it: fused kernels do so."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.twin = copy.deepcopy(module)
        for part in self.twin.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()

    def forward(self, *args, **kwargs):
        return self.twin(*args, **kwargs)


# By family, the modules of a decoder layer that PVM is joined to, beside the end of its FFN, which it follows.
JOINED = {
    "qwen3_vl": ("self_attn", "post_attention_layernorm"),
    "llava_cohere": ("self_attn", "input_layernorm"),  # a parallel block
    "gemma3": ("self_attn", "pre_feedforward_layernorm"),  # sandwich norms
    "qwen3_5": ("linear_attn", "post_attention_layernorm"),
}


@pytest.mark.parametrize(("name", "module"), [(name, module) for name in JOINED for module in JOINED[name]])
def test_pvm_names_the_layer_that_it_no_longer_reaches(name: str, module: str):
    family = FAMILIES[name]
    model = METHODS["pvm"].attach(family.build(), layers_to_transform=[0, 1])
    layer = find_vlm(model.get_base_model()).layers[0]
    setattr(layer, module, Fused(getattr(layer, module)))
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    for _ in range(2):  # nothing of the first forward is taken for the second's
        with pytest.raises(NotImplementedError, match=r"PVM did not act in decoder layers \[0\] of"):
            logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(family.build(), inputs))


@pytest.mark.parametrize("name", JOINED)
def test_pvm_follows_the_end_of_the_ffn(name: str):
    family = FAMILIES[name]
    model = METHODS["pvm"].attach(family.build(), layers_to_transform=[0, 1])
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    expected = logits(model, inputs)
    vlm = find_vlm(model.get_base_model())
    for layer in vlm.layers:
        setattr(layer, vlm.block.ffn_end, Fused(getattr(layer, vlm.block.ffn_end)))
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), logits(family.build(), inputs))


def test_a_replaced_decoder_layer_is_noticed():
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), layers_to_transform=[0, 1])
    layers = find_vlm(model.get_base_model()).text_model.layers
    layers[1] = family.build().model.language_model.layers[1]
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    with pytest.raises(NotImplementedError, match=r"PVM did not act in decoder layers \[1\] of"):
        logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(family.build(), inputs))
    assert torch.equal(logits(model.unload(), inputs), logits(family.build(), inputs))


@pytest.mark.parametrize("method", STEERING)
def test_replaced_attention_is_noticed(method: str):
    family = FAMILIES["qwen3_vl"]
    model = METHODS[method].attach(family.build())
    layer = find_vlm(model.get_base_model()).layers[1]
    layer.self_attn = Fused(layer.self_attn)
    layer.self_attn.twin.config = layer.self_attn.twin.config.config
    with pytest.raises(NotImplementedError, match="or the attention was replaced after the adapter was attached"):
        logits(model, family.inputs(model.get_base_model(), "t4 i t6"))


# By family: LoRA wraps linear layers in the attention and the FFN, which stay where they are. The FFN of OPT is two
# linear layers of the decoder layer itself.
TINY_OPT = ARCHITECTURES["blip-2"].tiny
INSIDE = {
    "llava": (FAMILIES["llava"], ["q_proj", "up_proj", "down_proj"]),
    "opt": (TINY_OPT, ["q_proj", "fc1", "fc2"]),
}


@pytest.mark.parametrize("after_a_forward", [False, True])
@pytest.mark.parametrize("config", [PVMConfig(r=32, layers_to_transform=[0, 1]), MemVRConfig(threshold=0.0)])
@pytest.mark.parametrize("name", INSIDE)
def test_adapters_inside_the_modules_may_come_later(name: str, config: PeftConfig, after_a_forward: bool):
    family, linear_layers = INSIDE[name]
    inputs = family.inputs(family.build(), "t4 i t6")
    lora = LoraConfig(target_modules=rf".*language_model.*\.({'|'.join(linear_layers)})", init_lora_weights=False)

    def attached(*configs: PeftConfig) -> nn.Module:
        model = family.build()
        for number, each in enumerate(configs):
            model = get_peft_model(model, copy.deepcopy(each), f"adapter-{number}").get_base_model().eval()
            if after_a_forward:
                logits(model, inputs)
        give_weight(model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.constant_(parameter, 0.1)
        return model

    later = attached(config, lora)
    with_lora = logits(later, inputs)
    assert torch.equal(with_lora, logits(attached(lora, config), inputs))
    for layer in find_vlm(later).layers:
        for linear in linear_layers:
            path, _, last = next(path for path, _ in layer.named_modules() if path.endswith(linear)).rpartition(".")
            parent = layer.get_submodule(path)
            setattr(parent, last, getattr(parent, last).base_layer)
    alone = logits(later, inputs)
    assert difference(alone, with_lora) > 100 * TOLERANCE
    assert difference(alone, logits(attached(config), inputs)) < TOLERANCE


def test_adapters_in_place_of_the_modules_come_in_any_order():
    """PEFT's LN tuning computes with a copy of each norm."""
    family = FAMILIES["llava"]
    norms = LNTuningConfig(target_modules=["post_attention_layernorm"])
    model = get_peft_model(family.build(), norms, "norms").get_base_model()
    inputs = family.inputs(model, "t4 i t6")
    tuned = logits(model.eval(), inputs)
    expected = logits(METHODS["pvm"].attach(model), inputs)
    assert difference(expected, tuned) > 100 * TOLERANCE

    model = METHODS["pvm"].attach(family.build()).get_base_model()
    get_peft_model(model, norms, "norms")
    assert difference(logits(model.eval(), inputs), expected) <= TOLERANCE


def replicate(model: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel makes of a model for another device, on this one."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, None if buffer is None else buffer.clone())
    return replicas[model]


def test_replicas_are_refused(method: Method | Combination):
    """Their hooks are those of the original, and so compute with its weights, which are on another device."""
    model = method.attach(FAMILIES["llava"].build())
    embeds = model.get_input_embeddings()(torch.arange(10, 22)[None])
    # Without its vision tower, which in transformers 5.24 does not run in replicas.
    inputs = dict(inputs_embeds=embeds, visual_mask=(torch.arange(12) % 8 < 4)[None])
    with pytest.raises(NotImplementedError, match="Use DistributedDataParallel"):
        logits(replicate(model), inputs)
    with model.disable_adapter():
        assert torch.equal(logits(replicate(model), inputs), logits(model, inputs))


def test_pvm_is_joined_to_a_copy_of_a_model():
    """Unlike replicas, deep copies have hooks of their own."""
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(), PVMConfig(r=32)).eval()
    give_weight(model)
    inputs = family.inputs(model.get_base_model(), "t4 i t6")
    expected, twin = logits(model, inputs), copy.deepcopy(model)
    give_weight(model, seed=1)
    assert torch.equal(logits(twin, inputs), expected)
    assert difference(logits(model, inputs), expected) > 100 * TOLERANCE


def answers(model: PeftModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a model computes in a forward and in `generate`, with its adapter and without, and then without any."""

    def computed(model: nn.Module) -> list[torch.Tensor]:
        settings = dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0, output_scores=True)
        generated = model.generate(**inputs, **settings, do_sample=False, return_dict_in_generate=True)
        return [logits(model, inputs), torch.stack(generated.scores).nan_to_num(neginf=-1e4)]

    found = computed(model)
    with model.disable_adapter():
        found += computed(model)
    return found + computed(model.unload())


@needs_fork
def test_a_pickled_model_computes_the_same_elsewhere(tmp_path: Path):
    """With any method, after a forward that failed, in a process that has attached none."""
    family, expected = FAMILIES["qwen3_vl"], {}
    methods = {**METHODS, "sparc": Method(lambda: STEPWISE["sparc"].config)}
    for row in PACKAGED:
        model = methods.get(row.config.method, Method(row.config)).attach(family.build())
        base = model.get_base_model()
        last = base.model.language_model.layers[-1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, family.inputs(base, "t4 i t6"))
        last.remove()
        inputs, file = family.prompt(base, "t4 i t6"), tmp_path / row.config.method
        torch.save((model, inputs), file)
        expected[row.config.method] = answers(model, inputs)
    program = """
import sys, torch
from test_replaced_modules import answers
torch.save({name: answers(*torch.load(f"{sys.argv[1]}/{name}", weights_only=False)) for name in sys.argv[2:]},
           f"{sys.argv[1]}/found")
"""
    fresh.run(program, tmp_path, *expected)
    found = torch.load(tmp_path / "found")
    assert {name for name in expected if not all(map(torch.equal, found[name], expected[name]))} == set()
    for name, (on, scores, off, scores_off, gone, scores_gone) in found.items():
        assert difference(on, off) > 1e-3 or difference(scores, scores_off) > 1e-3, name
        assert torch.equal(off, gone), name
        assert torch.equal(scores_off, scores_gone), name

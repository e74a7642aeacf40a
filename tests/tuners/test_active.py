"""`attached`: adapters for the length of a block, leaving no trace."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from forwards import difference, logits
from methods_under_test import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig, attached
from peft_pvm.attention.dispatch import ConfigView


ROWS = ("t4 i t3 i t6", "t7 i t5")
ALL = (DIPEConfig(), TDRSConfig(), PVMConfig(r=32, init_weights=False))


def state(model: torch.nn.Module) -> dict:
    """Everything an adapter could leave behind."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in base.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()],
        "configs": [(type(m.config), id(_config_of(m))) for m in base.modules() if hasattr(m, "config")],
        "trainable": [parameter.requires_grad for parameter in base.parameters()],
        "adapters": sorted(getattr(base, "peft_config", {})),
        "active": [list(m.active_adapters) for m in base.modules() if hasattr(m, "_active_adapter")],
    }


def _config_of(module: torch.nn.Module):
    """The config itself, also where an adapter has put a view in front of it."""
    return module.config.config if isinstance(module.config, ConfigView) else module.config


def test_on_a_plain_model(family):
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    base, before = logits(model, inputs), state(model)
    with attached(model, *ALL) as same:
        assert same is model
        on = logits(model, inputs)
        assert difference(on, base) > 1e-3
        model.generate(**family.prompt(model, ROWS[0]), max_new_tokens=2)
    assert state(model) == before
    assert torch.equal(logits(model, inputs), base)
    with attached(model):
        assert state(model) == before


@pytest.mark.parametrize("method", ["pvm", "dipe", "tdrs-inter"])
def test_beside_an_adapter_of_the_same_and_of_other_types(method: str):
    family = FAMILIES["qwen3_vl"]
    model = METHODS[method].attach(family.build())
    model.add_adapter("other", METHODS[method].config(layers_to_transform=[0]))
    model.set_adapter("default")
    inputs = family.inputs(model.get_base_model(), *ROWS)
    alone, before = logits(model, inputs), state(model)
    configs = [config for config in ALL if not (method == "tdrs-inter" and isinstance(config, TDRSConfig))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attached(model, *configs):
            assert difference(logits(model, inputs), alone) > 1e-3
            with attached(model, DIPEConfig(layers_to_transform=1)):
                logits(model, inputs)
    assert state(model) == before
    assert torch.equal(logits(model, inputs), alone)


@pytest.mark.parametrize("through", ["PeftModel", "transformers"])
def test_beside_disabled_adapters(through: str):
    """The model's own stay off, those of the block act, of whatever type."""
    family = FAMILIES["llava"]
    plain = family.build()
    inputs = family.inputs(plain, *ROWS)
    with attached(plain, DIPEConfig()):
        expected = logits(plain, inputs)
    model = METHODS["dipe"].attach(family.build(), layers_to_transform=[0])
    base = model.get_base_model()
    base._hf_peft_config_loaded = True
    off = model.disable_adapter() if through == "PeftModel" else contextlib.nullcontext()
    with off:
        if through == "transformers":
            base.disable_adapters()
        logits(base, inputs)  # transformers puts hooks of its own on in the first forward
        before = state(model)
        with attached(model, DIPEConfig()):
            assert torch.equal(logits(base, inputs), expected)
        assert state(model) == before
        assert torch.equal(logits(base, inputs), logits(plain, inputs))


def test_what_is_trainable_stays():
    family = FAMILIES["llava"]
    model = family.build()
    with attached(model, DIPEConfig(), PVMConfig(r=32)):
        assert all(parameter.requires_grad for parameter in model.parameters())
    frozen = METHODS["pvm"].attach(model)
    frozen.requires_grad_(False)
    with attached(frozen, TDRSConfig()):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_lora_added_inside_stays():
    family = FAMILIES["llava"]
    model = family.build()
    with attached(model, DIPEConfig()):
        lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "lora")
    assert list(model.peft_config) == ["lora"]
    assert lora.peft_config["lora"].peft_type == "LORA"


def test_after_an_exception():
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    base, before = logits(model, inputs), state(model)
    with pytest.raises(KeyError, match="mine"), attached(model, *ALL):
        raise KeyError("mine")
    assert state(model) == before
    with (
        pytest.raises(ValueError, match=r"names layers \[7\]"),
        attached(model, *ALL, DIPEConfig(layers_to_transform=7)),
    ):
        pass
    assert state(model) == before
    assert torch.equal(logits(model, inputs), base)


def test_others_are_refused(tmp_path):
    family = FAMILIES["llava"]
    model = family.build()
    with pytest.raises(TypeError, match="not LoraConfig"), attached(model, LoraConfig()):
        pass
    METHODS["pvm"].attach(family.build()).save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="starts adapters afresh"),
        attached(model, PVMConfig.from_pretrained(tmp_path)),
    ):
        pass
    METHODS["dipe"].attach(family.build()).save_pretrained(tmp_path)
    with attached(model, DIPEConfig.from_pretrained(tmp_path)):
        pass

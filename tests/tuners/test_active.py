"""Which adapters act, and others for the length of a block: `only`, `restored` and `attached` leave no trace."""

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
from peft_pvm.tuners.active import acting_adapters, activate, base_of, only, restored
from peft_pvm.tuners.layers import VisualTunerLayer
from peft_pvm.utils.packages import adapter_layers


ROWS = ("t4 i t3 i t6", "t7 i t5")
ALL = (DIPEConfig(max_distance=0), TDRSConfig(), PVMConfig(r=32, init_weights=False))


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


# ---- of adapters that are there


NAMES = ["lora", "pvm", "dipe", "tdrs"]


@pytest.fixture
def model() -> torch.nn.Module:
    """A base with an adapter of each type, one of which is saved along with a module; all act, PVM is trainable."""
    base = FAMILIES["llava"].build()
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, config in zip(
            NAMES, (lora, PVMConfig(r=32, init_weights=False), DIPEConfig(max_distance=0), TDRSConfig())
        ):
            get_peft_model(base, config, name)
    activate(base, NAMES, trainable=False)
    for name, parameter in base.named_parameters():
        parameter.requires_grad = "pvm_gate" in name or "embed_tokens" in name
    return base.eval()


def what_acts(model: torch.nn.Module) -> list[tuple[list[str], bool]]:
    return [(list(layer.active_adapters), layer.disable_adapters) for layer in adapter_layers(model)]


def trainable(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_base_of():
    base = FAMILIES["llava"].build()
    assert base_of(base) is base
    wrapped = METHODS["pvm"].attach(base)
    assert base_of(wrapped) is base
    assert base_of(PeftModel(wrapped, LoraConfig(target_modules=["q_proj"]), "lora")) is base


def test_acting_adapters(model: torch.nn.Module):
    assert acting_adapters(FAMILIES["llava"].build()) == []
    assert acting_adapters(model) == NAMES
    activate(model, ["tdrs", "lora"])
    assert acting_adapters(model) == ["lora", "tdrs"], "in the order in which they were attached"
    for layer in adapter_layers(model):
        if not isinstance(layer, VisualTunerLayer):
            layer.enable_adapters(False)
    assert acting_adapters(model) == ["tdrs"]
    activate(model, [])
    assert acting_adapters(model) == []


@pytest.mark.parametrize("trains", [False, True])
def test_activate(model: torch.nn.Module, trains: bool):
    """Also what was disabled; and no others."""
    for layer in adapter_layers(model):
        layer.enable_adapters(False)
    activate(model, ["pvm", "dipe"], trainable=trains)
    assert acting_adapters(model) == ["pvm", "dipe"]
    learns = {name for name in trainable(model) if "pvm_" in name or "lora_" in name}
    assert learns == {name for name, _ in model.named_parameters() if "pvm_" in name and trains}


def disable_all(model: torch.nn.Module) -> None:
    for layer in adapter_layers(model):
        layer.enable_adapters(False)


CHANGES = {
    "other adapters": lambda model: activate(model, ["lora"]),
    "none": lambda model: activate(model, []),
    "disabled": disable_all,
    "disabled and others": lambda model: (activate(model, ["dipe", "pvm"], trainable=False), disable_all(model)),
    "all trainable": lambda model: model.requires_grad_(True),
    "frozen": lambda model: model.requires_grad_(False),
}


UNCHANGED = {("disabled", "disabled"), ("none", "none")}


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("beforehand", ["all", "disabled", "none"])
@pytest.mark.parametrize("change", CHANGES)
def test_restored(model: torch.nn.Module, change: str, beforehand: str, error: type[BaseException] | None):
    """Whatever the block does, and however it ends."""
    with torch.no_grad():
        if beforehand == "disabled":
            disable_all(model)
        elif beforehand == "none":
            learns = trainable(model)
            activate(model, [])
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name in learns
    acts, learns = what_acts(model), trainable(model)
    assert learns
    with contextlib.nullcontext() if error is None else pytest.raises(error), restored(model) as acting:
        assert list(acting) == adapter_layers(model)
        assert list(acting.values()) == [[] if disabled else active for active, disabled in acts]
        CHANGES[change](model)
        assert (what_acts(model), trainable(model)) != (acts, learns) or (change, beforehand) in UNCHANGED
        if error is not None:
            raise error
    assert what_acts(model) == acts
    assert trainable(model) == learns


def test_restored_leaves_what_the_block_brings(model: torch.nn.Module):
    acts = what_acts(model)
    with restored(model):
        activate(model, [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            get_peft_model(model, LoraConfig(target_modules=["v_proj"]), "new")
    assert acting_adapters(model) == [*NAMES, "new"]
    assert [state for state in what_acts(model) if state[0] != ["new"]] == acts
    assert any("lora_A.new" in name for name in trainable(model))


@pytest.mark.parametrize("names", [[], ["pvm"], ["dipe", "lora"], NAMES, ["unknown"], ["unknown", "tdrs"]], ids=str)
def test_only_some_go_on_acting(model: torch.nn.Module, names: list[str]):
    """As if the others were not there."""
    inputs = FAMILIES["llava"].inputs(model, *ROWS)
    acts, learns, all_act = what_acts(model), trainable(model), logits(model, inputs)
    with restored(model):
        activate(model, names)
        if not set(names) & set(NAMES):
            disable_all(model)
        expected = logits(model, inputs)
    with only(model, names):
        assert acting_adapters(model) == [name for name in NAMES if name in names]
        assert torch.equal(logits(model, inputs), expected)
    assert (what_acts(model), trainable(model)) == (acts, learns)
    assert torch.equal(logits(model, inputs), all_act)
    if names != NAMES:
        assert difference(expected, all_act) > 1e-4


def test_only_chooses_among_the_adapters_of_a_layer():
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), "one")
    model.add_adapter("two", PVMConfig(r=32, init_weights=False))
    inputs = family.inputs(model.get_base_model(), *ROWS)
    model.set_adapter("two")
    expected = logits(model.eval(), inputs)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, inputs)
    with only(model.get_base_model(), ["two"]):
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), both)
    assert difference(both, expected) > 1e-3


def test_only_begins_nothing(model: torch.nn.Module):
    activate(model, ["pvm"])
    for layer in adapter_layers(model):
        if isinstance(layer, VisualTunerLayer) and "dipe" in layer.configs:
            layer.set_adapter(["dipe"])
            layer.enable_adapters(False)
    before = what_acts(model)
    for names in (NAMES, ["dipe"], ["tdrs", "pvm"]):
        with only(model, names):
            assert acting_adapters(model) == [name for name in ("pvm",) if name in names]
        assert what_acts(model) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_only_ends_with_an_exception(model: torch.nn.Module, error: type[BaseException]):
    before = what_acts(model), trainable(model)
    acted = []
    with pytest.raises(error), only(model, ["lora", "dipe"]), only(model, ["dipe", "pvm"]):
        raise error(acted.append(acting_adapters(model)))
    assert acted == [["dipe"]]
    assert (what_acts(model), trainable(model)) == before


# ---- of adapters for a block


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
            with attached(model, DIPEConfig(max_distance=0, layers_to_transform=1)):
                logits(model, inputs)
    assert state(model) == before
    assert torch.equal(logits(model, inputs), alone)


@pytest.mark.parametrize("through", ["PeftModel", "transformers"])
def test_beside_disabled_adapters(through: str):
    """The model's own stay off, those of the block act, of whatever type."""
    family = FAMILIES["llava"]
    plain = family.build()
    inputs = family.inputs(plain, *ROWS)
    with attached(plain, DIPEConfig(max_distance=0)):
        expected = logits(plain, inputs)
    model = METHODS["dipe"].attach(family.build(), layers_to_transform=[0])
    base = model.get_base_model()
    logits(base, inputs)  # what is checked in the first forward is done
    base._hf_peft_config_loaded = True
    off = model.disable_adapter() if through == "PeftModel" else contextlib.nullcontext()
    with off:
        if through == "transformers":
            base.disable_adapters()
        logits(base, inputs)  # transformers puts hooks of its own on in the first forward
        before = state(model)
        with attached(model, DIPEConfig(max_distance=0)):
            assert torch.equal(logits(base, inputs), expected)
        assert state(model) == before
        assert torch.equal(logits(base, inputs), logits(plain, inputs))


def test_what_is_trainable_stays():
    family = FAMILIES["llava"]
    model = family.build()
    with attached(model, DIPEConfig(max_distance=0), PVMConfig(r=32)):
        assert all(parameter.requires_grad for parameter in model.parameters())
    frozen = METHODS["pvm"].attach(model)
    frozen.requires_grad_(False)
    with attached(frozen, TDRSConfig()):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_lora_added_inside_stays():
    family = FAMILIES["llava"]
    model = family.build()
    with attached(model, DIPEConfig(max_distance=0)):
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

"""What the tuners share: hooks that are put on once, one search of the model, names, and taking off again."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from forwards import GENERATE, difference, logits
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from tiny_vlms import FAMILIES, TinyVLM
from torch import nn
from transformers import PreTrainedModel

import peft_pvm.tuners.base as base_module
from peft_pvm import DIPEConfig, PVMConfig, SAVAAConfig, TDRSConfig, VCDConfig, VISTAConfig
from peft_pvm.attention.dispatch import ConfigView
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tokens.tap import Tap
from peft_pvm.tuners.layers import VisualTunerLayer


ROWS = ("t4 i t3 i t6", "t7 i t5")
CONFIGS = {
    "pvm": lambda **fields: PVMConfig(**{"r": 32, "init_weights": False, "layers_to_transform": [0, 1, 2], **fields}),
    "dipe": partial(DIPEConfig, max_distance=0),
    "tdrs": TDRSConfig,
}


@pytest.fixture
def llava() -> TinyVLM:
    return FAMILIES["llava"]


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


def hooks_of(model: nn.Module) -> dict[str, tuple[int, int, str]]:
    """By module of the base, how many hooks it has, and of what type its config is: what a layer joins itself to."""
    ours = {inner for layer in layers_of(model) for inner in layer.modules()}
    return {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), type(getattr(m, "config", None)).__name__)
        for name, m in model.named_modules()
        if m not in ours
    }


def layers_of(model: nn.Module) -> list[VisualTunerLayer]:
    return [module for module in model.modules() if isinstance(module, VisualTunerLayer)]


def own_config(module: nn.Module) -> object:
    """A module's config, also where an adapter has put a view in front of it."""
    return module.config.config if isinstance(module.config, ConfigView) else module.config


def as_it_is(model: PreTrainedModel) -> dict:
    """The very modules, parameters, hooks and attributes of a model without adapters."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "configs": {name: id(own_config(m)) for name, m in model.named_modules() if hasattr(m, "config")},
        "hooks": hooks_of(model),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


# ---- hooks


def test_hooks_are_put_on_once(llava: TinyVLM, kind: str):
    model = llava.build()
    with Tap.lent_to(find_vlm(model)):
        tap_alone = hooks_of(model)
    get_peft_model(model, CONFIGS[kind]())
    layers, on = layers_of(model), hooks_of(model)
    assert on != tap_alone
    for layer in layers:
        layer.attach_hooks()
    assert hooks_of(model) == on
    for _ in range(2):
        for layer in layers:
            layer.detach_hooks()
        assert hooks_of(model) == tap_alone
    for layer in layers:
        layer.attach_hooks()
    assert hooks_of(model) == on


def test_a_second_adapter_brings_no_more_hooks(llava: TinyVLM, kind: str):
    model = get_peft_model(llava.build(), CONFIGS[kind](), "one")
    inputs = llava.inputs(model.get_base_model(), *ROWS)
    expected = logits(model.eval(), inputs)  # transformers puts hooks of its own on in the first forward
    on = hooks_of(model)
    for name in ("two", "three"):
        model.add_adapter(name, CONFIGS[kind]())
        assert hooks_of(model) == on
    assert torch.equal(logits(model.eval(), inputs), expected)
    for name in ("two", "three"):
        model.delete_adapter(name)
    assert hooks_of(model) == on
    assert torch.equal(logits(model, inputs), expected)


def test_the_tap_comes_first_and_goes_last(llava: TinyVLM):
    """Hooks run in the order in which they were put on, and those of adapters read what it notes."""
    model = llava.build()
    text_model = model.model.language_model
    tuners = [get_peft_model(model, CONFIGS[kind](), kind).base_model for kind in CONFIGS]
    tap = text_model.__dict__["_visual_tap"]
    first = next(iter(text_model._forward_pre_hooks.values()))
    assert first.__self__ is tap
    for tuner in tuners:
        assert text_model.__dict__.get("_visual_tap") is tap
        tuner.unload()
    assert "_visual_tap" not in text_model.__dict__
    assert not text_model._forward_pre_hooks


# ---- the model is searched once


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose parts a tuner has looked for."""
    found: list[nn.Module] = []
    search = base_module.find_vlm

    def find_vlm(model: nn.Module):
        found.append(model)
        return search(model)

    monkeypatch.setattr(base_module, "find_vlm", find_vlm)
    return found


def test_a_model_is_searched_once_for_an_adapter(llava: TinyVLM, kind: str, searched: list[nn.Module]):
    """However many layers it gets. `find_vlm` walks over all modules, of which a large model has thousands."""
    base = llava.build()
    model = get_peft_model(base, CONFIGS[kind](), "one")
    assert searched == [base]
    assert len(layers_of(model)) == (3 if kind == "pvm" else 1)
    assert {id(layer.vlm) for layer in layers_of(model)} == {id(model.base_model.vlm)}
    model.add_adapter("two", CONFIGS[kind]())
    assert searched == [base] * 2
    logits(model, llava.inputs(base, "t4 i t3"))
    model.set_adapter("two")
    model.delete_adapter("one")
    model.unload()
    assert searched == [base] * 2


# ---- names


@pytest.mark.parametrize("first", CONFIGS)
def test_a_taken_name_is_refused_and_changes_nothing(llava: TinyVLM, first: str, kind: str):
    """By whatever way the second comes, and of whatever type the first is."""
    model = get_peft_model(llava.build(), CONFIGS[first](), "mine").eval()
    base = model.get_base_model()
    inputs = llava.inputs(base, *ROWS)
    expected, before, configs = logits(model, inputs), as_it_is(base), dict(base.peft_config)
    config = CONFIGS[kind]()
    ways = [lambda: get_peft_model(base, config, "mine")]
    if kind == first:
        ways.append(lambda: model.base_model.inject_adapter(base, "mine"))
    for attach in ways:
        with pytest.raises(ValueError, match="An adapter 'mine' is already attached to this model"):
            attach()
        assert as_it_is(base) == before
        assert base.peft_config == configs
        assert torch.equal(logits(model, inputs), expected)


def test_the_config_of_a_taken_name_stays(llava: TinyVLM, kind: str):
    """PEFT writes the new one into its table before it asks."""
    tuner = get_peft_model(llava.build(), CONFIGS[kind](), "mine").base_model
    config = tuner.peft_config["mine"]
    tuner.peft_config["mine"] = CONFIGS[kind](layers_to_transform=[1])
    with pytest.raises(ValueError, match="An adapter 'mine' is already attached to this model"):
        tuner.inject_adapter(tuner.model, "mine")
    assert tuner.peft_config["mine"] is config


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_half_an_adapter_is_taken_off_again(
    llava: TinyVLM, kind: str, beside: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    """Whatever goes wrong after some layers have theirs; and then it can be attached."""
    base = llava.build()
    if beside:
        get_peft_model(base, CONFIGS[kind](), "mine")
    before, configs = as_it_is(base), list(getattr(base, "peft_config", {}))
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[kind.upper()]
    create, created = tuner_cls._create_and_replace, []

    def fail_at_the_last(self, *args, **kwargs):
        create(self, *args, **kwargs)
        created.append(1)
        if len(created) == (3 if kind == "pvm" else 1):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(tuner_cls, "_create_and_replace", fail_at_the_last)
        with pytest.raises(error):
            inject_adapter_in_model(CONFIGS[kind](), base, "other")
    assert as_it_is(base) == before
    assert list(getattr(base, "peft_config", {})) == configs
    inject_adapter_in_model(CONFIGS[kind](), base, "other")
    assert list(base.peft_config) == [*configs, "other"]


def test_an_adapter_that_does_not_fit_leaves_the_others(llava: TinyVLM, kind: str):
    model = get_peft_model(llava.build(), CONFIGS[kind](), "mine").eval()
    base = model.get_base_model()
    inputs = llava.inputs(base, *ROWS)
    expected, before = logits(model, inputs), as_it_is(base)
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter("other", CONFIGS[kind](layers_to_transform=[99]))
    assert as_it_is(base) == before
    assert list(base.peft_config) == ["mine"]
    assert torch.equal(logits(model.eval(), inputs), expected)


# ---- taking off


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_unload_gives_the_very_modules(name: str, kind: str):
    family = FAMILIES[name]
    base = family.build()
    inputs = family.inputs(base, *ROWS)
    expected, before = logits(base, inputs), as_it_is(base)
    model = get_peft_model(base, CONFIGS[kind](), "one")
    model.add_adapter("two", CONFIGS[kind](layers_to_transform=[1]))
    assert difference(logits(model.eval(), inputs), expected) > 1e-4
    unloaded = model.unload()
    assert unloaded is base
    assert as_it_is(base) == before
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base, inputs), expected)


def test_unload_gives_back_what_modules_to_save_wrapped(llava: TinyVLM):
    base = llava.build()
    before = as_it_is(base)
    get_peft_model(base, PVMConfig(r=32, modules_to_save=["lm_head"])).unload()
    assert as_it_is(base) == before


def test_unload_leaves_the_adapters_of_others(llava: TinyVLM, kind: str):
    base = llava.build()
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(base, lora, "lora")
    before = as_it_is(base)
    model = get_peft_model(base, CONFIGS[kind](), "mine")
    model.unload()
    after = as_it_is(base)
    assert {**after, "attributes": None} == {**before, "attributes": None}
    assert list(base.peft_config) == ["lora"]


# ---- methods that the user has put on one model


# Between them, these set aside every method that adapters do.
SET_ASIDE = {"vcd": VCDConfig, "vista": VISTAConfig, "savaa": SAVAAConfig}
BY_GENERATE = ("generate", "_validate_model_kwargs", "_get_logits_processor")
OTHERS = ("init_continuous_batching", "_get_candidate_generator")


def patched(model: PreTrainedModel) -> tuple[dict[str, Callable], list[str]]:
    """Have a model note which of its methods are called. Returns what stands in their place, and the notes."""
    asked: list[str] = []

    def noting(name: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def mine(*args, **kwargs):
            asked.append(name)
            return method(*args, **kwargs)

        return mine

    mine = {name: noting(name, getattr(model, name)) for name in (*BY_GENERATE, *OTHERS)}
    vars(model).update(mine)
    return mine, asked


def answer(tiny: TinyVLM, model: nn.Module) -> torch.Tensor:
    prompt = tiny.prompt(getattr(model, "get_base_model", lambda: model)(), ROWS[0])
    return torch.stack(model.generate(**prompt, **GENERATE, do_sample=False).logits)


@pytest.mark.parametrize("method", SET_ASIDE)
def test_what_a_model_has_of_its_own_is_called_and_given_back(llava: TinyVLM, method: str):
    base = llava.build()
    mine, asked = patched(base)
    expected = answer(llava, base)
    of_base = asked.copy()
    model = get_peft_model(base, SET_ASIDE[method]()).eval()
    asked.clear()
    answer(llava, model)
    assert asked.count("generate") == 1
    assert set(BY_GENERATE) <= set(asked)
    asked.clear()
    with model.disable_adapter():
        assert torch.equal(answer(llava, model), expected)
        assert asked == of_base
    assert model.unload() is base
    assert {name: vars(base).get(name) for name in mine} == mine
    assert torch.equal(answer(llava, base), expected)
    with get_peft_model(base, SET_ASIDE[method]()).disable_adapter():
        for name in OTHERS:
            with contextlib.suppress(Exception):  # of arguments that lack
                getattr(base, name)()
    assert set(OTHERS) <= set(asked)


@pytest.mark.parametrize("method", SET_ASIDE)
def test_what_a_model_is_given_while_it_has_an_adapter_stays(llava: TinyVLM, method: str):
    base = llava.build()
    expected = answer(llava, base)
    model = get_peft_model(base, SET_ASIDE[method]()).eval()
    acting = answer(llava, model)
    mine, asked = patched(base)
    assert torch.equal(answer(llava, model), acting)
    assert asked.count("generate") == 1
    assert model.unload() is base
    assert {name: vars(base).get(name) for name in mine} == mine
    assert torch.equal(answer(llava, base), expected)
    assert asked.count("generate") == 2
    model = get_peft_model(base, SET_ASIDE[method]()).eval()
    assert torch.equal(answer(llava, model), acting)
    assert asked.count("generate") == 3
    model.unload()
    assert {name: vars(base).get(name) for name in mine} == mine


@pytest.mark.parametrize("method", SET_ASIDE)
def test_what_was_taken_away_is_not_missed(llava: TinyVLM, method: str):
    """Whoever patches a method for a while may take it back by `del`, and with it what stood there before."""
    base = llava.build()
    before = as_it_is(base)
    model = get_peft_model(base, SET_ASIDE[method]())
    mine, _ = patched(base)
    for name in mine:
        delattr(base, name)
    assert model.unload() is base
    assert as_it_is(base) == before
    assert "peft_config" not in vars(base)


@pytest.mark.parametrize("method", SET_ASIDE)
def test_a_copy_gives_back_its_own(llava: TinyVLM, method: str):
    base = llava.build()
    before = {name: sorted(vars(module)) for name, module in base.named_modules()}
    copied = copy.deepcopy(get_peft_model(base, SET_ASIDE[method]())).unload()
    assert {name: sorted(vars(module)) for name, module in copied.named_modules()} == before


def test_remove_adapter_takes_the_layers_that_hold_no_other(llava: TinyVLM):
    base = llava.build()
    before = as_it_is(base)
    tuner = get_peft_model(base, CONFIGS["pvm"](layers_to_transform=[0, 1]), "one").base_model
    tuner.peft_config["two"] = CONFIGS["pvm"](layers_to_transform=[1, 2])
    tuner.inject_adapter(base, "two")

    def held() -> list[list[str]]:
        return [sorted(layer.pvm.configs) if hasattr(layer, "pvm") else [] for layer in tuner.vlm.layers]

    assert held() == [["one"], ["one", "two"], ["two"]]
    tuner.remove_adapter("one")
    assert held() == [[], ["two"], ["two"]]
    assert list(tuner.peft_config) == ["two"]
    tuner.remove_adapter("nobody")
    assert held() == [[], ["two"], ["two"]]
    tuner.remove_adapter("two")
    assert held() == [[], [], []]
    assert {**as_it_is(base), "attributes": None} == {**before, "attributes": None}


def test_remove_adapter_chooses_no_successor(llava: TinyVLM, recwarn: pytest.WarningsRecorder):
    model = get_peft_model(llava.build(), CONFIGS["pvm"](), "one")
    model.add_adapter("two", CONFIGS["pvm"]())
    model.base_model.set_adapter(["two"])
    model.base_model.remove_adapter("two")
    assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {()}
    assert [str(warning.message) for warning in recwarn if "active" in str(warning.message)] == []


# ---- a layer


def test_which_adapters_act(llava: TinyVLM, kind: str):
    model = get_peft_model(llava.build(), CONFIGS[kind](), "one")
    model.add_adapter("two", CONFIGS[kind]())
    (layer, *_) = layers_of(model)
    assert layer.acting() == ["one"]
    assert layer.acting(["two", "unknown", "one", "two"]) == ["two", "one"], "each once, in the order of the names"
    model.base_model.set_adapter(["two", "one"])
    assert layer.acting() == ["two", "one"]
    with model.disable_adapter():
        assert layer.acting() == layer.acting(["two"]) == []


def test_a_layer_wraps_nothing_and_merges_into_nothing(llava: TinyVLM, kind: str):
    model = get_peft_model(llava.build(), CONFIGS[kind]())
    (layer, *_) = layers_of(model)
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="is beside the base's modules and wraps none"):
        layer.get_base_layer()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer.merge()  # as PEFT does when adapters of another type are merged
    layer.unmerge()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="no weight of the base model can express"):
            merge()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

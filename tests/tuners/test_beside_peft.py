"""Adapters of this package beside PEFT's own on one model: what is done to one leaves the others, and the base."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forwards import TOLERANCE, difference, logits, static_caches_crop
from methods_under_test import METHODS, give_weight
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from tiny_vlms import FAMILIES
from transformers import DynamicCache, StaticCache

from peft_pvm import DIPEConfig, M3IDConfig, PVMConfig, add_adapters, attached, load_adapters, save_adapter
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tuners.active import acting_adapters, activate
from peft_pvm.utils.packages import ASKS_TUNER_FOR_NAMES, CACHE


LLAVA = FAMILIES["llava"]
BESIDE: dict[str, PeftConfig] = {
    **{name: METHODS[name].config() for name in ("pvm", "dipe", "memvr")},
    "m3id": M3IDConfig(),
}


def lora(**fields) -> LoraConfig:
    fields = {"target_modules": ["q_proj", "v_proj"], **fields}
    return LoraConfig(r=4, init_lora_weights=False, **fields)


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return LLAVA.inputs(model, "t4 i t6")


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return sorted(tensors.keys())


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in now)


@pytest.mark.parametrize("other", ["another PVM", "a LoRA"])
@pytest.mark.parametrize(("name", "named_pvm"), [("own", "pvm"), ("pvm", "own"), ("own", "pvm_gate")])
def test_names_that_are_parts_of_names_lose_nothing(tmp_path: Path, other: str, name: str, named_pvm: str):
    """PEFT takes a tensor for another adapter's if that one's name is a part of its key. All of PVM's have "pvm"."""
    model = LLAVA.build()
    add_adapters(model, {name: PVMConfig(r=32), named_pvm: PVMConfig(r=16) if "PVM" in other else lora()})
    give_weight(model)
    expected = logits(model, inputs_of(model))
    for each in (name, named_pvm):
        save_adapter(model, each, tmp_path / each)
    assert len(keys(tmp_path / name)) == 30
    if ASKS_TUNER_FOR_NAMES:
        assert len(get_peft_model_state_dict(model, adapter_name=name)) == 30
    for order in ((name, named_pvm), (named_pvm, name)):
        again = LLAVA.build()
        load_adapters(again, [str(tmp_path / each) for each in order])
        assert difference(logits(again, inputs_of(again)), expected) <= TOLERANCE


def test_an_adapter_of_a_peft_model_is_saved_like_that_of_its_base(tmp_path: Path):
    model = get_peft_model(LLAVA.build(), PVMConfig(r=32))
    give_weight(model)
    for number, holder in enumerate((model, model.get_base_model())):
        save_adapter(holder, "default", tmp_path / str(number))
    assert keys(tmp_path / "0") == keys(tmp_path / "1")
    again = LLAVA.build()
    load_adapters(again, [str(tmp_path / "0")])
    assert torch.equal(logits(again, inputs_of(again)), logits(model, inputs_of(again)))


REFUSED: dict[str, dict] = {
    "a LoRA before": {"lora": lora(), "pvm": PVMConfig(r=7)},
    "a head trained along": {"pvm": PVMConfig(r=32, modules_to_save=["lm_head"]), "bad": PVMConfig(r=7)},
    "one head trained along by two": {
        "pvm": PVMConfig(r=32, modules_to_save=["lm_head"]),
        "other": PVMConfig(r=32, modules_to_save=["lm_head"]),
    },
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("beside", [None, "dipe"])
def test_what_is_refused_leaves_the_model_as_it_was(case: str, beside: str | None):
    model = LLAVA.build()
    if beside is not None:
        add_adapters(model, {beside: METHODS[beside].config()})
    state, modules = state_of(model), list(model.modules())
    expected = logits(model, inputs_of(model))
    with pytest.raises(ValueError, match=r"PVMConfig\.r is 7|Attempted to set multiple"):
        add_adapters(model, REFUSED[case])
    assert list(model.modules()) == modules
    assert same(model, state)
    assert torch.equal(logits(model, inputs_of(model)), expected)


def test_a_refused_file_takes_back_the_biases_of_another(tmp_path: Path):
    """LoRA can train the base's own biases, which loading overwrites."""
    trained = FAMILIES["qwen2_5_vl"].build()
    add_adapters(trained, {"lora": lora(bias="all")})
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(1)
    save_adapter(trained, "lora", tmp_path / "lora")
    model = FAMILIES["qwen2_5_vl"].build()
    state = state_of(model)
    with pytest.raises(ValueError, match="nowhere"):
        load_adapters(model, [str(tmp_path / "lora"), str(tmp_path / "nowhere")])
    assert same(model, state)


def test_attached_leaves_no_wrapper():
    model = LLAVA.build()
    state, modules = state_of(model), list(model.modules())
    with attached(model, PVMConfig(r=32, modules_to_save=["lm_head"])):
        pass
    assert list(model.modules()) == modules
    assert same(model, state)


@pytest.mark.parametrize("ours", BESIDE)
@pytest.mark.parametrize("ours_first", [True, False])
def test_tokens_that_a_lora_trains_are_its_own(tmp_path: Path, ours: str, ours_first: bool):
    """Saved and loaded in any order, beside each other."""
    configs = {"ours": copy.copy(BESIDE[ours]), "lora": lora(trainable_token_indices=[5, 6])}
    names = list(configs) if ours_first else list(configs)[::-1]
    model = LLAVA.build()
    add_adapters(model, {name: configs[name] for name in names})
    give_weight(model)
    expected = logits(model, inputs_of(model))
    for name in names:
        save_adapter(model, name, tmp_path / name)
    again = LLAVA.build()
    load_adapters(again, [str(tmp_path / name) for name in names])
    assert difference(logits(again, inputs_of(again)), expected) <= TOLERANCE


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("ours", BESIDE)
@pytest.mark.parametrize("ours_first", [True, False])
def test_unloading_a_lora_leaves_ours(tmp_path: Path, way: str, ours: str, ours_first: bool):
    model = LLAVA.build()
    steps: dict[str, Callable] = {
        "ours": lambda: get_peft_model(model, copy.copy(BESIDE[ours]), "ours"),
        "lora": lambda: get_peft_model(model, lora(), "lora"),
    }
    wrapped = {name: steps[name]() for name in (list(steps) if ours_first else list(steps)[::-1])}
    give_weight(model)
    model.eval()
    expected = logits(model, inputs_of(model))
    getattr(wrapped["lora"], way)()
    assert list(model.peft_config) == acting_adapters(model) == ["ours"]
    found = logits(model, inputs_of(model))
    if way == "merge_and_unload":
        assert difference(found, expected) <= 10 * TOLERANCE
    else:
        alone = LLAVA.build()
        add_adapters(alone, {"ours": copy.copy(BESIDE[ours])})
        give_weight(alone)
        assert difference(found, logits(alone, inputs_of(alone))) <= TOLERANCE
    wrapped["ours"].save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_unloading_a_lora_leaves_what_pvm_trains_along(tmp_path: Path, way: str):
    """The head that PVM has trained acts on, and is not taken for the base's."""
    model = LLAVA.build()
    head = model.lm_head
    pvm = get_peft_model(model, PVMConfig(r=32, modules_to_save=["lm_head"]), "pvm")
    give_weight(pvm)
    with torch.no_grad():
        model.lm_head.modules_to_save["pvm"].weight.add_(1)
    weight, alone = head.weight.clone(), logits(model.eval(), inputs_of(model))
    both = get_peft_model(model, lora(), "lora").eval()
    activate(model, ["pvm", "lora"])
    expected = logits(model, inputs_of(model)) if way == "merge_and_unload" else alone
    getattr(both, way)()
    assert difference(logits(model, inputs_of(model)), expected) <= 10 * TOLERANCE
    pvm.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in keys(tmp_path / "pvm")
    pvm.unload()
    assert model.lm_head is head
    assert torch.equal(head.weight, weight)


def test_a_module_that_both_train_along_is_not_unloaded():
    model = LLAVA.build()
    get_peft_model(model, PVMConfig(r=32, modules_to_save=["lm_head"]), "pvm")
    both = get_peft_model(model, lora(modules_to_save=["lm_head"]), "lora")
    modules = list(model.modules())
    with pytest.raises(NotImplementedError, match=r"lm_head is trained along by 'lora' and 'pvm'"):
        both.merge_and_unload()
    assert list(model.modules()) == modules


@pytest.mark.parametrize("ours", BESIDE)
def test_a_lora_is_merged_and_unmerged_beside_ours(ours: str):
    model = LLAVA.build()
    get_peft_model(model, copy.copy(BESIDE[ours]), "ours")
    with_lora = get_peft_model(model, lora(), "lora").eval()
    give_weight(model)
    expected = logits(model, inputs_of(model))
    with_lora.merge_adapter()
    assert difference(logits(model, inputs_of(model)), expected) <= 10 * TOLERANCE
    assert all(layer.merged for layer in model.modules() if hasattr(layer, "lora_A"))
    with_lora.unmerge_adapter()
    assert difference(logits(model, inputs_of(model)), expected) <= 10 * TOLERANCE


@pytest.mark.parametrize("ours", ["pvm", "dipe", "memvr"])
@pytest.mark.parametrize("saved", ["mlp", "lm_head"])
def test_a_copy_of_a_module_does_not_copy_the_model(ours: str, saved: str):
    """PEFT copies what a LoRA trains along. The copy must not carry hooks, which lead to the whole model."""

    def new_modules(*configs) -> int:
        model = LLAVA.build()
        for number, config in enumerate(configs):
            get_peft_model(model, config, f"a{number}")
        gc.collect()
        before = sum(isinstance(each, torch.nn.Module) for each in gc.get_objects())
        kept = get_peft_model(model, lora(modules_to_save=[saved]), "lora").eval()
        gc.collect()
        found = sum(isinstance(each, torch.nn.Module) for each in gc.get_objects()) - before
        assert logits(kept, inputs_of(model)).isfinite().all()
        return found

    assert new_modules(METHODS[ours].config()) == new_modules()


@pytest.mark.parametrize("ours", BESIDE)
def test_an_adapter_that_is_not_there_cannot_act(ours: str):
    model = get_peft_model(LLAVA.build(), BESIDE[ours], "ours")
    with pytest.raises(ValueError, match=r"has no adapters \['typo'\]; it has \['ours'\]"):
        model.base_model.set_adapter(["ours", "typo"])
    assert acting_adapters(model.get_base_model()) == ["ours"]


def test_a_tuner_deletes_its_own_adapters_only():
    model = LLAVA.build()
    dipe = get_peft_model(model, DIPEConfig(), "dipe")
    pvm = get_peft_model(model, PVMConfig(r=32), "pvm")
    with pytest.raises(ValueError, match="has no adapter 'pvm'"):
        dipe.delete_adapter("pvm")
    assert list(pvm.peft_config) == ["dipe", "pvm"]
    pvm.delete_adapter("pvm")
    dipe.delete_adapter("dipe")


@pytest.mark.parametrize("ours", BESIDE)
def test_what_a_lora_trains_along_acts_and_learns_beside_ours(ours: str):
    model = LLAVA.build()
    get_peft_model(model, lora(modules_to_save=["lm_head"]), "lora")
    head = model.lm_head.modules_to_save["lora"].weight
    with torch.no_grad():
        head.mul_(1.5)
    inputs = inputs_of(model)
    expected = logits(model, inputs)
    with attached(model, M3IDConfig() if ours != "m3id" else DIPEConfig(max_distance=1000)):
        assert torch.equal(logits(model, inputs), expected)
    tuner = get_peft_model(model, BESIDE[ours], "ours")
    tuner.set_adapter("ours")
    assert head.requires_grad
    model(**inputs).logits.sum().backward()
    assert head.grad.abs().sum() > 0
    tuner.unload()
    assert torch.equal(logits(model, inputs), expected)


def test_what_pvm_trains_along_acts_beside_a_lora():
    model = METHODS["pvm"].attach(LLAVA.build(), "pvm", modules_to_save=["lm_head"]).get_base_model()
    with torch.no_grad():
        model.lm_head.modules_to_save["pvm"].weight.mul_(1.5)
    inputs = inputs_of(model)
    expected = logits(model, inputs)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "lora")
    assert torch.equal(logits(model, inputs), expected)


def test_a_module_that_both_train_along_goes_back_to_the_other():
    model = LLAVA.build()
    get_peft_model(model, lora(modules_to_save=["lm_head"]), "lora")
    with torch.no_grad():
        model.lm_head.modules_to_save["lora"].weight.mul_(1.5)
    inputs, state = inputs_of(model), state_of(model)
    expected = logits(model, inputs)
    for _ in range(3):
        with attached(model, PVMConfig(r=32, modules_to_save=["lm_head"])):
            pass
        assert same(model, state)
        get_peft_model(model, PVMConfig(r=32, modules_to_save=["lm_head"]), "ours").unload()
        assert same(model, state)
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("ours", BESIDE)
def test_a_lora_does_not_take_the_name_of_ours(ours: str):
    model = LLAVA.build()
    add_adapters(model, {"one": BESIDE[ours]})
    config, state = model.peft_config["one"], state_of(model)
    for attach in (
        lambda: get_peft_model(model, lora(), "one"),
        lambda: add_adapters(model, {"one": lora()}),
        lambda: add_adapters(model, {"two": lora(), "one": lora()}),
    ):
        with pytest.raises(ValueError, match="'one' is already attached"):
            attach()
        assert model.peft_config == {"one": config}
        assert same(model, state)
        assert acting_adapters(model) == ["one"]


@pytest.mark.parametrize("ours", BESIDE)
def test_another_tuner_does_not_delete_ours(ours: str):
    model = LLAVA.build()
    add_adapters(model, {"ours": BESIDE[ours]})
    beside = get_peft_model(model, lora(), "lora")
    state = state_of(model)
    with pytest.raises(ValueError, match="'ours' is an adapter of another type"):
        beside.delete_adapter("ours")
    assert list(model.peft_config) == ["ours", "lora"]
    assert same(model, state)


def test_a_copy_of_a_layer_would_have_pvm_twice():
    model = METHODS["pvm"].attach(LLAVA.build(), "pvm", layers_to_transform=[1]).get_base_model()
    state = state_of(model)
    with pytest.raises(ValueError, match=r"names model\.language_model\.layers\.1, which has another adapter inside"):
        get_peft_model(model, lora(modules_to_save=["layers.1"]), "lora")
    assert list(model.peft_config) == ["pvm"]
    assert same(model, state)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("method", ["pvm", "memvr", "dipe"])
def test_a_model_is_copied_after_a_lora_has_gone(method: str, ran: bool):
    model = LLAVA.build()
    beside = get_peft_model(model, lora(target_modules=["down_proj"]), "gone")
    beside.add_adapter("stays", lora())
    METHODS[method].attach(model)
    inputs = inputs_of(model)
    if ran:
        logits(model, inputs)
    beside.delete_adapter("gone")
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))


@pytest.mark.parametrize("method", ["pvm", "dipe", "tdrs", "pai", "var", "memvr"])
def test_a_forward_leaves_nothing_to_the_garbage_collector(method: str):
    """Python does not know how much memory a GPU's tensors take, and collects cycles when it likes."""
    model = get_peft_model(LLAVA.build(), METHODS[method].config()).eval()
    inputs = LLAVA.inputs(model.get_base_model(), "t4 i t30", "t9")  # padding, so that there is a mask
    logits(model, inputs, use_cache=False)  # the first one tries some things out
    gc.collect()
    gc.disable()
    try:
        before = len(contexts())  # those of other tests in this process
        logits(model, inputs, use_cache=False)
        assert len(contexts()) == before
    finally:
        gc.enable()


def contexts() -> list[VisualContext]:
    """Those of this process that are not freed yet."""
    return [each for each in gc.get_objects() if isinstance(each, VisualContext)]


@pytest.mark.parametrize("method", ["pvm", "dipe", "var", "cai"])
def test_a_static_cache_that_was_reset_is_empty(method: str):
    model = get_peft_model(LLAVA.build(), METHODS[method].config()).eval()
    give_weight(model)
    base, inputs = model.get_base_model(), inputs_of(model.get_base_model())
    cache = StaticCache(config=base.config.get_text_config(), max_cache_len=32)
    expected = logits(model, inputs, **{CACHE: cache})
    cache.reset()
    assert difference(logits(model, inputs, **{CACHE: cache}), expected) <= TOLERANCE


@pytest.mark.parametrize("static", [True, False])
def test_what_joins_a_conversation_late_does_not_take_its_tokens_for_known(static: bool):
    """VAR has to have seen every token. DIPE has, so the conversation itself is known."""
    model = LLAVA.build()
    add_adapters(model, {"dipe": DIPEConfig()})
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
    logits(model, LLAVA.inputs(model, "t4 i t6", stop=8), **{CACHE: cache})
    add_adapters(model, {"var": METHODS["var"].config()})
    with pytest.raises(RuntimeError, match="Nobody looked for sinks among all tokens"):
        logits(model, LLAVA.inputs(model, "t4 i t6", start=8), **{CACHE: cache})


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=static_caches_crop)])
def test_an_image_that_was_cropped_is_not_taken_for_a_later_one(static: bool):
    """The base alone has filled the cache up again, to the same length."""
    model = LLAVA.build()
    inputs = inputs_of(model)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40) if static else DynamicCache()
    with attached(model, PVMConfig(r=32, init_gate=1.0)):
        model(**inputs, **{CACHE: cache})
    cache.crop(-inputs["input_ids"].shape[1] + 1)
    model(
        **{name: value[:, 1:] if name != "pixel_values" else value for name, value in inputs.items()}, **{CACHE: cache}
    )
    token = torch.tensor([[5]])
    with (
        attached(model, PVMConfig(r=32, init_gate=1.0)),
        pytest.raises(ValueError, match="without the adapter knowing"),
    ):
        model(input_ids=token, **{CACHE: cache})


def test_an_overflow_of_the_base_is_not_taken_for_another_architecture():
    model = get_peft_model(LLAVA.build(), PVMConfig(r=32)).eval()
    inputs = inputs_of(model.get_base_model())
    assert logits(model, {**inputs, "pixel_values": inputs["pixel_values"] * torch.inf}).isnan().any()
    assert logits(model, inputs).isfinite().all()


def test_blocks_that_end_as_they_began_leave_nothing():
    """The first to begin ends first, while the other still has its adapter on the model."""
    model = LLAVA.build()
    before = set(vars(model))
    one, other = attached(model, DIPEConfig()), attached(model, METHODS["vaf"].config())
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert set(vars(model)) == before


@pytest.mark.parametrize("method", ["pvm", "pai", "cai", "memvr", "dipe"])
def test_a_cache_from_inference_mode_can_be_trained_on(method: str):
    model = LLAVA.build()
    get_peft_model(model, METHODS[method].config())
    get_peft_model(model, lora(), "lora")
    with torch.inference_mode():
        cache = model(**LLAVA.inputs(model, "t4 i t6", stop=8), use_cache=True)[CACHE]
    model(**LLAVA.inputs(model, "t4 i t6", start=8), **{CACHE: cache}).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["dipe", "vaf", "tdrs", "cai"])
def test_the_first_forward_may_name_loras_by_row(method: str):
    """What is tried out in a first forward does not have the rows that the names are for."""
    model = LLAVA.build()
    get_peft_model(model, METHODS[method].config())
    both = get_peft_model(model, lora(target_modules=r".*language_model.*(q_proj|v_proj)"), "lora").eval()
    inputs = LLAVA.inputs(model, "t4 i t6", "t7 i t3", "t9")
    names = ["lora", "__base__", "lora"]
    first = logits(both, inputs, adapter_names=names)
    assert torch.equal(first[:2], logits(both, inputs, adapter_names=names)[:2])
    logits(both, inputs)  # the first forward in which all is tried out
    assert difference(logits(both, inputs, adapter_names=names), first) <= TOLERANCE


@pytest.mark.parametrize("method", ["cai", "memvr"])
def test_a_head_by_row_reads_early_exits_by_row(method: str):
    """The head is another one for each row, so it decides otherwise which tokens are undecided, at some threshold."""
    model = LLAVA.build()
    both = get_peft_model(model, lora(target_modules=["lm_head"]), "lora").eval()
    inputs, matters = LLAVA.inputs(model, "t4 i t6", "t7 i t3"), False
    config = type(METHODS[method].config())
    for threshold in torch.linspace(0.5, 1, 21).tolist():
        with attached(model, config(threshold=threshold)):
            of_lora, of_base = (logits(both, inputs, adapter_names=[name] * 2) for name in ("lora", "__base__"))
            found = logits(both, inputs, adapter_names=["lora", "__base__"])
        assert difference(found[0], of_lora[0]) <= TOLERANCE
        assert difference(found[1], of_base[1]) <= TOLERANCE
        matters |= difference(found, logits(both, inputs, adapter_names=["lora", "__base__"])) > TOLERANCE
    assert matters


@pytest.mark.parametrize("method", ["dipe", "vaf", "pvm"])
def test_an_alora_may_act_in_the_first_forward(method: str):
    """PEFT tells its layers from which token on it acts, for every row of the batch."""
    config = lora(
        target_modules=r".*language_model.*(q_proj|v_proj)", alora_invocation_tokens=[50, 51], task_type="CAUSAL_LM"
    )
    both = get_peft_model(LLAVA.build(), config, "lora").eval()
    model = both.get_base_model()
    inputs = LLAVA.inputs(model, "t4 i t6", "t7 i t3")
    inputs["input_ids"][:, -3:-1] = torch.tensor([50, 51])
    with attached(model, METHODS[method].config()):
        assert logits(both, inputs).isfinite().all()


def test_whole_attention_that_is_trained_along_is_refused():
    """A LoRA that trains all of it runs a copy, which DIPE does not reach."""
    model = LLAVA.build()
    get_peft_model(model, DIPEConfig(), "dipe")
    both = get_peft_model(model, LoraConfig(target_modules=["gate_proj"], modules_to_save=["self_attn"]), "lora")
    with pytest.raises(NotImplementedError, match="was replaced after"):
        logits(both, inputs_of(model))


def test_loading_onto_a_name_beside_trained_tokens(tmp_path: Path):
    """As a trainer does that goes on from a checkpoint."""
    model = LLAVA.build()
    get_peft_model(model, lora(trainable_token_indices=[5]), "lora")
    pvm = get_peft_model(model, PVMConfig(r=32), "pvm")
    give_weight(pvm)
    pvm.save_pretrained(tmp_path, selected_adapters=["pvm"])
    expected = logits(model, inputs_of(model))
    pvm.load_adapter(str(tmp_path / "pvm"), "pvm", is_trainable=True)
    assert difference(logits(model, inputs_of(model)), expected) <= TOLERANCE
    assert isinstance(pvm, PeftModel)

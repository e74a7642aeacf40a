"""PVM, DIPE, T-DRS and LoRA on one model, attached in any order, in any company."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from forwards import TOLERANCE, difference, in_double, logits
from methods_under_test import METHODS, TOGETHER, give_weight
from oracle import oracle
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_vlms import FAMILIES, TinyVLM
from transformers import DynamicCache, StaticCache

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")
ALL = (*TOGETHER, "lora")
MIXED = (*ALL[2:], *ALL[:2])
SUBSETS = [subset for size in range(len(ALL) + 1) for subset in itertools.combinations(ALL, size)]
NAMES = ["+".join(subset) or "none" for subset in SUBSETS]


def config_of(name: str) -> PeftConfig:
    if name == "lora":
        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return METHODS[name].config()


def settle(model: torch.nn.Module) -> None:
    """The same weights, whatever the order of attaching."""
    give_weight(model)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.2)


@pytest.fixture(scope="module", params=["qwen3_vl", "gemma3"])
def expected(request) -> tuple[TinyVLM, dict[tuple[str, ...], torch.Tensor]]:
    """What every subset gives, through transformers' API, in the order of `ALL`."""
    family = FAMILIES[request.param]
    model = with_adapters(family, ALL)
    inputs = family.inputs(model, *ROWS)
    return family, {subset: acting(model, subset, inputs) for subset in SUBSETS}


def with_adapters(family: TinyVLM, names: tuple[str, ...]) -> torch.nn.Module:
    model = family.build()
    for name in names:
        model.add_adapter(config_of(name), adapter_name=name)
    settle(model)
    return model.eval()


def acting(model: torch.nn.Module, subset: tuple[str, ...], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if not subset:
        model.disable_adapters()
        result = logits(model, inputs)
        model.enable_adapters()
        return result
    model.set_adapter(list(subset))
    return logits(model, inputs)


def test_every_subset_is_something_else(expected):
    family, results = expected
    base = family.build().requires_grad_(False)  # as PEFT has it
    assert torch.equal(results[()], logits(base, family.inputs(base, *ROWS)))
    for one, other in itertools.combinations(SUBSETS, 2):
        assert difference(results[one], results[other]) > 100 * TOLERANCE, (one, other)


@pytest.mark.parametrize("order", [ALL[::-1], MIXED], ids=["reversed", "mixed"])
def test_order_of_attaching_does_not_matter(expected, order: tuple[str, ...]):
    family, results = expected
    model = with_adapters(family, order)
    inputs = family.inputs(model, *ROWS)
    for subset in SUBSETS:
        assert torch.equal(acting(model, subset, inputs), results[subset]), subset


@pytest.mark.parametrize("order", [ALL, ALL[::-1], MIXED], ids=["", "reversed", "mixed"])
def test_nesting_gives_the_same(expected, order: tuple[str, ...], tmp_path: Path):
    """One PeftModel over another; each saves its own, and takes off its own."""
    family, results = expected
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    nested: list[PeftModel] = []
    for name in order:
        nested.append(get_peft_model(nested[-1].get_base_model() if nested else model, config_of(name), name))
    settle(model)
    assert torch.equal(logits(nested[-1].eval(), inputs), results[ALL])

    for name, peft_model in zip(order, nested):
        peft_model.save_pretrained(tmp_path, selected_adapters=[name])
        with safe_open(tmp_path / name / "adapter_model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        assert bool(keys) == (name in ("pvm", "lora"))
        assert all(f".{name}_" in key for key in keys)

    remaining = list(order)
    for name, peft_model in zip(order, nested):  # from the inside out
        if name == "lora":
            continue  # PEFT would take LoRA's layers out of a model that the others still look at
        peft_model.unload()
        remaining.remove(name)
        assert set(model.peft_config) == set(remaining)
        subset = tuple(name for name in ALL if name in remaining)
        assert difference(logits(model, inputs), results[subset]) < TOLERANCE, subset


def test_saving_one_through_transformers_holds_no_other(expected, tmp_path: Path):
    family, results = expected
    model = with_adapters(family, ALL)
    inputs = family.inputs(model, *ROWS)
    for name in ALL:
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        with safe_open(tmp_path / name / "adapter_model.safetensors", framework="pt") as file:
            assert all(f".{name}_" in key for key in file.keys())  # noqa: SIM118
    again = family.build()
    for name in ALL:
        again.load_adapter(tmp_path / name, adapter_name=name)
    for subset in SUBSETS:
        assert torch.equal(acting(again, subset, inputs), results[subset]), subset


def test_both_steerings_agree_with_the_oracle(family: TinyVLM):
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=DIPEConfig(max_distance=0), tdrs=TDRSConfig()) as reference:
        expected = logits(reference, in_double(inputs))[real]
    computed = logits(METHODS["dipe+tdrs"].attach(model), inputs)[real]
    assert difference(computed.double(), expected) < 2 * TOLERANCE


def test_two_tdrs_on_one_layer_are_refused():
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    model.add_adapter(TDRSConfig(), "one")
    model.add_adapter(TDRSConfig(sd_strength=2.0, layers_to_transform=[0]), "other")
    model.set_adapter(["one", "other"])
    with pytest.raises(ValueError, match=r"'one' and 'other' are active and both decide the weights .* layer 0"):
        logits(model, inputs)
    model.add_adapter(TDRSConfig(layers_to_transform=[1, 2]), "rest")
    model.set_adapter(["rest", "other"])
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("static", [False, True], ids=["", "static cache"])
def test_tdrs_needs_the_positions_of_all_tokens(static: bool):
    """It may be switched on in the middle of a conversation, but must have been attached at its start."""
    family = FAMILIES["llava"]
    model = METHODS["dipe"].attach(family.build(), adapter_name="dipe")
    base = model.get_base_model()
    length = family.inputs(base, "t4 i t9")["input_ids"].shape[1]
    rest = family.inputs(base, "t4 i t9", start=length - 2)

    def prefill():
        cache = StaticCache(config=base.config.get_text_config(), max_cache_len=40) if static else DynamicCache()
        logits(base, family.inputs(base, "t4 i t9", stop=length - 2), **{CACHE: cache}, use_cache=True)
        return cache

    cache = prefill()
    tdrs = get_peft_model(base, TDRSConfig(), "late")
    with pytest.raises(RuntimeError, match="must be attached from the first token on"):
        logits(base, rest, **{CACHE: cache}, use_cache=True)
    with tdrs.disable_adapter():
        cache = prefill()
    if not static:  # nothing is left of what was read without it
        emptied = copy.deepcopy(cache)
        emptied.crop(-emptied.get_seq_length())
        logits(base, family.inputs(base, "t9"), **{CACHE: emptied}, use_cache=True)
    switched_on = logits(base, rest, **{CACHE: cache}, use_cache=True)
    with tdrs.disable_adapter():
        left_off = logits(base, rest, **{CACHE: prefill()}, use_cache=True)
    assert difference(switched_on, left_off) > 100 * TOLERANCE

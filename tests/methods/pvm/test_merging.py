"""Several adapters made into one: averaged, by PEFT's merge methods, or side by side."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS, give_weight
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, ties
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import PVMConfig
from peft_pvm.tuners.saving import own_tensors
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")


def trained(model: PeftModel, adapter_name: str, seed: int) -> None:
    """Move an adapter's weights away from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pvm_" in name and f".{adapter_name}." in name:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.add_(0.3 * noise.to(parameter.device))


@pytest.fixture
def siblings(tiny: TinyVLM) -> PeftModel:
    """Adapters "a" and "b" that started from the same weights, and "other", of other weights."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.build(), PVMConfig(r=32, layers_to_transform=[0, 2]), "a")
    for seed, name in ((1, "b"), (2, "other")):
        torch.manual_seed(seed)
        model.add_adapter(name, PVMConfig(r=32, layers_to_transform=[0, 2]))
    for seed, name in enumerate(("a", "b", "other")):
        trained(model, name, seed)
    return model.eval()


@pytest.fixture
def strangers(tiny: TinyVLM) -> PeftModel:
    """Adapters "a" and "b" of other ranks, layers, memory and visibility."""
    model = METHODS["pvm"].attach(tiny.build(), "a", layers_to_transform=[0, 2], mlp_ratio=1.0)
    model.add_adapter(
        "b", PVMConfig(r=16, layers_to_transform=[1, 2], memory_visibility="sample", memory_source="hidden_states")
    )
    give_weight(model)
    return model.eval()


def weights_of(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    return {
        name.replace(f".{adapter_name}.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".pvm_" in name and f".{adapter_name}." in name
    }


def using(model: PeftModel, names: list[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.base_model.set_adapter(names)
    return logits(model, inputs)


def test_the_lineage_is_that_of_the_initial_weights(siblings: PeftModel):
    lineages = {name: config.lineage for name, config in siblings.peft_config.items()}
    assert lineages["a"] == lineages["b"] != lineages["other"]
    assert len(lineages["a"]) == 16


def test_the_lineage_stays_through_saving_and_training_on(tiny: TinyVLM, siblings: PeftModel, tmp_path):
    siblings.save_pretrained(tmp_path)
    lineage = siblings.peft_config["a"].lineage
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "a", is_trainable=is_trainable)
        assert loaded.peft_config["default"].lineage == lineage
    # The configuration of an adapter, used again for a fresh one.
    fresh = get_peft_model(tiny.build(), dataclasses.replace(loaded.peft_config["default"]))
    assert fresh.peft_config["default"].lineage not in (None, lineage)


def test_a_configuration_used_twice_makes_two_lineages(tiny: TinyVLM):
    config = PVMConfig(r=32, layers_to_transform=[0])
    model = get_peft_model(tiny.build(), config, "a")
    model.add_adapter("b", config)
    assert config.lineage is None
    assert model.peft_config["a"].lineage != model.peft_config["b"].lineage


def test_linear_averages_the_weights(tiny: TinyVLM, siblings: PeftModel):
    siblings.add_weighted_adapter(["a", "b"], [0.75, 0.25], "mean")
    a, b, mean = (weights_of(siblings, name) for name in ("a", "b", "mean"))
    assert mean.keys() == a.keys()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, 0.75 * a[key] + 0.25 * b[key])
    assert siblings.peft_config["mean"].lineage == siblings.peft_config["a"].lineage
    assert siblings.active_adapters == ["a"]
    assert not any(p.requires_grad for name, p in siblings.named_parameters() if ".mean." in name)


def test_one_adapter_alone_is_copied(tiny: TinyVLM, siblings: PeftModel):
    inputs = tiny.inputs(siblings.get_base_model(), *ROWS)
    siblings.add_weighted_adapter(["b"], [1.0], "copy")
    assert torch.equal(using(siblings, ["copy"], inputs), using(siblings, ["b"], inputs))


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear"])
def test_pefts_own_merge_methods_make_the_matrices(siblings: PeftModel, combination_type: str):
    torch.manual_seed(5)
    siblings.add_weighted_adapter(["a", "b"], [0.6, 0.6], "merged", combination_type, density=0.5)
    a, b, merged = (weights_of(siblings, name) for name in ("a", "b", "merged"))
    method = {"ties": ties, "dare_linear": dare_linear}[combination_type]
    torch.manual_seed(5)
    for key in own_tensors(siblings, "a"):
        key = next(name for name in a if name.endswith(key.removeprefix("base_model.model.")))
        if a[key].dim() == 2:
            expected = method([a[key], b[key]], torch.tensor([0.6, 0.6]), 0.5)
        else:
            expected = (a[key] + b[key]) / 2
        torch.testing.assert_close(merged[key], expected)


def test_cat_is_the_weighted_sum_of_the_branches(tiny: TinyVLM, strangers: PeftModel):
    """With every gate scaled, both adapters active at once give the sum to compare with."""
    inputs = tiny.inputs(strangers.get_base_model(), *ROWS)
    strangers.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", "cat")
    found = using(strangers, ["sum"], inputs)
    alone = using(strangers, ["a"], inputs)
    with torch.no_grad():
        for name, weight in (("a", 0.5), ("b", -2.0)):
            for key, tensor in weights_of(strangers, name).items():
                if "pvm_gate." in key:
                    tensor.mul_(weight)
    assert difference(found, using(strangers, ["a", "b"], inputs)) < TOLERANCE
    assert difference(found, alone) > 100 * TOLERANCE
    config = strangers.peft_config["sum"]
    assert (config.r, config.layers_to_transform) == (48, [0, 1, 2])


def test_cat_is_saved_and_loaded_and_concatenated_again(tiny: TinyVLM, strangers: PeftModel, tmp_path):
    inputs = tiny.inputs(strangers.get_base_model(), *ROWS)
    strangers.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", "cat")
    strangers.add_weighted_adapter(["a", "sum"], [1.0, 2.0], "again", "cat")
    expected = {name: using(strangers, [name], inputs) for name in ("sum", "again")}
    strangers.save_pretrained(tmp_path)
    for name, output in expected.items():
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / name).eval()
        assert torch.equal(logits(loaded, inputs), output)
        base = tiny.build()
        base.load_adapter(tmp_path / name, adapter_name="other")
        assert torch.equal(logits(base.eval(), inputs), output)
    assert len(loaded.peft_config["default"].branches) == 3


def test_cat_trains_and_decodes(tiny: TinyVLM, strangers: PeftModel):
    strangers.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", "cat")
    strangers.set_adapter("sum")
    inputs = tiny.inputs(strangers.get_base_model(), "t7 i t5")
    strangers(**inputs).logits.square().mean().backward()
    gates = [
        p
        for name, p in strangers.named_parameters()
        if name.endswith((".pvm_gate.sum.weight", ".pvm_gate_1.sum.weight"))
    ]
    assert len(gates) == 4
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates)
    whole = logits(strangers.eval(), inputs)
    cache = None
    for start in range(inputs["input_ids"].shape[1] - 3, inputs["input_ids"].shape[1]):
        step = tiny.inputs(strangers.get_base_model(), "t7 i t5", start=start if cache else 0, stop=start + 1)
        with torch.no_grad():
            output = strangers(**step, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        assert difference(output.logits[:, -1], whole[:, start]) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "other"], [0.5, 0.5], "new"), "not known to have started from the same initial weights"),
        ((["a", "b"], [0.5, 0.6], "new"), "add up to 1.1, but must add up to 1"),
        ((["a", "b"], [1.0], "new"), "2 adapters and 1 weights"),
        (([], [], "new"), "0 adapters"),
        ((["a", "wrong"], [0.5, 0.5], "new"), r"no PVM adapters \['wrong'\]; it has \['a', 'b', 'other'\]"),
        ((["a", "b"], [0.5, 0.5], "other"), "already attached"),
        ((["a", "b"], [0.5, 0.5], "new", "svd"), "combination_type is 'svd', but must be one of"),
        ((["a", "b"], [0.5, 0.5], "new", "ties"), "density is None"),
        ((["a", "b"], [0.5, 0.5], "new", "dare_linear", 1.5), "density is 1.5"),
        ((["a", "b"], [1.0, -1.0], "new", "ties", 0.5), "add up to 0"),
    ],
)
def test_what_does_not_go_is_refused(tiny: TinyVLM, siblings: PeftModel, arguments: tuple, message: str):
    inputs = tiny.inputs(siblings.get_base_model(), *ROWS)
    before, modules = logits(siblings, inputs), [name for name, _ in siblings.named_modules()]
    with pytest.raises(ValueError, match=message):
        siblings.add_weighted_adapter(*arguments)
    assert modules == [name for name, _ in siblings.named_modules()]
    assert list(siblings.peft_config) == ["a", "b", "other"]
    assert torch.equal(logits(siblings, inputs), before)


def test_other_lineages_are_averaged_when_told_to(siblings: PeftModel):
    siblings.add_weighted_adapter(["a", "other"], [0.5, 0.5], "forced", force=True)
    assert siblings.peft_config["forced"].lineage is None


def test_adapters_of_other_shape_are_not_averaged(strangers: PeftModel):
    with pytest.raises(ValueError, match=r"The adapters differ in r: \[32, 16\]"):
        strangers.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", force=True)


def test_modules_to_save_are_not_combined():
    model = METHODS["pvm"].attach(FAMILIES["llava"].build(), "a", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"also holds modules of the base \(\['lm_head'\]\)"):
        model.add_weighted_adapter(["a"], [1.0], "new", "cat")


@pytest.mark.parametrize(
    "branches",
    [
        [],
        [{"r": 32}],
        "cat",
        [
            dict(
                r=32,
                layers_to_transform="strided",
                memory_visibility="causal",
                memory_source="embeddings",
                mlp_ratio=1,
            )
        ],
        [dict(r=-1, layers_to_transform=[0], memory_visibility="causal", memory_source="embeddings", mlp_ratio=1)],
    ],
)
def test_wrong_branches_are_refused(branches):
    with pytest.raises(ValueError, match=r"PVMConfig\.(branches|r) is"):
        PVMConfig(branches=copy.deepcopy(branches))

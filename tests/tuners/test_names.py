"""Whatever an adapter is called: it works in full, or it is refused by its name and nothing stays attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forwards import difference, logits
from methods_under_test import METHODS, give_weight
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm.tuners.names import adapter_names


ROWS = ("t4 i t3 i t6", "t7 i t5")
METHODS_HERE = ("pvm", "dipe")  # one with parameters, and one without
OF_CONTAINERS = (
    "train",
    "eval",
    "float",
    "keys",
    "items",
    "pop",
    "forward",
    "to",
    "parameters",
    "training",
    "__init__",
)
OF_THE_MODEL = ("layers", "0", "weight", "model", "mlp", "base_model", "modules_to_save")
ILL_FORMED = ("a.b", "default.pvm", "", " ", "a b", "a/b", "..", "\\", "a(b", "a\nb", "x" * 10_000, "é" * 101)


@pytest.fixture
def tiny() -> TinyVLM:
    return FAMILIES["qwen3_vl"]


@pytest.fixture(params=METHODS_HERE)
def name_of_method(request) -> str:
    return request.param


def state(model: torch.nn.Module) -> dict:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "modules": [name for name, _ in base.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()],
        "trainable": [name for name, parameter in base.named_parameters() if parameter.requires_grad],
        "table": list(base.peft_config) if hasattr(base, "peft_config") else None,
        "transformers": getattr(base, "_hf_peft_config_loaded", False),
        "methods": sorted(name for name in vars(base) if callable(vars(base)[name])),
    }


ONTO_A_BASE: dict[str, Callable] = {
    "get_peft_model": lambda model, config, folder, name: get_peft_model(model, config, name),
    "from_pretrained": lambda model, config, folder, name: PeftModel.from_pretrained(model, folder, name),
    "inject": lambda model, config, folder, name: inject_adapter_in_model(config, model, name),
    "transformers": lambda model, config, folder, name: model.load_adapter(folder, adapter_name=name),
}
BESIDE_ANOTHER: dict[str, Callable] = {
    "add_adapter": lambda model, config, folder, name: model.add_adapter(name, config),
    "load_adapter": lambda model, config, folder, name: model.load_adapter(folder, name),
}


@pytest.mark.parametrize("name", [*OF_CONTAINERS, *OF_THE_MODEL, *ILL_FORMED], ids=lambda name: repr(name[:12]))
def test_refused_by_name(tiny: TinyVLM, name_of_method: str, name: str, tmp_path: Path):
    method = METHODS[name_of_method]
    method.attach(tiny.build()).save_pretrained(tmp_path)
    base = tiny.build()
    inputs = tiny.inputs(base, *ROWS)
    before, expected = state(base), logits(base, inputs)
    for way, attach in ONTO_A_BASE.items():
        with pytest.raises(ValueError, match=r"An adapter cannot be named .*Pass another adapter_name") as refusal:
            attach(base, method.config(), tmp_path, name)
        assert len(str(refusal.value)) < 1000
        assert state(base) == before, way
    assert torch.equal(logits(base, inputs), expected)

    model = method.attach(tiny.build(), "first")
    expected, before = logits(model, inputs), state(model)  # what is checked in the first forward is done
    for way, attach in BESIDE_ANOTHER.items():
        with pytest.raises(ValueError, match="An adapter cannot be named"):
            attach(model, method.config(), tmp_path, name)
        assert state(model) == before, way
    assert torch.equal(logits(model, inputs), expected)


PAIRS = [
    ("pvm", "pvm2"),
    ("pvm_gate", "pvm"),
    ("pvm_gate", "gate"),
    ("dipe", "tdrs"),
    ("default", "default-2"),
    ("wei", "weights"),
    ("é", "日本-2"),
    ("lora_A", "lora"),
    ("x" * 200, "x"),
]


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0][:12])
def test_works_in_full(tiny: TinyVLM, name_of_method: str, names: tuple[str, str], tmp_path: Path):
    method = METHODS[name_of_method]
    base = tiny.build()
    inputs = tiny.inputs(base, *ROWS)
    bare = logits(base, inputs)
    fields = {} if name_of_method == "pvm" else {"layers_to_transform": [0]}
    expected = {}
    for seed, name in enumerate(names):
        alone = method.attach(tiny.build(), name, **(fields if seed else {}))
        give_weight(alone, seed)
        expected[name] = logits(alone, inputs)
        alone.save_pretrained(tmp_path / "alone")
        folder = tmp_path / "alone" / ("" if name == "default" else name)
        loaded = PeftModel.from_pretrained(tiny.build(), folder, adapter_name=name)
        assert torch.equal(logits(loaded, inputs), expected[name])
        loaded = tiny.build()
        loaded.load_adapter(str(folder), adapter_name=name)
        assert torch.equal(logits(loaded, inputs), expected[name])
    first, second = names
    assert difference(expected[first], expected[second]) > 1e-5

    folders = {name: tmp_path / "alone" / ("" if name == "default" else name) for name in names}
    model = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    model.load_adapter(str(folders[second]), adapter_name=second)
    before = state(model)
    model.save_pretrained(tmp_path / "both")
    assert state(model) == before
    assert model.active_adapter == first
    for name in names:
        file = Path("" if name == "default" else name) / "adapter_model.safetensors"
        one, other = (load_file(tmp_path / kind / file) for kind in ("alone", "both"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), expected[name])
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), bare)
    model.set_adapter(first)
    model.delete_adapter(second)
    assert torch.equal(logits(model, inputs), expected[first])
    assert torch.equal(logits(model.unload(), inputs), bare)
    assert {**state(base), "trainable": ...} == {**state(tiny.build()), "trainable": ...}, "PEFT has frozen the base"


@pytest.mark.parametrize("name", ["pvm", "lora_A", "q"])
def test_a_lora_beside_it_is_saved_whole(tiny: TinyVLM, name_of_method: str, name: str, tmp_path: Path):
    base = tiny.build()
    METHODS[name_of_method].attach(base, name)
    with pytest.warns(UserWarning, match="peft_config"):  # PEFT finds a second adapter surprising
        lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    lora.save_pretrained(tmp_path, selected_adapters=["lora"])
    alone = get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"]), "lora")
    alone.save_pretrained(tmp_path / "alone")
    saved, needed = (load_file(tmp_path / place / "lora/adapter_model.safetensors") for place in ("", "alone"))
    assert saved.keys() == needed.keys()
    assert saved


FOLDERS = ("eval", "layers", "0", "weights", "pvm", "model.v2", "...", "a b", "日本", "é" * 100, "items")


def test_names_from_folders_work(tiny: TinyVLM, tmp_path: Path):
    """Each by itself and all together, beside an adapter that is there."""
    METHODS["pvm"].attach(tiny.build(), layers_to_transform=[0]).save_pretrained(tmp_path / "saved")
    config = PeftConfig.from_pretrained(tmp_path / "saved")
    sources = []
    for name in FOLDERS:
        for parent in ("one", "two"):
            folder = tmp_path / parent / name
            folder.mkdir(parents=True)
            for file in (tmp_path / "saved").iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            sources.append(str(folder))

    def load(model: torch.nn.Module, sources: list[str]) -> list[str]:
        names = adapter_names(sources, model)
        for name, source in names.items():
            model.load_adapter(source, adapter_name=name)
        return list(names)

    for source in sources:
        model = tiny.build()
        assert load(model, [source]) == list(model.peft_config)
    model = tiny.build()
    inject_adapter_in_model(dataclasses.replace(config), model, "pvm")
    assert ["pvm", *load(model, sources)] == list(model.peft_config)
    assert len(adapter_names(sources)) == len(sources), "without a model, the script of VLMEvalKit asks for them"

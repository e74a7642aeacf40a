"""Adapters survive saving and loading; a file that does not fit is refused by name and leaves the model as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forwards import difference, logits
from methods_under_test import METHODS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM
from transformers import PreTrainedModel

from peft_pvm import PVMConfig


ROWS = ("t4 i t3 i t6", "t9")
WEIGHTS = "adapter_model.safetensors"


def from_pretrained(model: PreTrainedModel, path: Path, **kwargs) -> torch.nn.Module:
    return PeftModel.from_pretrained(model, str(path), **kwargs)


def load_adapter(model: PreTrainedModel, path: Path, **kwargs) -> torch.nn.Module:
    model.load_adapter(str(path), **kwargs)
    return model


LOADERS = {"PeftModel.from_pretrained": from_pretrained, "transformers load_adapter": load_adapter}


@pytest.fixture(params=LOADERS)
def load(request) -> Callable:
    return LOADERS[request.param]


@pytest.fixture
def tiny() -> TinyVLM:
    return FAMILIES["qwen3_vl"]


@pytest.fixture
def saved(tiny: TinyVLM, tmp_path: Path) -> Path:
    METHODS["pvm"].attach(tiny.build()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_round_trip(family: TinyVLM, load: Callable, low_cpu_mem_usage: bool, adapter_name: str, tmp_path: Path):
    model = METHODS["pvm"].attach(family.build(), memory_visibility="sample", layers_to_transform=[0, 2])
    inputs = family.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)

    loaded = load(family.build(), tmp_path, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, inputs), expected)
    config = loaded.peft_config[adapter_name]
    assert (config.memory_visibility, config.layers_to_transform) == ("sample", [0, 2])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_file_holds_the_adapter_under_the_bases_names(saved: Path):
    keys = set(load_file(saved / WEIGHTS))
    layers = PeftConfig.from_pretrained(saved).layers_to_transform
    prefixes = tuple(f"base_model.model.model.language_model.layers.{layer}.pvm.pvm_" for layer in layers)
    assert len(keys) == 15 * len(layers)
    assert all(key.startswith(prefixes) for key in keys)
    assert "base_model.model.model.language_model.layers.1.pvm.pvm_gate.weight" in keys
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


def test_caller_keeps_their_config(tiny: TinyVLM):
    config = PVMConfig(r=32)
    model = get_peft_model(tiny.build(), config)
    assert config.layers_to_transform == "strided", "the same config fits a model of another depth"
    assert model.peft_config["default"].layers_to_transform == [1, 2], "the saved one says which layers they were"


def test_modules_to_save(tiny: TinyVLM, tmp_path: Path):
    """Their buffers too, which may be whole numbers."""

    def build() -> torch.nn.Module:
        model = tiny.build()
        model.lm_head.register_buffer("steps", torch.tensor([7]))
        return model

    model = METHODS["pvm"].attach(build(), modules_to_save=["lm_head", "post_attention_layernorm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded, inputs), expected)

    assert torch.equal(logits(model.unload(), inputs), logits(build(), inputs))


def test_modules_to_save_of_a_second_adapter(tiny: TinyVLM, saved: Path, tmp_path: Path):
    """PEFT copies the module that carries the first adapter's hook: the hook must follow it, not be copied."""
    second = METHODS["pvm"].attach(tiny.build(), modules_to_save=["post_attention_layernorm"])
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    second.save_pretrained(tmp_path / "second")
    model = from_pretrained(tiny.build(), saved, adapter_name="first")
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected = {"first": logits(model, inputs), "second": logits(second, inputs)}
    model.load_adapter(str(tmp_path / "second"), adapter_name="second")
    for name in ("second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), expected[name])


def test_loading_for_training(tiny: TinyVLM, saved: Path):
    model = from_pretrained(tiny.build(), saved, is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".pvm_" in name for name in trainable)


def test_several_adapters(tiny: TinyVLM, tmp_path: Path):
    """Load, switch, sum, delete; adapters of different widths on different layers."""
    from methods_under_test import give_weight

    base = tiny.build()
    inputs = tiny.inputs(base, *ROWS)
    plain = logits(base, inputs)
    single = {}
    for name, fields in {"a": dict(r=32), "b": dict(r=16, layers_to_transform=[0, 1])}.items():
        model = get_peft_model(tiny.build(), PVMConfig(**fields), adapter_name=name)
        give_weight(model, seed=len(single))
        model.save_pretrained(tmp_path)
        single[name] = logits(model, inputs)

    model = PeftModel.from_pretrained(base, str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    assert torch.equal(logits(model, inputs), single["a"]), "a loaded adapter waits to be set"
    model.set_adapter("b")
    assert torch.equal(logits(model, inputs), single["b"])
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, inputs)
    assert difference(both, single["a"]) > 1e-3
    assert difference(both, single["b"]) > 1e-3
    model.set_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(logits(model, inputs), single["a"])
    assert set(model.peft_config) == {"a"}
    assert torch.equal(logits(model.unload(), inputs), plain)


@pytest.mark.parametrize("by_transformers", [False, True], ids=["PeftModel", "transformers"])
@pytest.mark.parametrize("method", ["pvm", "vaf"])
def test_what_others_do_while_it_is_saved_stays(
    tiny: TinyVLM, method: str, by_transformers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A server may load and choose adapters in one thread while another saves."""
    model = METHODS[method].attach(tiny.build())
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    model.save_pretrained(tmp_path / "one")
    if by_transformers:
        model = tiny.build()
        model.load_adapter(tmp_path / "one", "default")
    model.add_adapter(*["second", METHODS[method].config()][:: -1 if by_transformers else 1])
    model.set_adapter("default")
    expected = logits(model.eval(), inputs)
    save_config = PeftConfig.save_pretrained

    def meanwhile(config: PeftConfig, *args: object, **kwargs: object) -> None:
        if "third" not in model.peft_config:
            with ThreadPoolExecutor() as other:
                other.submit(model.load_adapter, str(tmp_path / "one"), "third").result()
                other.submit(model.set_adapter, "second").result()
        save_config(config, *args, **kwargs)

    monkeypatch.setattr(PeftConfig, "save_pretrained", meanwhile)
    model.save_pretrained(tmp_path / "two")
    assert list(model.peft_config) == ["default", "second", "third"]
    assert (model.active_adapters() if by_transformers else [model.active_adapter]) == ["second"]
    again = PeftModel.from_pretrained(tiny.build(), tmp_path / "two").eval()
    assert torch.equal(logits(again, inputs), expected)
    for name in ("third", "default"):
        model.set_adapter(name)
        assert torch.equal(logits(model.eval(), inputs), expected)


def test_lora_beside_pvm_saves_apart(tiny: TinyVLM, tmp_path: Path):
    """Both through transformers: each file holds its own tensors and loads without the other."""
    model = tiny.build()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="lora")
    model.add_adapter(PVMConfig(r=32, init_weights=False), adapter_name="pvm")
    model.set_adapter(["lora", "pvm"])
    inputs = tiny.inputs(model, *ROWS)
    both = logits(model, inputs)

    files = {}
    for name in ("lora", "pvm"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        files[name] = set(load_file(tmp_path / name / WEIGHTS))
    assert all(".pvm_" in key and "lora_" not in key for key in files["pvm"])
    assert all("lora_" in key and ".pvm_" not in key for key in files["lora"])

    for order in (("lora", "pvm"), ("pvm", "lora")):
        again = tiny.build()
        for name in order:
            again.load_adapter(str(tmp_path / name), adapter_name=name)
        again.set_adapter(["lora", "pvm"])
        assert torch.equal(logits(again, inputs), both)
    alone = tiny.build()
    alone.load_adapter(str(tmp_path / "lora"))
    model.set_adapter("lora")
    assert torch.equal(logits(alone, inputs), logits(model, inputs))


def test_lora_and_pvm_trained_together_are_two_adapters(tiny: TinyVLM, tmp_path: Path):
    """Each moves, each is saved by itself, and the LoRA works on the bare base as it does with PVM switched off."""
    model = tiny.build()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="lora")
    model.add_adapter(PVMConfig(r=32), adapter_name="pvm")
    model.set_adapter(["lora", "pvm"])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    inputs = tiny.inputs(model, *ROWS)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        loss = model.train()(**inputs).logits[..., 7].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(difference(parameter, start[name]) > 1e-4 for name, parameter in trained.items())
    outputs = {}
    for names in (["lora", "pvm"], ["lora"], ["pvm"]):
        model.eval().set_adapter(names)
        outputs[tuple(names)] = logits(model, inputs)
        if len(names) == 1:
            model.save_pretrained(tmp_path / names[0])
    for names, expected in outputs.items():
        again = tiny.build()
        for name in names:
            again.load_adapter(str(tmp_path / name), adapter_name=name)
        again.set_adapter(list(names))
        assert difference(logits(again, inputs), expected) == 0
    assert difference(outputs["lora", "pvm"], outputs["lora",]) > 1e-3


# ---- what must be refused

MISSING = "base_model.model.model.language_model.layers.1.pvm.pvm_k_proj.weight"


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        edit(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def _truncate(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def _write_pickle(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


def _set_field(**fields) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))

    return damage


def _wide(tiny: TinyVLM) -> PreTrainedModel:
    text = {**tiny.config().text_config.to_dict(), "hidden_size": 32}
    vision = {**tiny.config().vision_config.to_dict(), "out_hidden_size": 32}
    config = type(tiny.config())(**{**tiny.config().to_dict(), "text_config": text, "vision_config": vision})
    return type(tiny.build())._from_config(config)


def _shallow(tiny: TinyVLM) -> PreTrainedModel:
    text = {**tiny.config().text_config.to_dict(), "num_hidden_layers": 2}
    config = type(tiny.config())(**{**tiny.config().to_dict(), "text_config": text})
    return type(tiny.build())._from_config(config)


def _lie(path: Path) -> None:
    """Have the header promise a tensor twice as long as the file is."""
    content = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = max((entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"][1])
    entry["shape"] = [2 * entry["shape"][0], *entry["shape"][1:]]
    entry["data_offsets"][1] += entry["data_offsets"][1] - entry["data_offsets"][0]
    lying = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(len(lying).to_bytes(8, "little") + lying + content[8 + length :])


REFUSED = {
    "nan": (
        _edit_weights(lambda t: t[MISSING].fill_(torch.nan)),
        None,
        "pvm_k_proj.weight holds NaN or infinity",
    ),
    "integers": (
        _edit_weights(lambda t: t.update({MISSING: t[MISSING].int()})),
        None,
        r"pvm_k_proj.weight holds torch.int32, not floating-point numbers",
    ),
    "lying header": (_lie, None, "is damaged or not a safetensors file"),
    "pickle by another name": (
        lambda path: torch.save({"weight": torch.zeros(3)}, path / WEIGHTS),
        None,
        "is damaged or not a safetensors file",
    ),
    "newer format": (
        _set_field(format_version="2"),
        None,
        "format_version is '2', but this peft_pvm knows format '1'",
    ),
    "unknown method": (_set_field(peft_type="PVM2"), None, "not the configuration of a method that PEFT or peft_pvm"),
    "no method": (_set_field(peft_type=None), None, "not the configuration of a method that PEFT or peft_pvm"),
    "another kind of JSON": (
        lambda path: (path / "adapter_config.json").write_text("[1]"),
        None,
        "not the configuration of a method that PEFT or peft_pvm",
    ),
    "missing": (_edit_weights(lambda t: t.pop(MISSING)), None, f"{MISSING} is missing"),
    "extra": (_edit_weights(lambda t: t.update(stray=torch.zeros(1))), None, "stray belongs to nothing in this model"),
    "shape": (
        _edit_weights(lambda t: t.update({MISSING: torch.zeros(16, 31)})),
        None,
        r"pvm_k_proj.weight has shape \(16, 31\), this model needs \(16, 32\)",
    ),
    "truncated": (_truncate, None, f"{WEIGHTS} is damaged or not a safetensors file"),
    "text": (lambda path: (path / WEIGHTS).write_text("no tensors"), None, "is damaged or not a safetensors file"),
    "pickle": (_write_pickle, None, f"There is no {WEIGHTS} in"),
    "hidden size": (lambda path: None, _wide, r"has shape \(\d+, 64\), this model needs \(\d+, 32\)|Check that"),
    "too few layers": (lambda path: None, _shallow, r"names layers \[2\], but the text model has only 2 layers"),
    "other layers": (_set_field(layers_to_transform=[0, 2]), None, r"layers.0.pvm.\S+ is missing"),
    "absurd width": (
        _set_field(mlp_ratio=6e4),
        None,
        "mlp_ratio is 60000.0, which makes the branch's MLP 1920000 wide",
    ),
    "head size": (
        _set_field(r=24),
        None,
        "PVMConfig.r is 24, but must be a multiple of the base model's head size 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(tiny: TinyVLM, saved: Path, load: Callable, case: str):
    damage, build, complaint = REFUSED[case]
    damage(saved)
    model = tiny.build() if build is None else build(tiny).eval()
    inputs = tiny.inputs(model, "t9") if build else tiny.inputs(model, *ROWS)
    before, base = _state(model), logits(model, inputs)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        load(model, saved)
    assert _state(model) == before
    assert torch.equal(logits(model, inputs), base)


def test_a_subfolder_that_leads_elsewhere_is_refused(tiny: TinyVLM, saved: Path):
    model = tiny.build()
    before = _state(model)
    for subfolder in (f"../{saved.name}", str(saved)):
        with pytest.raises(ValueError, match="leads out of"):
            PeftModel.from_pretrained(model, saved, subfolder=subfolder)
    assert _state(model) == before


@pytest.mark.parametrize("case", [case for case, (_, build, _) in REFUSED.items() if build is None])
def test_refusals_leave_another_adapter_as_it_was(tiny: TinyVLM, saved: Path, case: str):
    damage, _, complaint = REFUSED[case]
    model = from_pretrained(tiny.build(), saved, adapter_name="first")
    damage(saved)
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected, before = logits(model, inputs), _state(model)  # what is checked in the first forward is done
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        model.load_adapter(str(saved), adapter_name="second")
    assert _state(model) == before
    assert set(model.peft_config) == {"first"}
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("case", ["missing", "shape", "extra", "nan", "huge", "base"])
def test_weights_that_do_not_fit_an_attached_adapter_are_refused(tiny: TinyVLM, saved: Path, case: str):
    model = from_pretrained(tiny.build(), saved)
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    weights = {name: tensor * 2 for name, tensor in load_file(saved / WEIGHTS).items() if name != MISSING}
    if case == "shape":
        weights[MISSING] = torch.zeros(16, 31)
    elif case == "extra":
        weights[MISSING] = torch.zeros(16, 32)
        weights[MISSING.replace("layers.1", "layers.0")] = torch.zeros(16, 32)
    elif case != "missing":
        weights[MISSING] = torch.full((16, 32), {"nan": torch.nan, "huge": 1e30, "base": 0.0}[case])
        if case == "base":
            weights["base_model.model.lm_head.weight"] = torch.zeros_like(model.get_base_model().lm_head.weight)
    complaint = {
        "missing": r"layers.1.pvm.pvm_k_proj.weight is missing",
        "shape": r"layers.1.pvm.pvm_k_proj.weight has shape \(16, 31\), this model needs \(16, 32\)",
        "extra": r"layers.0.pvm.pvm_k_proj.weight belongs to nothing in this model",
        "nan": r"layers.1.pvm.pvm_k_proj.weight holds NaN or infinity",
        "huge": r"layers.1.pvm.pvm_k_proj.weight holds 1e\+30, which is larger than any number of fp16",
        "base": r"lm_head.weight belongs to nothing in this model",
    }[case]
    with pytest.raises(ValueError, match=rf"nothing was loaded: \S*{complaint}"):
        set_peft_model_state_dict(model, weights)
    assert torch.equal(logits(model, inputs), expected)


def test_refused_configuration_leaves_the_model_as_it_was(tiny: TinyVLM):
    model = tiny.build()
    before = _state(model)
    for attach in (get_peft_model, lambda model, config: model.add_adapter(config)):
        with pytest.raises(ValueError, match=r"names layers \[7\], but the text model has only 3 layers \(0 to 2\)"):
            attach(model, PVMConfig(r=32, layers_to_transform=[1, 7]))
        assert _state(model) == before
    model.add_adapter(PVMConfig(r=32))


def test_a_configuration_alone_starts_a_new_adapter(tiny: TinyVLM, saved: Path, tmp_path: Path):
    PVMConfig(r=32).save_pretrained(tmp_path / "recipe")
    get_peft_model(tiny.build(), PVMConfig.from_pretrained(tmp_path / "recipe"))
    with pytest.raises(FileNotFoundError, match=f"There is no {WEIGHTS}"):
        from_pretrained(tiny.build(), tmp_path / "recipe")

    # Of an adapter for another base, the configuration can still be used.
    config = PVMConfig.from_pretrained(saved)
    wide = _wide(tiny)
    with pytest.raises(ValueError, match=r"pass dataclasses\.replace\(config\)"):
        get_peft_model(wide, config)
    get_peft_model(wide, dataclasses.replace(config, layers_to_transform=[1]))


def test_an_attached_adapter_is_not_overwritten(tiny: TinyVLM):
    base = tiny.build()
    model = METHODS["pvm"].attach(base)
    inputs = tiny.inputs(base, *ROWS)
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="An adapter 'default' is already attached"):
        get_peft_model(base, PVMConfig(r=16))
    assert model.peft_config["default"].r == 32
    assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(
        ValueError, match=r"already a PeftModel. Attach to what it wraps: get_peft_model\(model.get_base"
    ):
        get_peft_model(model, PVMConfig(r=32), adapter_name="other")


def test_an_adapter_of_another_type_is_not_overwritten(tiny: TinyVLM):
    lora = get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"]))
    before = _state(lora)
    with pytest.raises(ValueError, match="An adapter 'default' is already attached"):
        get_peft_model(lora.get_base_model(), PVMConfig(r=32))
    assert lora.peft_config["default"].peft_type == "LORA"
    assert _state(lora) == before


def test_unknown_adapter_is_refused(tiny: TinyVLM, tmp_path: Path):
    model = tiny.build()
    before = _state(model)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(model, str(tmp_path / "nowhere"))
    assert _state(model) == before


def _state(model: torch.nn.Module) -> dict:
    return {
        "modules": [name for name, _ in model.named_modules()],
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "tensors": sorted(model.state_dict()),
        "adapters": sorted(getattr(model, "peft_config", {})),
        "transformers": getattr(model, "_hf_peft_config_loaded", False),
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "own methods": sorted(name for name in vars(model) if callable(vars(model)[name])),
    }

"""peft-pvm inspect, merge, convert, export-reference and card."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run
from methods_under_test import give_weight
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM
from transformers import LlamaConfig

from peft_pvm import DIPEConfig, PVMConfig, add_adapters, save_adapter
from peft_pvm.folders.inspection import inspect_adapter
from peft_pvm.utils.text import plain


def save(tiny: TinyVLM, folder: Path, seed: int = 0, **fields) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build(), PVMConfig(**{"r": 32, "layers_to_transform": [0, 2], **fields}))
    give_weight(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny: TinyVLM, tmp_path: Path) -> Path:
    tiny.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_inspect(tiny: TinyVLM, tmp_path: Path):
    adapter = save(tiny, tmp_path / "a")
    output = run("inspect", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    gate = tensors["base_model.model.model.language_model.layers.2.pvm.pvm_gate.weight"].item()
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,}" in output
    assert f"layer 2: {gate:.4g}" in output
    assert json.loads((adapter / "adapter_config.json").read_text())["lineage"] in output
    found = json.loads(run("inspect", adapter, "--json"))
    assert found == json.loads(json.dumps(inspect_adapter(adapter).to_dict()))
    assert (found["method"], found["config"]["layers_to_transform"], found["dtypes"]) == ("pvm", [0, 2], ["float32"])


def test_inspect_tells_whether_a_base_fits(tiny: TinyVLM, tmp_path: Path, base: Path):
    adapter = save(tiny, tmp_path / "a")
    assert "yes" in run("inspect", adapter, "--base", base)
    wide = save(tiny, tmp_path / "wide", layers_to_transform=[0])
    (wide / "adapter_config.json").write_text(
        json.dumps({**json.loads((wide / "adapter_config.json").read_text()), "layers_to_transform": [1]})
    )
    assert "knows nothing of" in run("inspect", wide, "--base", base, fails=True)
    narrow = save(tiny, tmp_path / "narrow", mlp_ratio=1.0)
    (narrow / "adapter_config.json").write_text(
        json.dumps({**json.loads((narrow / "adapter_config.json").read_text()), "mlp_ratio": 2.0})
    )
    output = run("inspect", narrow, "--base", base, fails=True)
    assert "this model needs" in output
    config = tiny.config()
    config.text_config.hidden_size = 2 * config.text_config.hidden_size
    config.save_pretrained(tmp_path / "other")
    assert json.loads(run("inspect", adapter, "--base", tmp_path / "other", "--json", fails=True))["misfit"]
    LlamaConfig().save_pretrained(tmp_path / "blind")
    said = run("inspect", adapter, "--base", tmp_path / "blind", fails=True)
    assert "is a 'llama', but must be a model that reads images and writes text. `peft-pvm models` lists" in said


def test_inspect_adapters_of_other_kinds(tiny: TinyVLM, tmp_path: Path, base: Path):
    get_peft_model(tiny.build(), DIPEConfig(layers_to_transform=[1])).save_pretrained(tmp_path / "dipe")
    assert "dipe" in run("inspect", tmp_path / "dipe", "--base", base)
    lora = get_peft_model(tiny.build(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "lora" in run("inspect", tmp_path / "lora", "--base", base)
    found = json.loads(run("inspect", tmp_path / "lora", "--json"))
    assert (found["method"], found["config"]["target_modules"]) == ("lora", ["q_proj"])
    assert found["parameters"] == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert "is an adapter of type LORA, not of peft_pvm" in run("card", tmp_path / "lora", fails=True)
    assert "There is no folder or file nowhere here, and the Hub did not give it" in run(
        "inspect", "nowhere", fails=True
    )


def test_what_is_nowhere_or_of_another_kind(tiny: TinyVLM, tmp_path: Path, base: Path, monkeypatch):
    """The Hub is not asked for it."""
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("somebody asks the Hub"))
    monkeypatch.chdir(tmp_path)
    several, adapter, empty = (tmp_path / name for name in ("several", "adapter", "empty"))
    for folder in (several / "b", several / "a", adapter):
        get_peft_model(tiny.build(), DIPEConfig()).save_pretrained(folder)
    empty.mkdir()

    def said(*arguments: object) -> str:
        return run(*arguments, fails=True).removeprefix("Error: ").rstrip()

    for path in ("./nowhere", "no/where/at/all", "nothing.json"):
        expected = f"There is no folder or file {path}. Check the path, which starts at {tmp_path}."
        assert said("inspect", path) == said("inspect", "--base", path) == expected
    assert said("inspect", tmp_path / "no") == f"There is no folder or file {tmp_path / 'no'}. Check the path."
    assert "`adapters/` is in a checkout of the repository." in said("inspect", "adapters/dipe")
    assert "Make the base first: make real-base" in said("compare", "--model", "real", "--out", "compared")
    assert "Make the base first: make real-base" in said("lab", "recall", "--base", "real", adapter)
    assert said("inspect", base) == f"{base} is a model, not an adapter. Models go by --model or --base."
    assert said("inspect", several) == f"{several} is not an adapter, but holds several: a, b. Name one: {several}/a"
    for arguments in (["--base", adapter], [adapter, "--base", adapter]):
        assert said("inspect", *arguments).startswith(
            f"{adapter} is an adapter, not a base model. Give its base model"
        )
    image = "--image", base / "config.json", "--prompt", "?", "--out", "report"
    assert "There is no folder or file ./b" in said("probe", "--model", base, "--adapter", f"{adapter}+./b", *image)
    assert "Use cuda, or mps on a Mac" in said("probe", "--model", base, "--device", "gpu:0", *image)
    assert said("inspect", empty) == f"Can't find 'adapter_config.json' at '{empty}'"


def test_inspect_says_what_was_trained_together(tiny: TinyVLM, tmp_path: Path):
    model = tiny.build()
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    add_adapters(model, {"pvm": PVMConfig(r=16), "dipe": DIPEConfig(max_distance=7), "lora": lora})
    for name in model.peft_config:
        save_adapter(model, name, tmp_path / name)
    output = run("inspect", tmp_path / "lora")
    assert "trained with" in output
    assert "'dipe' (DIPE): max_distance=7" in output
    found = json.loads(run("inspect", tmp_path / "pvm", "--json"))["trained_with"]
    assert [(companion["name"], companion["method"]) for companion in found] == [("dipe", "DIPE"), ("lora", "LORA")]
    assert found[0]["fields"]["max_distance"] == 7
    assert f"weights {found[1]['weights']}" in run("inspect", tmp_path / "dipe")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"trained_with": "\x1b[2J"})
    assert "is damaged or not JSON" in run("inspect", tmp_path / "lora", fails=True)


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "\x1b[2J", "a\nb", "\u202eabc"])
def test_names_are_only_text_on_the_terminal(tiny: TinyVLM, tmp_path: Path, name: str):
    adapter = save(tiny, tmp_path / name, layers_to_transform=[0])
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": name}))
    output = run("inspect", adapter)
    assert set(output) - {"\n"} == {character for character in output if character.isprintable()}
    assert f"trained on │ {plain(name)} " in output
    run("card", adapter)


def test_merge(tiny: TinyVLM, tmp_path: Path):
    one, two = save(tiny, tmp_path / "one", 1), save(tiny, tmp_path / "two", 2)
    run("merge", one, two, "--weights", "0.25,0.75", "--out", tmp_path / "mean")
    a, b, mean = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two", "mean"))
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, 0.25 * a[key] + 0.75 * b[key])
    assert json.loads((tmp_path / "mean" / "adapter_config.json").read_text())["inference_mode"]
    run("merge", one, two, "--combination-type", "cat", "--out", tmp_path / "both")
    output = run("inspect", tmp_path / "both")
    assert "gates of branch 1" in output
    assert "| `branches` |" in (tmp_path / "both" / "README.md").read_text()


def test_merge_gives_what_the_model_gives(tiny: TinyVLM, tmp_path: Path):
    """And the file loads on a model, where it computes what the adapter that was made there computes."""
    model = get_peft_model(tiny.build(), PVMConfig(r=32, layers_to_transform=[0]), "a")
    model.add_adapter("b", PVMConfig(r=16, layers_to_transform=[0, 1]))
    give_weight(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", "cat")
    model.save_pretrained(tmp_path)
    run(
        "merge",
        tmp_path / "a",
        tmp_path / "b",
        "--weights",
        "0.5,2",
        "--combination-type",
        "cat",
        "--out",
        tmp_path / "c",
    )
    ours, models = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("c", "sum"))
    assert ours.keys() == models.keys()
    assert all(torch.equal(ours[key], models[key]) for key in ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "0.5,0.6"), "add up to 1.1"),
        (("--weights", "0.5"), "2 adapters and 1 weights"),
        (("--weights", "0.5,nan"), "'0.5,nan' must be numbers"),
        (("--density", "0.5"), "linear keeps all"),
        (("--combination-type", "ties", "--density", "nan"), "--density"),
        (("--combination-type", "cat", "--force"), "nothing to force"),
        (("--combination-type", "svd"), "'svd' is not one of 'linear'"),
    ],
)
def test_what_cannot_be_merged(tiny: TinyVLM, tmp_path: Path, options: tuple[str, ...], message: str):
    one, two = save(tiny, tmp_path / "one", 1), save(tiny, tmp_path / "two", 2)
    assert message in run("merge", one, two, *options, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def add_another(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.language_model.layers.1.pvm.pvm_gate.weight"] = torch.ones(1)


def add_one_of_the_base(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.lm_head.weight"] = torch.ones(1)


def make_nan(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values())).fill_(torch.nan)


def make_whole_numbers(weights: dict[str, torch.Tensor]) -> None:
    weights.update({key: tensor.long() for key, tensor in weights.items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dict.popitem, "it lacks .layers."),
        (add_another, "its configuration knows nothing of"),
        (add_one_of_the_base, "is not PVM's, and modules_to_save does not name it"),
        (make_nan, "holds NaN or infinity"),
        (make_whole_numbers, "holds torch.int64, not floating-point numbers"),
    ],
)
def test_damaged_adapters_are_not_read(tiny: TinyVLM, tmp_path: Path, damage: Callable, message: str):
    one, two = save(tiny, tmp_path / "one", 1), save(tiny, tmp_path / "two", 2)
    weights = load_file(two / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, two / "adapter_model.safetensors")
    assert message in run("inspect", two, fails=True)
    assert message in run("merge", one, two, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def of(tiny: TinyVLM, config) -> torch.nn.Module:
    return dataclasses.replace(tiny, config=lambda: config).build()


def test_adapters_of_different_bases_are_not_merged(tiny: TinyVLM, tmp_path: Path):
    one = save(tiny, tmp_path / "one")
    config = tiny.config()
    config.text_config.hidden_size, config.text_config.head_dim = 128, 16
    get_peft_model(of(tiny, config), PVMConfig(r=32, layers_to_transform=[0, 2])).save_pretrained(tmp_path / "wide")
    for options in (("--combination-type", "cat"), ("--force",)):
        output = run("merge", one, tmp_path / "wide", *options, "--out", tmp_path / "out", fails=True)
        assert "of different widths, [64, 128]" in output
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 192
    get_peft_model(of(tiny, config), PVMConfig(r=32, layers_to_transform=[0, 2])).save_pretrained(tmp_path / "ffn")
    assert "different shapes" in run("merge", one, tmp_path / "ffn", "--force", "--out", tmp_path / "out", fails=True)


def test_card(tiny: TinyVLM, tmp_path: Path):
    adapter = save(tiny, tmp_path / "a")
    (adapter / "results.json").write_text(json.dumps([{"dataset": "POPE", "metric": "F1", "value": 0.8}]))
    run("card", adapter)
    assert "| POPE | F1 |  | 0.8 |" in (adapter / "README.md").read_text()


def test_convert_and_export(tmp_path: Path):
    FAMILIES["qwen3_vl"].build().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = PVMConfig(r=32, layers_to_transform=[0, 2], memory_visibility="sample")
    get_peft_model(FAMILIES["qwen3_vl"].build(), config).save_pretrained(tmp_path / "ours")
    run("export-reference", tmp_path / "ours", tmp_path / "base", tmp_path / "theirs")
    assert "--with-base" in run("convert", tmp_path / "theirs", tmp_path / "back")
    assert "--with-base" not in run(
        "convert", tmp_path / "theirs", tmp_path / "back", "--with-base", tmp_path / "bare"
    )
    ours, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "back"))
    assert all(torch.equal(ours[key], back[key]) for key in ours.keys() | back)
    assert "no checkpoint of PVM" in run("convert", tmp_path / "base", tmp_path / "x", fails=True)

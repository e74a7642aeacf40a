"""Adapters that were trained together know each other: what is noted on saving, and when loading warns."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forwards import difference, logits
from methods_under_test import give_weight
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as hotswap_of_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM
from torch import nn

from peft_pvm import DIPEConfig, PVMConfig, add_adapters, attached, hotswap_adapter, load_adapters, save_adapter
from peft_pvm.folders.adapter_file import AdapterFile
from peft_pvm.folders.companions import KEY
from peft_pvm.methods.pvm.checkpoints import merge_adapters
from peft_pvm.tokens.families import find_vlm
from peft_pvm.utils.text import LONGEST


PROMPTS = ("t4 i t3 i t6", "t9")
WEIGHTS = "adapter_model.safetensors"
TINY = FAMILIES["qwen3_vl"]


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})


def trained(model: nn.Module) -> nn.Module:
    """A model on which PVM, DIPE and a LoRA learn together."""
    torch.manual_seed(0)
    add_adapters(model, {"pvm": PVMConfig(r=16), "dipe": DIPEConfig(max_distance=2), "lora": lora()})
    give_weight(model)
    return model.eval()


def around(model: nn.Module) -> PeftModel:
    """The same, the LoRA by a PeftModel around the model."""
    torch.manual_seed(0)
    add_adapters(model, {"pvm": PVMConfig(r=16), "dipe": DIPEConfig(max_distance=2)})
    give_weight(model)
    return PeftModel(model, lora(), "lora").eval()


def save_each(model: nn.Module, folder: Path) -> None:
    for name in model.peft_config:
        save_adapter(model, name, folder / name)


WRITERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "save_adapter": lambda base, folder: save_each(trained(base), folder),
    "PeftModel": lambda base, folder: around(base).save_pretrained(folder),
    "PeftModel, one": lambda base, folder: [
        around_it.save_pretrained(folder, selected_adapters=[name])
        for around_it in [around(base)]
        for name in around_it.peft_config
    ],
}


@contextmanager
def warned(times: int = 1) -> Iterator[list[str]]:
    """What is warned of companions in a block."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "trained together with" in str(w.message) or KEY in str(w.message)]
    assert len(said) == times, said


def line_in(said: str) -> list[str]:
    """The folders in the line that a warning gives."""
    return ast.literal_eval(re.search(r"peft_pvm\.load_adapters\(model, (\[.*?\])\)", said).group(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_each(trained(TINY.build()), tmp_path)
    return tmp_path


@pytest.mark.parametrize("writer", WRITERS)
def test_each_notes_the_others(tiny: TinyVLM, writer: str, tmp_path: Path):
    WRITERS[writer](tiny.build(), tmp_path)
    found = {name: AdapterFile(tmp_path / name).companions() for name in ("pvm", "dipe", "lora")}
    for name, companions in found.items():
        assert {companion.name for companion in companions} == found.keys() - {name}
    by_name = {companion.name: companion for companion in found["lora"]}
    assert (by_name["dipe"].method, by_name["dipe"].weights) == ("DIPE", None)
    assert by_name["dipe"].fields["max_distance"] == 2
    assert by_name["pvm"].fields["r"] == 16
    hashes = {companion.name: companion.weights for companion in found["dipe"]}
    assert len(set(hashes.values())) == 2
    with safe_open(tmp_path / "dipe" / WEIGHTS, "pt") as file:
        assert file.metadata().keys() == {"format", "method", "version", KEY}
    with warned(0):
        names = load_adapters(tiny.build(), [str(tmp_path / name) for name in ("lora", "dipe", "pvm")])
    assert names == ["lora", "dipe", "pvm"]


def test_all_writers_note_the_same(tmp_path: Path):
    for writer, write in WRITERS.items():
        write(TINY.build(), tmp_path / writer)
        for name in ("pvm", "dipe", "lora"):
            expected, found = (
                {c.name: c for c in AdapterFile(tmp_path / at / name).companions()} for at in ("save_adapter", writer)
            )
            assert found == expected, (writer, name)


@pytest.mark.parametrize("writer", WRITERS)
def test_saved_again_it_is_the_same_file(writer: str, tmp_path: Path):
    model = TINY.build()
    WRITERS[writer](model, tmp_path)
    files = {name: tmp_path / name / WEIGHTS for name in ("pvm", "dipe", "lora")}
    first = {name: file.read_bytes() for name, file in files.items()}
    for _ in range(5):
        for name in files:
            save_adapter(model, name, tmp_path / name)
    assert {name: file.read_bytes() for name, file in files.items()} == first


ENTRIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "load_adapters": lambda base, folder: load_adapters(base, [str(folder)]),
    "PeftModel": PeftModel.from_pretrained,
    "to train on": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "a second one": lambda base, folder: get_peft_model(base, lora(), "first").load_adapter(folder, "second"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_alone_it_warns_with_the_line_that_loads_all(folder: Path, entry: str):
    expected_model = trained(TINY.build())
    inputs = TINY.inputs(expected_model, *PROMPTS)
    with warned() as said:
        ENTRIES[entry](TINY.build(), folder / "lora")
    assert "'pvm' (PVM), which does not act" in said[0]
    assert "'dipe' (DIPE), which does not act" in said[0]
    assert line_in(said[0]) == [str(folder / name) for name in ("pvm", "dipe", "lora")]
    again = TINY.build()
    with warned(0):
        load_adapters(again, line_in(said[0]))
    assert difference(logits(again, inputs), logits(expected_model, inputs)) < 1e-6


def test_transformers_warns_too(folder: Path):
    base = TINY.build()
    try:
        with warned() as said:
            base.load_adapter(str(folder / "lora"), adapter_name="lora")
    except ValueError as error:
        pytest.skip(str(error))
    assert "'dipe' (DIPE), which does not act" in said[0]
    with warned() as said:
        base.load_adapter(str(folder / "pvm"), adapter_name="pvm")
    assert "'lora'" not in said[0], "it is there"
    with warned(0):
        base.load_adapter(str(folder / "dipe"), adapter_name="dipe")


def test_one_after_the_other(folder: Path):
    """The last one finds all others, whichever it is; each before it says what is missing."""
    base = TINY.build()
    for name, missing in (("pvm", 2), ("lora", 1)):
        with warned() as said:
            PeftModel.from_pretrained(base, folder / name, name)
        assert said[0].count("which does not act") == missing
    with warned(0):
        PeftModel.from_pretrained(base, folder / "dipe", "dipe")


def test_companions_that_stop_acting_are_missing(folder: Path):
    base = TINY.build()
    with warned(2):
        load_adapters(base, [str(folder / "pvm"), str(folder / "dipe")])
    with warned() as said:
        load_adapters(base, [str(folder / "lora")])
    assert said[0].count("which does not act") == 2


@pytest.mark.parametrize(("max_distance", "times"), [(5, 1), (2, 0)])
def test_other_fields_are_named(folder: Path, max_distance: int, times: int):
    base = TINY.build()
    PeftModel.from_pretrained(base, folder / "pvm", "pvm")
    with attached(base, DIPEConfig(max_distance=max_distance)), warned(times) as said:
        PeftModel.from_pretrained(base, folder / "lora", "lora")
    assert all("but 'dipe' on this model has max_distance=5 in place of 2" in text for text in said)


@pytest.mark.parametrize("of", ["pvm", "lora"])
def test_other_weights_are_named(folder: Path, of: str):
    tensors = load_file(folder / of / WEIGHTS)
    key = next(key for key in tensors if "pvm_gate" in key or "lora_B" in key)
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, folder / of / WEIGHTS, metadata={"format": "pt"})
    with warned(2) as said:  # what was changed has lost its own note
        load_adapters(TINY.build(), [str(folder / name) for name in ("pvm", "dipe", "lora")])
    assert all(f"but {of!r} on this model has other weights" in text for text in said)


def test_fresh_weights_are_other_weights(folder: Path):
    base = TINY.build()
    add_adapters(base, {"pvm": PVMConfig(r=16), "dipe": DIPEConfig(max_distance=2)})
    with warned() as said:
        PeftModel.from_pretrained(base, folder / "lora", "lora")
    assert "but 'pvm' on this model has" in said[0]
    assert "other weights" in said[0]


def test_a_model_of_another_dtype_has_the_same_weights(folder: Path):
    with warned(0):
        load_adapters(TINY.build().to(torch.bfloat16), [str(folder / name) for name in ("pvm", "dipe", "lora")])


def test_a_frozen_companion_is_noted_as_its_file_has_it(folder: Path, tmp_path: Path):
    """A LoRA that learns in bf16 beside a PVM that was saved in fp32."""
    for name in ("pvm", "dipe", "lora"):  # without notes
        save_file(load_file(folder / name / WEIGHTS), folder / name / WEIGHTS, metadata={"format": "pt"})
    base = TINY.build().to(torch.bfloat16)
    load_adapters(base, [str(folder / "pvm")])
    PeftModel(base, lora(), "lora").save_pretrained(tmp_path / "new")
    with warned(0):
        load_adapters(TINY.build(), [str(folder / "pvm"), str(tmp_path / "new" / "lora")])
    assert not AdapterFile(tmp_path / "new" / "pvm").companions(), "PVM did not learn beside that LoRA"


def test_a_note_survives_being_saved_again(folder: Path, tmp_path: Path):
    expected = AdapterFile(folder / "lora").companions()
    base = TINY.build()
    with warned():
        load_adapters(base, [str(folder / "lora")])
    save_adapter(base, "lora", tmp_path / "again")
    assert AdapterFile(tmp_path / "again").companions() == expected
    with warned():
        on = PeftModel.from_pretrained(TINY.build(), folder / "lora", "lora", is_trainable=True)
    save_adapter(on.get_base_model(), "lora", tmp_path / "on")
    assert not AdapterFile(tmp_path / "on").companions(), "it went on learning without them"


def test_what_is_merged_belongs_with_the_companions_of_all(folder: Path, tmp_path: Path):
    pvm, alone = folder / "pvm", tmp_path / "alone"
    get_peft_model(TINY.build(), PVMConfig(r=16)).save_pretrained(alone)
    noted = AdapterFile(pvm).companions()
    assert {companion.name for companion in noted} == {"dipe", "lora"}
    for adapters in ([pvm, pvm], [pvm, alone], [alone, pvm]):
        merged = merge_adapters(adapters, [0.5, 0.5], tmp_path / "merged", combination_type="cat")
        assert AdapterFile(merged).companions() == noted
        with warned(adapters.count(pvm)):
            model = PeftModel.from_pretrained(TINY.build(), adapters[0], "first")
            model.load_adapter(adapters[1], "second")
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "third", "cat")
        save_adapter(model.get_base_model(), "third", tmp_path / "third")
        assert AdapterFile(tmp_path / "third").companions() == noted
    assert not AdapterFile(merge_adapters([alone, alone], [0.5, 0.5], tmp_path / "both")).companions()


@pytest.mark.parametrize("of", ["pvm", "lora"])
def test_weights_that_were_swapped_are_noted_as_they_are(folder: Path, tmp_path: Path, of: str):
    """Also by PEFT's own function."""
    other = tmp_path / "other"
    shutil.copytree(folder / of, other)
    save_file({key: 2 * tensor for key, tensor in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    base = TINY.build()
    with warned():
        model = PeftModel.from_pretrained(base, folder / of, of)
    (hotswap_adapter if of == "pvm" else hotswap_of_peft)(model, str(other), of)
    PeftModel(base, lora() if of == "pvm" else PVMConfig(r=16), "new")  # learns, and the other is frozen
    assert base.peft_config[of].inference_mode
    for name in (of, "new"):
        save_adapter(base, name, tmp_path / "saved" / name)
    with warned(0):
        load_adapters(TINY.build(), [str(other), str(tmp_path / "saved" / "new")])
    if of == "pvm":
        assert not AdapterFile(tmp_path / "saved" / "pvm").companions(), "the other has no note"


def test_what_does_not_act_is_not_noted(tmp_path: Path):
    model = around(TINY.build())
    for layer in model.modules():
        if type(layer).__name__ == "DIPELayer":
            layer.enable_adapters(False)
    model.save_pretrained(tmp_path)
    assert [companion.name for companion in AdapterFile(tmp_path / "lora").companions()] == ["pvm"]
    get_peft_model(TINY.build(), lora()).save_pretrained(tmp_path / "alone")
    with safe_open(tmp_path / "alone" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with warned(0):
        PeftModel.from_pretrained(TINY.build(), tmp_path / "alone")


def test_the_default_adapter_is_found_above_the_others(tmp_path: Path):
    model = PeftModel(trained_dipe := TINY.build(), lora())
    with attached(trained_dipe, DIPEConfig(max_distance=0)):
        model.save_pretrained(tmp_path)
        (name,) = [name for name in model.peft_config if name != "default"]
    with warned() as said:
        PeftModel.from_pretrained(TINY.build(), tmp_path)
    assert line_in(said[0]) == [str(tmp_path / name), str(tmp_path)]
    with warned() as said:
        PeftModel.from_pretrained(TINY.build(), tmp_path / name)
    assert line_in(said[0]) == [str(tmp_path), str(tmp_path / name)]


def test_a_companion_that_is_elsewhere(folder: Path):
    (folder / "dipe").rename(folder / "moved")
    (folder / "lora").rename(folder / "dipe")  # which is not the companion of that name
    with warned() as said:
        load_adapters(TINY.build(), [str(folder / "dipe")])
    assert line_in(said[0]) == [str(folder / "pvm"), "<the folder of dipe>", str(folder / "dipe")]


def test_a_checkpoint_that_a_trainer_puts_back(tmp_path: Path):
    """One by one, on a model with other weights."""
    model = around(TINY.build())
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-2
    with warned(0):
        model.load_adapter(tmp_path / "dipe", "dipe")
        model.load_adapter(tmp_path / "lora", "lora", is_trainable=True)


def test_wrapped_layers_change_nothing(tmp_path: Path):
    around(TINY.build()).save_pretrained(tmp_path / "plain")
    model = around(TINY.build())
    layers = find_vlm(model.get_base_model()).text_model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)  # not run: what counts are the names of tensors
    model.save_pretrained(tmp_path / "wrapped")
    for name in ("pvm", "dipe", "lora"):
        plain, wrapped = (AdapterFile(tmp_path / at / name).companions() for at in ("plain", "wrapped"))
        assert plain == wrapped


def test_peft_alone_takes_no_notice(folder: Path):
    """Without this package: no warning, and the LoRA is the one that was saved."""
    TINY.build().save_pretrained(folder / "base")
    code = f"""
import warnings
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({str(folder / "base")!r})
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    model = PeftModel.from_pretrained(base, {str(folder / "lora")!r})
saved = load_file({str(folder / "lora" / WEIGHTS)!r})
state = {{key.replace(".default.", "."): tensor for key, tensor in model.state_dict().items()}}
assert saved and all((state[key] == tensor).all() for key, tensor in saved.items())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


DIPE = {"name": "dipe", "method": "DIPE", "fields": {"max_distance": 2}, "weights": None}
HOSTILE = {
    "no JSON": "{",
    "nothing": "",
    "an object": "{}",
    "no objects": "[1]",
    "a field too many": json.dumps([{**DIPE, "x": 1}]),
    "a field too few": json.dumps([{"name": "dipe"}]),
    "a name of another type": json.dumps([{**DIPE, "name": ["dipe"]}]),
    "a long name": json.dumps([{**DIPE, "name": "x" * 10**5}]),
    "fields of another type": json.dumps([{**DIPE, "fields": [1]}]),
    "a number for a hash": json.dumps([{**DIPE, "weights": 1}]),
    "very many": json.dumps([DIPE] * 1_000),
    "nested": "[" * 10**5 + "]" * 10**5,
    "endless": json.dumps([{**DIPE, "fields": {"x": "y" * (2**20)}}]),
    # What can be read, and stays text:
    "a terminal": json.dumps([{**DIPE, "name": "\x1b[2J", "method": "\x1b[2J", "fields": {"\x1b[2J": "\x1b[2J"}}]),
    "a path": json.dumps([{**DIPE, "name": "../pvm"}]),
    "large fields": json.dumps([{**DIPE, "fields": {str(n): "x" * 1_000 for n in range(500)}, "weights": "x"}] * 9),
    "numbers": '[{"name": "d", "method": "DIPE", "fields": {"max_distance": NaN, "r": 1e999}, "weights": null}]',
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("beside", [False, True])
def test_damaged_notes(folder: Path, case: str, beside: bool):
    """One warning, short and printable; what was to be loaded is loaded."""
    save_file(load_file(folder / "lora" / WEIGHTS), folder / "lora" / WEIGHTS, metadata={KEY: HOSTILE[case]})
    base = TINY.build()
    if beside:
        add_adapters(base, {"d": DIPEConfig(max_distance=3)})
    with warned() as said:
        model = PeftModel.from_pretrained(base, folder / "lora", "l")
    assert said[0].isprintable()
    assert len(said[0]) < 3 * LONGEST
    assert str(folder / "pvm") not in said[0]
    assert logits(model.eval(), TINY.inputs(base, *PROMPTS)).isfinite().all()

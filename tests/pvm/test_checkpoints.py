"""Checkpoints of the authors' code to adapters and back: the golden model is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import difference, give_weight, logits
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig, convert_reference_checkpoint, export_reference_checkpoint


GOLDEN = Path(__file__).parents[1] / "data" / "pvm_qwen3vl.safetensors"
IDS = dict(image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def checkpoint(golden, tmp_path: Path) -> Path:
    """The golden model as their code would have saved it."""
    return write_checkpoint(golden, tmp_path / "theirs", shards=1)


def write_checkpoint(golden: dict[str, torch.Tensor], folder: Path, shards: int) -> Path:
    with safe_open(GOLDEN, framework="pt") as file:
        text, vision = (json.loads(file.metadata()[part]) for part in ("text", "vision"))
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    fields = {name: text.pop(name) for name in ("pvm_hidden_size", "pvm_layers")}
    config = Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **IDS)
    folder.mkdir()
    content = config.to_dict()
    content["text_config"].update(fields)
    (folder / "config.json").write_text(json.dumps({**content, "architectures": ["Qwen3VLForConditionalGeneration"]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_pvm.py").write_text("raise SystemExit")
    weights = {name.removeprefix("w."): tensor for name, tensor in golden.items() if name.startswith("w.")}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = {
        key: torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one.keys() & other
    }
    return one.keys() == other.keys() and all(same.values())


@pytest.mark.parametrize("shards", [1, 3])
def test_the_converted_adapter_computes_what_the_authors_code_did(golden, shards: int, tmp_path: Path):
    theirs = write_checkpoint(golden, tmp_path / "theirs", shards)
    convert_reference_checkpoint(theirs, tmp_path / "adapter", base_dir=tmp_path / "base")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["inference_mode"], "as PEFT saves it"
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert model.peft_config["default"].memory_visibility == "sample"
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    inputs = {name: golden[f"single.{name}"] for name in names}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IDS["image_token_id"]).int()
    found = logits(model, inputs)
    assert difference(found[0], golden["single.logits"][0]) < TOLERANCE
    with model.disable_adapter():
        assert difference(logits(model, inputs)[0], golden["single.logits"][0]) > 2


@pytest.mark.parametrize("shards", [1, 3])
def test_there_and_back_is_bit_exact(golden, shards: int, tmp_path: Path):
    theirs = write_checkpoint(golden, tmp_path / "theirs", shards)
    convert_reference_checkpoint(theirs, tmp_path / "adapter", base_dir=tmp_path / "base")
    assert not [key for key in tensors_of(tmp_path / "base") if "pvm" in key]
    export_reference_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "back")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(theirs))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert (tmp_path / "back" / "chat_template.jinja").is_file()
    assert not list(tmp_path.glob("b*/*.py")), "no code is copied"
    convert_reference_checkpoint(tmp_path / "back", tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "adapter"))


def test_dtypes_stay_as_stored(golden, tmp_path: Path):
    half = {name: tensor.bfloat16() if ".q_proj" in name else tensor for name, tensor in golden.items()}
    convert_reference_checkpoint(write_checkpoint(half, tmp_path / "theirs", 1), tmp_path / "adapter")
    dtypes = {key.split("pvm_")[1]: tensor.dtype for key, tensor in tensors_of(tmp_path / "adapter").items()}
    assert dtypes["q_proj.weight"] == torch.bfloat16
    assert dtypes["gate.weight"] == torch.float32


def test_an_adapter_of_ours_goes_out_and_comes_back(checkpoint: Path, tmp_path: Path):
    convert_reference_checkpoint(checkpoint, tmp_path / "theirs-as-ours", base_dir=tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PVMConfig(r=16, layers_to_transform=[0, 2], memory_visibility="sample"))
    give_weight(model)
    model.save_pretrained(tmp_path / "ours")
    export_reference_checkpoint(tmp_path / "ours", tmp_path / "base", tmp_path / "out")
    convert_reference_checkpoint(tmp_path / "out", tmp_path / "back")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["pvm_hidden_size"], text["pvm_layers"]) == (16, [0, 2])


def test_no_more_is_read_than_needed(golden, tmp_path: Path, monkeypatch):
    """Where the adapter alone is wanted, no tensor but the branch's is read at all."""
    theirs = write_checkpoint(golden, tmp_path / "theirs", shards=5)
    read: list[str] = []
    from peft_pvm import checkpoints

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.opened.get_tensor(key)

    opened = checkpoints.opened
    monkeypatch.setattr(checkpoints, "opened", lambda shard: Counting(opened(shard)))
    convert_reference_checkpoint(theirs, tmp_path / "adapter")
    assert sorted(read) == sorted(key for key in tensors_of(theirs) if ".pvm_block." in key)


def _edit_config(**text):
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for name, value in text.items():
            content["text_config"].pop(name) if value is None else content["text_config"].update({name: value})
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def _edit_weights(edit):
    def damage(folder: Path) -> None:
        weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
        edit(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def _lead_out(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


K_PROJ = "model.language_model.layers.1.pvm_block.cross_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_edit_config(pvm_hidden_size=None), ValueError, "no pvm_hidden_size: it is no checkpoint of PVM"),
        (_edit_config(pvm_layers=[1, 3, 4]), ValueError, "of layer 4 is missing"),
        (_edit_config(pvm_layers=[1]), ValueError, r"layer \d has pvm_\w+\.weight, but no branch"),
        (_edit_config(pvm_layers=[1, 3, 99]), ValueError, "there are only 6"),
        (_edit_config(pvm_hidden_size=48), ValueError, r"is \(32, 64\), but must be of shape \(48, 64\)"),
        (_edit_weights(lambda w: w.pop(K_PROJ)), ValueError, "pvm_k_proj.weight of layer 1 is missing"),
        (
            _edit_weights(lambda w: w.update({K_PROJ + "2": torch.zeros(1)})),
            ValueError,
            "none of the branch's weights",
        ),
        (lambda folder: (folder / "model.safetensors").write_text("x"), ValueError, "damaged or not a safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            FileNotFoundError,
            "from safetensors files only",
        ),
        (_lead_out, ValueError, "lead out of the folder"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, "has no text_config"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"no .*config\.json"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, damage, error, message: str):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        convert_reference_checkpoint(checkpoint, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_source": "hidden_states"}, "memory_source"),
        ({"mlp_ratio": 1.0}, "mlp_ratio of 1.0"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_their_code_does_not_know_is_not_exported(checkpoint: Path, tmp_path: Path, fields: dict, message: str):
    convert_reference_checkpoint(checkpoint, tmp_path / "adapter", base_dir=tmp_path / "base")
    base = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    get_peft_model(base, PVMConfig(r=32, layers_to_transform=[1], **fields)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export_reference_checkpoint(tmp_path / "ours", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_written_over(checkpoint: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(ValueError, match="is left as it is"):
        convert_reference_checkpoint(checkpoint, tmp_path / "adapter", base_dir=checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before

"""Checkpoints of the authors' code to adapters and back: the golden model is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from forwards import difference, logits
from methods_under_test import give_weight
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig, convert_reference_checkpoint, export_reference_checkpoint


GOLDEN = Path(__file__).parents[2] / "data" / "pvm_qwen3vl.safetensors"
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
    from peft_pvm.methods.pvm import checkpoints

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


def converted(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    convert_reference_checkpoint(checkpoint, tmp_path / "adapter", base_dir=tmp_path / "base")
    return tmp_path / "adapter", tmp_path / "base"


def rename_shards(folder: Path, names: list[str]) -> None:
    """Make a checkpoint of one file into one of several, of the given names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    weight_map = {}
    for number, name in enumerate(names):
        part = {key: weights[key] for key in keys[number :: len(names)]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "names",
    [
        ["model-pvm.safetensors", "a.safetensors"],
        ["Model-PVM.safetensors", "model-pvm-2.safetensors"],
        ["model.safetensors", "model-00001-of-00002.safetensors"],
        ["model.safetensors", "model-00001-of-00002.safetensors", "model-00001-of-00002-2.safetensors"],
    ],
)
def test_shards_of_any_name_and_the_branch_are_all_in_the_export(checkpoint: Path, tmp_path: Path, names: list[str]):
    adapter, base = converted(checkpoint, tmp_path)
    rename_shards(base, names)
    out = export_reference_checkpoint(adapter, base, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(out / name) for name in set(index.values())}
    assert {key: name for name, tensors in files.items() for key in tensors} == index
    assert sum(map(len, files.values())) == len(index)
    assert not (out / "model.safetensors").exists(), "transformers would take it for the whole model"
    assert equal(
        {key: tensor for tensors in files.values() for key, tensor in tensors.items()}, tensors_of(checkpoint)
    )
    assert len({name.lower() for name in files}) == len(files), "also where upper and lower case are the same"


def test_a_base_with_the_branch_or_a_tensor_twice_is_refused(checkpoint: Path, tmp_path: Path):
    adapter, base = converted(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="of the adapter's tensors itself, such as"):
        export_reference_checkpoint(adapter, checkpoint, tmp_path / "out")
    rename_shards(base, ["a.safetensors", "b.safetensors"])
    twice = {**load_file(base / "b.safetensors"), "lm_head.weight": torch.zeros(1)}
    save_file(twice, base / "b.safetensors")
    save_file({**load_file(base / "a.safetensors"), "lm_head.weight": torch.zeros(1)}, base / "a.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is in two shards of .*, a\.safetensors and b\.safetensors"):
        export_reference_checkpoint(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_copied_is_not_exported(checkpoint: Path, tmp_path: Path, monkeypatch):
    adapter, base = converted(checkpoint, tmp_path)

    def copy_something_else(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        if source.suffix == ".safetensors":
            save_file({"other": torch.zeros(1)}, target)

    monkeypatch.setattr(shutil, "copyfile", copy_something_else)
    with pytest.raises(ValueError, match="would not hold each tensor once"):
        export_reference_checkpoint(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_a_link_that_leaves_the_base_is_refused(checkpoint: Path, tmp_path: Path, name: str):
    adapter, base = converted(checkpoint, tmp_path)
    (base / name).rename(tmp_path / "elsewhere")
    (base / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=rf"{name} is a link to .*elsewhere, outside .*put a copy in the link's place"
    ):
        export_reference_checkpoint(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_and_to_a_whole_folder_are_followed(checkpoint: Path, tmp_path: Path):
    """A snapshot links to blobs of its model, which may be links to blobs that models share."""
    adapter, base = converted(checkpoint, tmp_path)
    cache = tmp_path / "hub"
    snapshot, blobs, shared = (
        cache / name for name in ("models--a--b/snapshots/123", "models--a--b/blobs", "blobs/ab")
    )
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(shared / f"{number}")
        (blobs / f"etag-{number}").symlink_to(Path("../../blobs/ab") / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"etag-{number}")
    (tmp_path / "link").symlink_to(snapshot)
    out = export_reference_checkpoint(adapter, tmp_path / "link", tmp_path / "out")
    assert equal(tensors_of(out), tensors_of(checkpoint))
    assert not any(path.is_symlink() for path in out.iterdir())


def test_an_export_through_links_stays_in_its_folder(checkpoint: Path, tmp_path: Path):
    adapter, base = converted(checkpoint, tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "real" / "model-pvm.safetensors").symlink_to(tmp_path / "elsewhere")
    export_reference_checkpoint(adapter, base, tmp_path / "out")
    assert equal(tensors_of(tmp_path / "real"), tensors_of(checkpoint))
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / "out").is_symlink()
    (tmp_path / "to-the-base").symlink_to(base)
    with pytest.raises(ValueError, match="is left as it is"):
        export_reference_checkpoint(adapter, base, tmp_path / "to-the-base")


@pytest.mark.parametrize("shards", [(1, 3), (3, 1)])
def test_a_model_of_other_shards_is_replaced_with_all_its_files(golden, tmp_path: Path, shards: tuple[int, int]):
    """Else transformers would go on loading the old `model.safetensors`."""
    old, new = (write_checkpoint(golden, tmp_path / f"theirs-{count}", count) for count in shards)
    for theirs in (old, new):
        convert_reference_checkpoint(theirs, tmp_path / "adapter", base_dir=tmp_path / "base")
    convert_reference_checkpoint(new, tmp_path / "adapter", base_dir=tmp_path / "fresh")
    assert {path.name for path in (tmp_path / "base").iterdir()} == {
        path.name for path in (tmp_path / "fresh").iterdir()
    }


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ".."}}', "{"])
def test_an_index_that_is_none_is_refused(checkpoint: Path, tmp_path: Path, index: str):
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json (has no weight_map|names \['\.\.'\]|is damaged or not JSON)"):
        convert_reference_checkpoint(checkpoint, tmp_path / "adapter")

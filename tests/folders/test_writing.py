"""Saving is all or nothing: whenever it is cut off, the folder holds the old adapter or the new one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fresh
import pytest
import torch
from forwards import logits
from fresh import needs_fork
from methods_under_test import METHODS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from tiny_vlms import FAMILIES, TinyVLM
from transformers import AutoModelForImageTextToText, PreTrainedModel

from peft_pvm import PVMConfig
from peft_pvm.folders.writing import written_whole


ROWS = ("t4 i t3 i t6",)
BUILD = """
import os, shutil, sys
from methods_under_test import METHODS
from safetensors import safe_open
from tiny_vlms import FAMILIES, TinyVLM

from peft import get_peft_model
writers = dict(PeftModel=FAMILIES["llava"].build(), transformers=FAMILIES["llava"].build())
config = METHODS["pvm"].config(layers_to_transform=[0], init_weights=False)
writers["PeftModel"] = get_peft_model(writers["PeftModel"], config)
writers["transformers"].add_adapter(config)
"""
# Everything that moves something on the disk is counted: the files' coming, the old configuration's going, ...
DIE_AT_EACH_STEP = """
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == stop_at:
            os._exit(9)
        return function(*args, **kwargs)
    return call

os.replace, os.unlink, os.fsync = counted(os.replace), counted(os.unlink), counted(os.fsync)
for name, model in writers.items():
    for stop_at in range(1, 60):
        folder = f"{sys.argv[1]}/{name}/{stop_at}/adapter"
        shutil.copytree(sys.argv[1] + "/old", folder)
        calls = 0
        process = os.fork()
        if process == 0:
            calls = 0
            model.save_pretrained(folder)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            break
"""


def save_old(folder: Path) -> None:
    """An adapter of other layers than the new one, so that a mixture of the two does not load."""
    METHODS["pvm"].attach(FAMILIES["llava"].build(), layers_to_transform=[1, 2]).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")


def layers_in(folder: Path) -> list[int]:
    """Which adapter the folder holds. None, or half of one, fails."""
    loaded = PeftModel.from_pretrained(FAMILIES["llava"].build(), folder)
    return loaded.peft_config["default"].layers_to_transform


@needs_fork
def test_a_process_that_dies_while_saving(tmp_path: Path):
    """At every single step in turn, of both ways to save."""
    save_old(tmp_path / "old")
    fresh.run(BUILD + DIE_AT_EACH_STEP, tmp_path)  # which has only one thread to be forked
    for writer in ("PeftModel", "transformers"):
        steps = sorted((tmp_path / writer).iterdir(), key=lambda path: int(path.name))
        assert 10 < len(steps) < 59
        assert all((step / "adapter" / "notes.txt").read_text() == "mine" for step in steps)
        found = [layers_in(step / "adapter") for step in steps]
        new = found.index([0])
        assert found == [[1, 2]] * new + [[0]] * (len(steps) - new)
    assert not list(tmp_path.rglob(".*")), "the next to read has cleared it up"


def test_an_error_while_writing_leaves_the_old_one(tmp_path: Path):
    folder = tmp_path / "adapter"
    METHODS["pvm"].attach(FAMILIES["llava"].build(), layers_to_transform=[1]).save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write() -> None:
        with written_whole(folder) as staged:
            (staged / "adapter_config.json").write_text("{}")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_earlier_versions_left_is_removed(tmp_path: Path):
    """Beside the folder, unless it is of another folder or somebody may still be writing to it."""
    for name, inner in {"dead": "adapter", "other": "other", "living": "adapter"}.items():
        file = tmp_path / f".unfinished-{name}" / inner / "adapter_model.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        for path in (file, *file.parents[:2]) if name != "living" else ():
            os.utime(path, (time.time() - 3600,) * 2)
    METHODS["pvm"].attach(FAMILIES["llava"].build()).save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-living", ".unfinished-other", "adapter"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_card_that_a_person_wrote_stays(tmp_path: Path, when: str, monkeypatch):
    """To the byte: PEFT would add its own lines."""
    model = METHODS["pvm"].attach(FAMILIES["llava"].build())
    model.save_pretrained(tmp_path)
    assert "Written by peft-pvm" in (tmp_path / "README.md").read_text()
    written = "# Mine\n"
    if when == "before":
        (tmp_path / "README.md").write_text(written)
    else:
        save = PVMConfig.save_pretrained
        monkeypatch.setattr(
            PVMConfig,
            "save_pretrained",
            lambda *args, **kwargs: (save(*args, **kwargs), (tmp_path / "README.md").write_text(written)),
        )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == written


def test_sub_folders_of_others_are_not_touched(tmp_path: Path):
    model = METHODS["pvm"].attach(FAMILIES["llava"].build())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    before = (tmp_path / "notes").stat().st_mtime_ns
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes").stat().st_mtime_ns == before


def test_pickles_are_refused(tmp_path: Path):
    """Adapters of others are PEFT's affair."""
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    with pytest.raises(ValueError, match="safe_serialization=False would save default as a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="safe_serialization=False would save default as a pickle"):
        model.save_pretrained(tmp_path, False)
    assert not list(tmp_path.iterdir())
    model = get_peft_model(FAMILIES["llava"].build(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path):
    """transformers would cut the adapter into shards, which nobody reads, and ignores `safe_serialization`."""
    base = FAMILIES["llava"].build()
    inject(base, PVMConfig(r=32), "pvm")
    try:
        base.save_pretrained(tmp_path / "whole")
    except ValueError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="Leave out max_shard_size and distributed_checkpoint"):
        base.save_pretrained(tmp_path / "other", max_shard_size="5KB")
    with pytest.raises(ValueError, match="safe_serialization=False would save pvm as a pickle"):
        base.save_pretrained(tmp_path / "other", safe_serialization=False)
    assert not (tmp_path / "other").exists()


@needs_fork
def test_a_reader_finds_a_configuration_while_others_save(tmp_path: Path):
    """One of the two, at any time, though it goes and comes again hundreds of times."""
    program = """
import os, signal, sys
from peft import PeftConfig
from peft_pvm import DIPEConfig

folder, reader = sys.argv[1], os.getpid()
layers = [[0], [1, 2]]
DIPEConfig(layers_to_transform=layers[0]).save_pretrained(folder)
saver = os.fork()
if saver == 0:
    number = 0
    while os.getppid() == reader:
        DIPEConfig(layers_to_transform=layers[number % 2]).save_pretrained(folder)
        number += 1
    os._exit(0)
found = []
while len(found) < 100 or min(map(found.count, layers)) <= 5:
    found.append(PeftConfig.from_pretrained(folder).layers_to_transform)
    assert found[-1] in layers
os.kill(saver, signal.SIGKILL)
os.waitpid(saver, 0)
"""
    fresh.run(program, tmp_path)


def inject(model: PreTrainedModel, config: PeftConfig, name: str) -> None:
    """As `add_adapter` does, which some versions of transformers refuse with some of PEFT."""
    inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True


def test_several_adapters_and_a_bare_folder_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32), "one")
    model.add_adapter("two", PVMConfig(r=16))
    model.save_pretrained("adapters")
    for name in ("one", "two"):
        assert PeftModel.from_pretrained(FAMILIES["llava"].build(), f"adapters/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_other_ranks_write_nothing(tmp_path: Path):
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    model.save_pretrained(tmp_path / "adapter")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    model.save_pretrained(tmp_path / "adapter", True, None, "auto", False)  # the same by position
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_models_without_our_adapters_go_the_old_way(tmp_path: Path):
    """Also a whole base model, which must not be written twice."""
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, *ROWS)
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "base"), inputs), logits(model, inputs))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32)).save_pretrained(tmp_path / "file")


def test_embeddings_of_the_base_are_not_saved_along(tiny: TinyVLM, tmp_path: Path):
    """No adapter could be loaded from such a file."""
    model = METHODS["pvm"].attach(tiny.build())
    with pytest.raises(ValueError, match="save_embedding_layers=True would write the base's embeddings"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not (tmp_path / "adapter").exists()


def test_nor_after_the_vocabulary_was_changed(tmp_path: Path):
    """PEFT adds them by itself where the base's configuration differs from that in its folder."""
    FAMILIES["paligemma"].build().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    base.config.vocab_size += 8
    METHODS["pvm"].attach(base).save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        assert all(".pvm." in key for key in tensors.keys())  # noqa: SIM118

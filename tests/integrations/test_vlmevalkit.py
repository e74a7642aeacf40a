"""The driver for VLMEvalKit, with a stand-in for it: a registry of models, and a `run.py` that builds one by name.

The stand-in shows what the driver does, not that it is all that VLMEvalKit wants.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from methods_under_test import METHODS
from tiny_vlms import FAMILIES

from peft_pvm.tuners.active import acting_adapters


DRIVER = Path(__file__).parents[2] / "examples" / "vlmevalkit.py"
CONFIG = """
from functools import partial
from transformers import AutoModelForImageTextToText

class Chat:
    def __init__(self, model_path, use_vllm=False):
        self.model = None if use_vllm else AutoModelForImageTextToText.from_pretrained(model_path)

class Api:
    pass

supported_VLM = {
    "Tiny": partial(Chat, model_path=FOLDER),
    "Served": partial(Chat, model_path=FOLDER, use_vllm=True),
    "Far": partial(Api),
}
"""
RUN = """
import argparse
from vlmeval.config import supported_VLM
parser = argparse.ArgumentParser()
parser.add_argument("--model", nargs="+")
parser.add_argument("--data", nargs="+")
arguments = parser.parse_args()
for name in arguments.model:
    built = supported_VLM[name]()
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = FAMILIES["llava"].build()
    base.save_pretrained(tmp_path / "base")
    for method in ("pvm", "dipe"):
        METHODS[method].attach(FAMILIES["llava"].build()).save_pretrained(tmp_path / method)
    METHODS["pvm"].attach(FAMILIES["qwen3_5"].build(), layers_to_transform=[3]).save_pretrained(tmp_path / "deeper")
    kit = tmp_path / "kit"
    (kit / "vlmeval").mkdir(parents=True)
    (kit / "vlmeval" / "__init__.py").touch()
    (kit / "vlmeval" / "config.py").write_text(f"FOLDER = {str(tmp_path / 'base')!r}\n{CONFIG}")
    (kit / "run.py").write_text(RUN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield kit
    for name in ("vlmeval", "vlmeval.config"):
        sys.modules.pop(name, None)


def drive(kit: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    given = ["--kit", str(kit), *options, "--data", "MMStar"]
    monkeypatch.setattr(sys, "argv", ["vlmevalkit.py", *given])
    seen: dict = {}
    run_path = runpy.run_path

    def listen(path: str, run_name: str) -> dict:
        seen.update(run_path(path, run_name=run_name))
        return seen

    monkeypatch.setattr(runpy, "run_path", listen)
    exec(compile(DRIVER.read_text(), str(DRIVER), "exec"), {"__name__": "__main__", "__doc__": None})
    return seen


@pytest.mark.parametrize("model", ["Tiny", "Served"])
def test_adapters_are_on_the_model_that_is_run(kit: Path, monkeypatch: pytest.MonkeyPatch, model: str):
    adapters = [option for name in ("pvm", "dipe") for option in ("--adapter", str(kit.parent / name))]
    seen = drive(kit, monkeypatch, "--model", model, *adapters)
    assert seen["name"] == f"{model}+pvm+dipe"
    assert seen["arguments"].data == ["MMStar"]
    assert acting_adapters(seen["built"].model) == ["pvm", "dipe"]
    assert not seen["built"].model.training


def test_what_cannot_be_driven_is_said(kit: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = ("--adapter", str(kit.parent / "pvm"))
    for options, message in (
        (("--model", "Huge", *adapter), "has no model 'Huge'"),
        (("--model", "Far", *adapter), "keeps no model of transformers"),
    ):
        with pytest.raises(SystemExit, match=message):
            drive(kit, monkeypatch, *options)
    with pytest.raises(ValueError, match="does not fit"):
        drive(kit, monkeypatch, "--model", "Tiny", "--adapter", str(kit.parent / "deeper"))
    with pytest.raises(SystemExit, match=r"There is no .*run\.py"):
        drive(kit.parent, monkeypatch, "--model", "Tiny", *adapter)

"""`peft-pvm layers`, `calibrate` and `sinks` on the lab's tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


pytest.importorskip("typer", reason="the command line needs the extra `lab`")
pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")
pytest.importorskip("datasets", reason="rows of data need the extra `train`")

from processors import PROCESSORS
from tiny_vlms import FAMILIES
from typer.testing import CliRunner

from peft_pvm.cli.app import app
from peft_pvm.demo.for_trainers import make_chats, save_as_folder, write_chats
from peft_pvm.demo.tiny_vlm import load_tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proposals")
    save_as_folder(load_tiny_vlm(), folder / "model")
    FAMILIES["llava"].build().save_pretrained(folder / "llava")
    PROCESSORS["llava"]().save_pretrained(folder / "llava")
    chats = make_chats("messages", 6, 0, "test")
    write_chats(chats, folder / "chats")
    write_chats(make_chats("messages", 2, 0, "test"), folder / "validated", "validation")
    write_chats(make_chats("prompts", 2, 0, "test"), folder / "prompts")
    write_chats(chats.map(lambda row: {"images": []}), folder / "blind")
    write_chats(chats.select([]), folder / "empty")
    return folder


def run(folder: Path, command: str, *options: str, model: str = "model", data: str = "chats"):
    arguments = [command, "--model", str(folder / model), "--data", str(folder / data), *options]
    return CliRunner().invoke(app, arguments)


def test_layers_are_proposed_with_a_reason(folder: Path):
    done = run(folder, "layers", "--rows", "3")
    assert done.exit_code == 0, done.output
    assert "Before an answer, attention on the image is highest in layer" in done.stdout
    chosen = [int(row[1]) for row in re.finditer(r"│ (\d) +│ 0\.\d{4} +│ \* +│", done.stdout)]
    assert f"PVMConfig(layers_to_transform={chosen})" in done.stdout
    as_json = json.loads(run(folder, "layers", "--rows", "3", "--json").stdout)
    assert as_json["layers"] == chosen
    assert list(as_json["shares"]) == [str(layer_idx) for layer_idx in range(6)]
    assert len(json.loads(run(folder, "layers", "--count", "5", "--rows", "1", "--json").stdout)["layers"]) == 5


def test_a_limit_is_proposed_with_every_loss(folder: Path):
    options = "--rows", "4", "--lengths", "0,512", "--max-distances", "16,0"
    done = run(folder, "calibrate", *options)
    assert done.exit_code == 0, done.output
    written = json.loads(run(folder, "calibrate", *options, "--json").stdout)
    assert written["max_distance"] == 16
    assert f"{written['reason']}\n" in done.stdout
    assert [(entry["max_distance"], entry["length"]) for entry in written["answers"]] == [
        (limit, length) for limit in (None, 16, 0) for length in (0, 512)
    ]
    assert {len(entry["losses"]) for entry in written["answers"]} == {4}
    (marked,) = re.findall(r"│ (.+?) \* +│", done.stdout)
    assert marked == "16"


def test_channels_are_proposed_with_a_reason(folder: Path):
    done = run(folder, "sinks", "--rows", "2", "--tau", "2")
    assert done.exit_code == 0, done.output
    chosen = sorted(int(row[1]) for row in re.finditer(r"│ (\d+) +│ \d\.\d +│ \* +│", done.stdout))
    assert f"VARConfig(sink_channels={chosen}, tau=2)" in done.stdout
    as_json = json.loads(run(folder, "sinks", "--rows", "2", "--tau", "2", "--json").stdout)
    assert as_json["channels"] == chosen
    none = run(folder, "sinks", "--rows", "2")
    assert "No channel is above 20 at the first token" in none.stdout
    assert "VARConfig" not in none.stdout


def test_another_split_and_another_family(folder: Path):
    done = run(folder, "layers", "--split", "validation", "--json", model="llava", data="validated")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"] == [0, 1, 2]


@pytest.mark.parametrize("command", ["layers", "calibrate", "sinks"])
def test_errors_say_what_is_wrong(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*args, **kwargs):
        raise AssertionError("The weights are loaded.")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", load)

    def error(*options: str, **sources: str) -> str:
        done = run(folder, command, *options, **sources)
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code in (1, 2)
        return done.stderr[done.stderr.index("Error: ") :]

    assert f"There is no folder or file {folder / 'nowhere'}. Check the path." in error(data="nowhere")
    assert (
        "peft-pvm lab save-base tiny"
        in CliRunner().invoke(app, [command, "--model", "tiny", "--data", "chats"]).stderr
    )
    assert f"There is no folder or file {folder / 'nowhere'}. Check the path." in error(model="nowhere")
    assert "blind: No row of the data set has an image" in error(data="blind")
    assert "empty: No row of the data set has an image" in error(data="empty")
    assert "does not end with an answer of the assistant" in error(data="prompts")
    assert "'images', 'prompt', 'solution'" in error(data="prompts")
    assert "model: Couldn't cast" in error(data="model")
    assert "Available splits: ['train']" in error("--split", "test")
    assert "'nowhere' cannot be used" in error("--device", "nowhere")
    assert "'float12' is not one of 'auto'" in error("--dtype", "float12")
    assert "--attn-implementation" in error("--attn-implementation", "nope")


def test_numbers_out_of_range_are_refused(folder: Path):
    assert "7 is more than the 6 layers" in run(folder, "layers", "--count", "7").stderr
    assert "takes at least 2 rows" in run(folder, "calibrate", "--rows", "1").stderr
    assert "'-1' must be whole numbers" in run(folder, "calibrate", "--max-distances", "-1").stderr
    assert "'x' must be whole numbers" in run(folder, "calibrate", "--lengths", "x").stderr
    assert "VARConfig.tau is 0.0, but must be a number above 0" in run(folder, "sinks", "--tau", "0").stderr
    assert "the model has 8,192 positions" in run(folder, "calibrate", "--lengths", "9000").stderr

"""The commands of `python -m experiments` run, with as little to do as they take."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from language_models import tiny_language_model
from typer.testing import CliRunner

from experiments import anchors, pvm_limits
from experiments.commands import app
from experiments.real.methods import METHODS as REAL_METHODS
from experiments.real.methods import Training
from experiments.runs import MAIN_RECIPE, RECIPES, evaluate_method
from experiments.tdrs_readings import READINGS
from peft_pvm.demo.mosaic import FIRST_QUERY, IMAGE_LENGTH, VISION_START
from peft_pvm.demo.recall import recall
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe


REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_readings():
    rows = [line for line in run("readings", "--rows", 1).splitlines() if line.count("±") == 3]
    assert [line.strip("│").split("│")[0].strip() for line in rows] == list(READINGS)


def test_anchors(tmp_path, monkeypatch):
    """In a chat, what is right by image is lost by run, also where the base has the answer to the second mosaic."""
    monkeypatch.setattr(anchors, "LENGTHS", (256,))
    output = run("anchors", "--rows", 2, "--split", "validation", "--out", tmp_path / "anchors.json")
    rows = [line.strip("│").split("│")[0].strip() for line in output.splitlines() if line.count("±") == 1]
    assert rows == list(anchors.ANCHORS) * 4
    written = json.loads((tmp_path / "anchors.json").read_text())
    right = {
        name: sum(forms["chat, about the first mosaic"]["256"]) for name, forms in written["right in each row"].items()
    }
    assert right["limited, by image"] > 12 > 8 > right["limited, by run"]


def test_a_chat_holds_what_it_says():
    """Tokens in their order, and the right answers: the tiny model gives them where nothing stands between."""
    length = 5
    batch = anchors.make_chat("validation", 3, length, 1, torch.Generator().manual_seed(0))
    ids = batch.inputs["input_ids"]
    assert ids.shape == (3, 2 * IMAGE_LENGTH + 3 * length + 2 + 15)
    assert (ids[:, [0, IMAGE_LENGTH + 2 * length + 2]] == VISION_START).all()
    asked = batch.inputs["logits_to_keep"]
    assert torch.equal(ids[:, asked[:-1] + 1], batch.targets[:, :-1])
    assert (ids[:, asked] >= FIRST_QUERY).all()
    assert anchors.recall_in_chat(load_tiny_vlm(), 0, 4, 0, "validation", 0).value > 0.9


def test_limits(monkeypatch):
    monkeypatch.setattr(pvm_limits, "LENGTHS", (16, 64))
    adapter = REPOSITORY / "adapters" / "pvm-tiny-vlm"
    rows = [line.strip("│").split("│") for line in run("limits", adapter, "--rows", 4).splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == [
        *(f"cell known to the query, layer {layer_idx}" for layer_idx in (1, 3, 4)),
        "digit readable from its embedding",
        "cell found",
        "right",
        "right where found",
        "right where not",
    ]
    assert all(len(row) == 3 for row in rows)


def test_train_base(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.commands.recall", lambda model, length: recall(model, length, rows=1))
    output = run("train-base", "--steps", 1, "--out", tmp_path / "base.safetensors")
    assert "Accuracy after 2048 bytes" in output
    load_tiny_vlm(tmp_path / "base.safetensors")


@pytest.mark.parametrize("method", ["pvm", "dipe"])
def test_train_eval_and_report(method, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.runs.LENGTHS", (0, 64))
    monkeypatch.setattr("experiments.runs.SEVERAL_IMAGES_LENGTHS", (0,))
    monkeypatch.setattr("experiments.runs.WRITTEN_CELLS", 9)
    monkeypatch.setattr("experiments.commands.evaluate_method", functools.partial(evaluate_method, rows=1))
    monkeypatch.setitem(RECIPES, MAIN_RECIPE, Recipe(steps=1, hidden_steps=0))
    options = ("--method", method, "--recipe", MAIN_RECIPE, "--seed", 1, "--runs", tmp_path / "runs")
    assert len(run("train", *options).splitlines()) == (method == "pvm")
    run("eval", *options, "--results", tmp_path / "results")
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text())["method"] == method
    run("report", "--results", tmp_path / "results", "--docs", tmp_path)
    assert (tmp_path / "results.md").is_file()


def test_the_real_base_from_training_to_results(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.real.commands.load_language_model", lambda gguf: tiny_language_model())
    trained, base = tmp_path / "trained.safetensors", tmp_path / "base"
    gguf = ("--gguf", tmp_path / "not-read.gguf")
    run("train-real-base", *gguf, "--out", trained, "--steps", 1, "--seeing-steps", 1)
    run("real-base", *gguf, "--out", base, "--from-trained", trained)
    options = ("--base", base, "--method", "base", "--method", "dipe-64", "--task", "three-turns")
    options = (*options, "--lengths", "0,5", "--rows", 2)
    lora = replace(REAL_METHODS["lora"], training=Training(steps=1, max_text=4, rows=1))
    monkeypatch.setitem(REAL_METHODS, "lora", lora)
    runs, trained_lora = ("--training-seed", 1, "--runs", tmp_path / "runs"), tmp_path / "runs" / "lora.seed1"
    assert run("real-train", "--base", base, "--method", "lora", *runs).strip() == str(trained_lora)
    output = run("real-eval", *options, "--method", "lora", *runs, "--results", tmp_path / "results")
    rows = [line for line in output.splitlines() if line.count("±") == 2]
    assert [line.strip("│").split("│")[0].strip() for line in rows] == ["base", "dipe-64", "lora.seed1"]
    files = {path.stem for path in (tmp_path / "results" / "three-turns").iterdir()}
    assert files == {"base", "dipe-64", "lora.seed1"}
    export = ("--base", base, "--adapter", trained_lora / "lora", "--trained-by", "a command")
    run("real-export", *export, "--results", tmp_path / "results", "--out", tmp_path / "shared")
    assert "Measured before rounding." in (tmp_path / "shared" / "lora" / "README.md").read_text()


def test_real_chats(tmp_path):
    pytest.importorskip("datasets", reason="chats need the extra `train`")
    tiny_language_model().tokenizer.save_pretrained(tmp_path / "base")
    run("real-chats", "--base", tmp_path / "base", "--out", tmp_path / "chats", "--rows", 2, "--max-text", 4)
    assert [path.name for path in (tmp_path / "chats").glob("*.parquet")] == ["train.parquet"]


def test_step_time():
    assert "221,763" in run("step-time", "--rows", 1, "--text-tokens", 8, "--repeats", 1)


def test_the_page_of_the_lab_has_every_command_and_option():
    page = (REPOSITORY / "docs" / "lab.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        (row,) = re.findall(rf"^\| `{name}[` ].*", page, re.MULTILINE)
        missing = [parameter.opts[0] for parameter in command.params if f"`{parameter.opts[0]}" not in row]
        assert missing == [], name


def test_it_is_a_command_line_of_its_own():
    called = [sys.executable, "-m", "experiments", "train", "--method", "none"]
    done = subprocess.run(called, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Invalid value for '--method': 'none' is not one of base, lora")
    assert done.stderr.endswith("See python -m experiments train --help.\n")

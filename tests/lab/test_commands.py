"""The lab's commands run, with as little to do as they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_pvm.cli.lab import app
from peft_pvm.lab import experiment, limits
from peft_pvm.lab.readings import READINGS
from peft_pvm.lab.tiny_vlm import load_tiny_vlm


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_demo(tmp_path):
    output = run("demo", "--steps", 2, "--rows", 1, "--out", tmp_path)
    assert "training 221,763 of" in output
    header = next(line for line in output.splitlines() if "DIPE" in line)
    assert [name.strip() for name in header.strip("┃").split("┃")[1:]] == ["base", "PVM", "DIPE", "T-DRS"]
    rows = [line for line in output.splitlines() if line.count("±") == 4]
    assert [int(row.strip("│").split("│")[0]) for row in rows] == [0, 64, 128, 256, 512, 1024, 2048]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_readings():
    rows = [line for line in run("readings", "--rows", 1).splitlines() if line.count("±") == 3]
    assert [line.strip("│").split("│")[0].strip() for line in rows] == list(READINGS)


def test_limits(monkeypatch):
    monkeypatch.setattr(limits, "LENGTHS", (16, 64))
    adapter = Path(__file__).parents[2] / "adapters" / "pvm-tiny-vlm"
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


def test_train_base(tmp_path):
    output = run("train-base", "--steps", 1, "--out", tmp_path / "base.safetensors")
    assert "Accuracy after 2048 bytes" in output
    load_tiny_vlm(tmp_path / "base.safetensors")


@pytest.mark.parametrize("method", ["pvm", "dipe"])
def test_train_eval_and_report(method, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LENGTHS", (0, 64))
    monkeypatch.setattr(experiment, "WRITTEN_CELLS", 9)
    monkeypatch.setitem(experiment.RECIPES, experiment.MAIN_RECIPE, experiment.Recipe(steps=1, hidden_steps=0))
    options = ("--method", method, "--recipe", experiment.MAIN_RECIPE, "--seed", 1, "--runs", tmp_path / "runs")
    assert len(run("train", *options).splitlines()) == (method == "pvm")
    run("eval", *options, "--results", tmp_path / "results")
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text())["method"] == method
    run("report", "--results", tmp_path / "results", "--docs", tmp_path)
    assert (tmp_path / "results.md").is_file()

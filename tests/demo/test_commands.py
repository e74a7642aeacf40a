"""The commands `peft-pvm lab` run, with as little to do as they take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from language_models import tiny_language_model
from peft import PeftConfig
from typer.testing import CliRunner

from experiments.real.vlm import new_vlm, save_vlm
from peft_pvm import DIPEConfig, attached
from peft_pvm.cli.lab import app
from peft_pvm.methods import METHODS


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tested: list[PeftConfig] = []

    def noting(model: torch.nn.Module, *configs: PeftConfig):
        tested.extend(configs)
        return attached(model, *configs)

    monkeypatch.setattr("peft_pvm.demo.recall.attached", noting)
    output = run("demo", "--steps", 2, "--rows", 1, "--out", tmp_path)
    assert "training 221,763 of" in output
    tested_here = [row.name for row in METHODS if row.acts_in_forwards and not row.of_the_model]
    header, *rows = (line.split()[1:-1] for line in output.splitlines() if re.match(r"┃.*2,048|│.*\d", line))
    assert [column for column in header if column != "┃"] == ["0", "64", "128", "256", "512", "1,024", "2,048"]
    assert [row[0] for row in rows] == ["base", *tested_here]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert [config.max_distance for config in tested if isinstance(config, DIPEConfig)] == [24], "as it was trained"


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by folder"])
def test_recall_of_a_base_that_speaks(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    language_model, base = tiny_language_model(), tmp_path / "runs" / "real" / "base"
    save_vlm(new_vlm(language_model), language_model, base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_pvm.demo.recall.LENGTHS_IN_TOKENS", (0, 7))
    output = run("recall", "--base", "real" if by_name else base, "--rows", 1)
    assert "by tokens of text in between" in " ".join(output.split())
    assert re.search(r"│ base │ +\d+ │ +\d+ │", output), "one row has no standard error"


def test_an_adapter_that_is_not_there_is_named_before_a_base_is_loaded(monkeypatch: pytest.MonkeyPatch):
    def load(*args: object, **kwargs: object):
        raise AssertionError("The weights are loaded.")

    monkeypatch.setattr("peft_pvm.demo.recall.load_tiny_vlm", load)
    done = CliRunner().invoke(app, ["recall", "adapters/pvm-tiny-vlm+nowhere"])
    assert done.exit_code == 1
    assert "nowhere" in done.stderr

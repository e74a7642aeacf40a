"""The commands `peft-pvm lab` run, with as little to do as they take."""

from __future__ import annotations

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
    header = next(line for line in output.splitlines() if "DIPE" in line)
    assert [name.strip() for name in header.strip("┃").split("┃")[1:]] == ["base", *tested_here]
    rows = [line for line in output.splitlines() if line.count("±") == 1 + len(tested_here)]
    assert [int(row.strip("│").split("│")[0]) for row in rows] == [0, 64, 128, 256, 512, 1024, 2048]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert [config.max_distance for config in tested if isinstance(config, DIPEConfig)] == [24], "as it was trained"


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by folder"])
def test_recall_of_a_base_that_speaks(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    language_model, base = tiny_language_model(), tmp_path / "runs" / "real" / "base"
    save_vlm(new_vlm(language_model), language_model, base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_pvm.demo.recall.LENGTHS_IN_TOKENS", (0, 7))
    output = run("recall", "--base", "real" if by_name else base, "--rows", 1)
    assert "tokens of text between" in output
    assert len([line for line in output.splitlines() if line.count("±") == 1 and "│" in line]) == 2

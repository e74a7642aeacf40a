"""A fixed number of damaged folders, the same in every run."""

from __future__ import annotations

from pathlib import Path

from fuzz.harness import Harness


FOLDERS = 300


def test_damaged_folders(tmp_path: Path):
    report = Harness(tmp_path).run(FOLDERS, seed=0)
    assert not report.faults, "\n".join(report.faults)
    assert min(report.outcomes[outcome] for outcome in ("loaded", "refused")) > FOLDERS / 20

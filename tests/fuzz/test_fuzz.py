"""A fixed number of damaged folders, the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_vlms import REPRESENTATIVE

from fuzz.harness import Harness


FOLDERS = 40


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_damaged_folders(family: str, tmp_path: Path):
    report = Harness(tmp_path, family).run(FOLDERS, seed=0)
    assert not report.faults, "\n".join(report.faults)
    assert min(report.outcomes[outcome] for outcome in ("loaded", "refused")) > FOLDERS / 20


def test_a_changed_base_would_be_noticed(tmp_path: Path):
    harness = Harness(tmp_path)
    model = harness.base
    harness._check_base(model)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(AssertionError, match=r"tensors of the base were changed: \['lm_head.weight'\]"):
        harness._check_base(model)

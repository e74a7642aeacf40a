"""The leaderboard: the same bytes from the same results, with what hurt as plain as what helped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")

from experiments.leaderboard import read_comparisons, render, write_leaderboard
from peft_pvm.compare.contenders import BASE
from peft_pvm.compare.statistics import HELPS, HURTS


REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "experiments" / "results" / "leaderboard"


def test_the_page_in_the_repository_is_that_of_its_results():
    assert render(read_comparisons(RECORDED)) == (REPOSITORY / "docs" / "leaderboard.md").read_text()


def test_the_same_bytes_from_the_same_results(tmp_path: Path):
    written = []
    for name in ("first", "second"):
        page = write_leaderboard(RECORDED, tmp_path / name)
        pictures = sorted((page.parent / "figures").iterdir())
        written.append([page.read_bytes(), *(picture.read_bytes() for picture in pictures)])
        assert len(pictures) == len(read_comparisons(RECORDED))
    assert written[0] == written[1]


def test_every_verdict_is_on_the_page():
    comparisons = read_comparisons(RECORDED)
    page = render(comparisons)
    summary = page.partition("## What helped and what hurt")[2].partition("\n## ")[0]
    for comparison in comparisons.values():
        for (name, length), found in comparison.findings.items():
            if name != BASE and found.verdict in (HELPS, HURTS):
                row = next(line for line in summary.splitlines() if line.startswith(f"| {name} ("))
                assert re.search(rf"{found.verdict} at [\d, ]*\b{length:,}", row)
        for name, kind in ((name, settings["kind"]) for name, settings in comparison.contenders.items()):
            assert f"{name} ({kind})" in page or kind == "method"


def test_what_hurts_is_said(tmp_path: Path):
    """A recorded comparison in which a method never answers right."""
    (path, *_) = sorted(RECORDED.glob("*.json"))
    content = json.loads(path.read_text())
    name = next(name for name, settings in content["contenders"].items() if settings["kind"] == "method")
    for cell in content["answers"][name].values():
        cell["right"] = [0] * len(cell["right"])
    content["refused"] = {"nobody": "because"}
    (tmp_path / path.name).write_text(json.dumps(content))
    page = render(read_comparisons(tmp_path))
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} (method) |")]
    assert "hurts at 0" in row
    assert "nobody refused the model: because" in page


def test_who_changed_nothing_and_who_had_nothing_to_do_are_said(tmp_path: Path):
    (path, *_) = sorted(RECORDED.glob("*.json"))
    content = json.loads(path.read_text())
    for name, cells in content["answers"].items():
        for cell in cells.values():
            cell["changed"] = [name == "PAI", *[False] * (len(cell["right"]) - 1)]
    content["nothing to do"] = {"VAR": "no channels"}
    (tmp_path / path.name).write_text(json.dumps(content))
    rows = [line for line in render(read_comparisons(tmp_path)).splitlines() if line.endswith("|")]
    assert "| SAVAA (method) | changed nothing |" in rows
    assert "| VAR (method) | nothing to do |" in rows
    assert "| temperature (control) | changed nothing |" in rows
    assert any(row.startswith("| PAI (method) | helps at") for row in rows)


def test_there_must_be_results(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="peft-pvm compare"):
        read_comparisons(tmp_path)

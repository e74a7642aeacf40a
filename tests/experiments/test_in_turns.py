"""Times of an earlier commit and of the code as it is: two processes take turns, and the page shows what they took."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import in_turns
from experiments.in_turns import SHAPES, checked_out, measure, table


REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "experiments" / "results" / "bench" / "in-turns.json"


def has_history() -> bool:
    """Whether git is here and knows this checkout."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return shutil.which("git") is not None and not subprocess.run(command, capture_output=True).returncode


needs_history = pytest.mark.skipif(not has_history(), reason="needs the repository's history")


def worktrees() -> str:
    return subprocess.run(["git", "worktree", "list"], cwd=REPOSITORY, capture_output=True, text=True).stdout


def test_ratios_are_those_of_the_same_round():
    """A machine that is slow in one round is slow for both: now takes half as long as before each time."""
    rounds = [[2.0, 1.0], [8.0, 4.0], [20.0, 10.0]]
    *_, row = table({"measured": {"tiny": {"pvm": {"prefill": rounds, "decode": rounds}}}}).splitlines()
    assert row == "| tiny | pvm | 8,000.0 | 4,000.0 | 0.50 ± 0.00 | 8,000.0 | 4,000.0 | 0.50 ± 0.00 |"


@needs_history
def test_each_process_measures_its_own_code(tmp_path, monkeypatch):
    """The clock of the earlier one is another one here."""
    monkeypatch.setattr(in_turns, "METHODS", ("base", "dipe"))
    monkeypatch.setattr(in_turns, "CONTEXT", 40)
    monkeypatch.setattr(in_turns, "VISUAL_TOKENS", 16)
    used = []

    @contextlib.contextmanager
    def with_another_clock(commit):
        with checked_out(commit) as folder:
            used.append(folder)
            assert str(folder) in worktrees()
            with open(folder / "peft_pvm" / "bench" / "run.py", "a") as code:
                code.write("\ndef seconds(function, device):\n    function()\n    return 1e6\n")
            yield folder

    monkeypatch.setattr(in_turns, "checked_out", with_another_clock)
    found = measure("HEAD", ["tiny"], 2, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    for times in found["measured"]["tiny"].values():
        assert len(times["prefill"]) == len(times["decode"]) == 2
        assert all(then == 1e6 > now > 0 for then, now in (*times["prefill"], *times["decode"]))
    assert not any(str(folder) in worktrees() for folder in used)


@needs_history
def test_a_commit_that_git_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no-such-commit"):
        measure("no-such-commit", ["tiny"], 2, tmp_path / "found.json")
    assert not (tmp_path / "found.json").exists()


def test_the_documentation_shows_the_recorded_table():
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded["measured"]) == set(SHAPES)
    assert table(recorded) in (REPOSITORY / "docs" / "performance.md").read_text()

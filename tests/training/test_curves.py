"""The picture of a training: every number that was logged, and an error in words where there is nothing to draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.cli.app import app
from peft_pvm.integrations.trl import draw_curves, read_log
from peft_pvm.utils import plotting


LOG = [
    {"step": 1, "loss": 2.0},
    {"step": 1, "gaze/gate/default/10": 0.1, "gaze/update/default/10": 0.01, "gaze/gate/default/9": -0.2},
    {"step": 2, "loss": 1.0},
    {"step": 2, "gaze/gate/default/10": 0.3, "gaze/update/default/10": 0.04, "gaze/gate/default/9": -0.5},
]


def test_what_is_drawn(monkeypatch: pytest.MonkeyPatch):
    figures = []
    monkeypatch.setattr(
        "peft_pvm.integrations.trl.as_png", lambda figure: figures.append(figure) or plotting.as_png(figure)
    )
    assert draw_curves(LOG).startswith(b"\x89PNG")
    drawn = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figures[0].axes
    ]
    assert list(drawn[0].values()) == [([1, 2], [2.0, 1.0])]
    assert list(drawn[1].items()) == [("layer 9", ([1, 2], [-0.2, -0.5])), ("layer 10", ([1, 2], [0.1, 0.3]))]
    assert drawn[2] == {"layer 10": ([1, 2], [0.01, 0.04])}
    assert figures[0].axes[0].get_ylabel() == "loss"
    draw_curves([*LOG, {"step": 2, "reward": 0.5}])
    assert figures[1].axes[0].get_ylabel() == "reward"


def test_the_same_bytes():
    assert draw_curves(LOG) == draw_curves(LOG)


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="neither a loss nor a reward"):
        draw_curves([])


def test_command(tmp_path: Path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    result = CliRunner().invoke(app, ["curves", str(tmp_path), "--out", str(tmp_path / "c.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "c.png").read_bytes() == draw_curves(LOG)
    result = CliRunner().invoke(app, ["curves", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "no trainer_state.json" in result.stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"log_history": [3]}', '{"log_history": {"a": 1}}'])
def test_a_damaged_log(tmp_path: Path, content: str):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json (is damaged|does not hold)"):
        read_log(tmp_path)


def test_what_is_no_number_is_not_drawn(tmp_path: Path):
    log = [*LOG, {"step": 3, "loss": "nan", "gaze/gate/default/last": 1.0}, {"loss": 3.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert draw_curves(read_log(tmp_path)) == draw_curves(LOG)

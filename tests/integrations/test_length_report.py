"""Tables and pictures of scores by length, and the command where lmms-eval is missing."""

from __future__ import annotations

import pytest


pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra lab")
pytest.importorskip("typer", reason="the command needs typer, of the extra lab")

from rich.console import Console
from typer.testing import CliRunner

from peft_pvm.cli.app import app
from peft_pvm.cli.options import separated
from peft_pvm.integrations.lmms_eval.report import curves, draw, score_rows, tables
from peft_pvm.utils.plotting import as_png


def row(adapter: str, length: int, value: float, seed: int = 0, metric: str = "accuracy", stderr: float | None = 0.01):
    return dict(adapter=adapter, length=length, seed=seed, task="ai2d", metric=metric, value=value, stderr=stderr)


def result(*scores: dict) -> dict:
    return {"lengths": [4096, 0], "adapters": ["base", "runs/pvm", "runs/pvm+adapters/dipe"], "scores": list(scores)}


SCORES = [row("base", 4096, 0.4), row("base", 0, 0.8), row("runs/pvm", 0, 0.8), row("runs/pvm", 4096, 0.7)]


def test_lmms_evals_results_become_rows():
    results = {
        "ai2d": {
            "alias": "ai2d",
            "exact_match,none": 0.5,
            "exact_match_stderr,none": 0.1,
            "exact_match_stderr_clt,none": 0.2,
            "exact_match,flexible-extract": 0.6,
            "exact_match_stderr,flexible-extract": "N/A",
            "submission,none": None,
            "samples": 3,
        },
        "group": {"alias": "group", " ": " "},
    }
    assert score_rows(results) == [
        {"task": "ai2d", "metric": "exact_match", "value": 0.5, "stderr": 0.1},
        {"task": "ai2d", "metric": "exact_match (flexible-extract)", "value": 0.6, "stderr": None},
    ]


def test_several_seeds_are_averaged():
    rows = [row("base", 0, value, seed) for seed, value in enumerate([0.5, 0.7, 0.6, 0.6])]
    ((mean, stderr),) = curves(result(*rows))["ai2d", "accuracy"]["base"].values()
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx(0.0816497 / 2)


def test_a_table_for_each_metric():
    made = tables(result(*SCORES, row("base", 0, 0.3, metric="other", stderr=None)))
    assert [table.title for table in made] == ["ai2d: accuracy", "ai2d: other"]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(made[0])
    lines = [line.strip("│┃ ").replace("│", " ").split() for line in capture.get().splitlines()]
    assert ["0", "0.800", "±", "0.010", "0.800", "±", "0.010"] in lines
    assert ["4,096", "0.400", "±", "0.010", "0.700", "±", "0.010"] in lines
    assert "base" in capture.get()
    assert "runs" not in capture.get()


def test_a_picture_shows_every_line():
    figure = draw(result(*SCORES, row("base", 0, 0.3, metric="other", stderr=None)))
    first, second = figure.axes
    assert first.get_legend_handles_labels()[1] == ["base", "pvm"]
    lines = [container.lines[0].get_xydata().tolist() for container in first.containers]
    assert lines == [[[0, 0.8], [1, 0.4]], [[0, 0.8], [1, 0.7]]]  # shorter texts to the left
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["0", "4,096"]
    assert second.get_ylabel() == "other"
    assert as_png(figure).startswith(b"\x89PNG")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no scores"):
        draw(result())


def test_the_command_says_what_is_missing(without_lmms_eval):
    options = ["--model", "qwen3_vl", "--model-args", "pretrained=x", "--tasks", "ai2d", "--out", "nowhere"]
    done = CliRunner().invoke(app, ["eval-lengths", *options])
    assert done.exit_code == 1
    assert "This needs lmms-eval, which the extra 'eval' brings: pip install '.[eval]'" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--lengths", "1k", "whole numbers of tokens, such as 0,1024"),
        ("--lengths", "", "whole numbers of tokens, such as 0,1024"),
        ("--lengths", "-1", "whole numbers of tokens, such as 0,1024"),
        ("--seeds", "0,x", "whole numbers from 0 on"),
        ("--seeds", "99999999999", "whole numbers from 0 on"),
        ("--tasks", "a,,b", "names of tasks or groups"),
    ],
)
def test_the_command_says_which_option_is_wrong(tmp_path, option: str, value: str, accepted: str):
    options = {"--model": "qwen3_vl", "--model-args": "pretrained=x", "--tasks": "a", "--out": str(tmp_path / "out")}
    given = [part for pair in {**options, option: value}.items() for part in pair]
    done = CliRunner().invoke(app, ["eval-lengths", *given])
    assert done.exit_code == 2
    message = f"Error: Invalid value for '{option}': {value!r} must be {accepted}, separated by commas."
    assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_spaces_beside_commas():
    assert separated("--tasks", "a, b ", str, "names") == ["a", "b"]
    assert separated("--lengths", " 0, 1024", int, "numbers") == [0, 1024]

"""How tests run a command of `peft-pvm`."""

from __future__ import annotations

import pytest


pytest.importorskip("typer", reason="the command line needs the extra `lab`")
pytest.importorskip("matplotlib", reason="the command line needs the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.cli.app import app


def run(*arguments: object, fails: bool = False) -> str:
    """What a command prints, on both streams."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))
    assert bool(result.exit_code) == fails, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output

"""How tests run a command of `peft-pvm`."""

from __future__ import annotations

import functools

import pytest


pytest.importorskip("typer", reason="the command line needs the extra `lab`")
pytest.importorskip("matplotlib", reason="the command line needs the extra `lab`")

import typer.testing
from typer.testing import CliRunner

from peft_pvm.cli.app import app


# All commands would be built anew for each that is run, which takes longer than most of them.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def run(*arguments: object, fails: bool = False, columns: int = 200) -> str:
    """What a command prints, on both streams, to a terminal of some width."""
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(map(str, arguments)))
    assert bool(result.exit_code) == fails, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output

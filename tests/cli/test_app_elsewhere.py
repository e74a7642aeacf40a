"""The app as a Hugging Face Space and in a container: what can be checked without either."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml


pytest.importorskip("typer", reason="the command line needs the extra `lab`")

import typer

import peft_pvm_cli
from peft_pvm.cli.app import app


REPOSITORY = Path(__file__).parents[2]
SPACE = REPOSITORY / "spaces"
PINNED = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())


def parameters(words: list[str]) -> dict:
    """What a command of `peft-pvm` is called with."""
    command = typer.main.get_command(app).commands[words[1]]
    return command.make_context(words[1], words[2:]).params


def test_the_space_serves_the_app_to_others(monkeypatch: pytest.MonkeyPatch):
    called: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(peft_pvm_cli, "main", lambda: called.append(sys.argv))
    runpy.run_path(str(SPACE / "app.py"))
    ((*words,),) = called
    assert parameters(words)["host"] == "0.0.0.0"
    assert parameters(words)["port"] == 7860  # where Spaces look for it


def test_what_the_space_says_of_itself():
    """With keys of the reference of Spaces' configuration, and the gradio that tests run with."""
    _, header, text = (SPACE / "README.md").read_text().split("---\n")
    settings = yaml.safe_load(header)
    assert settings.keys() == {
        "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license",
        "short_description",
    }  # fmt: skip
    assert (settings["sdk"], settings["sdk_version"]) == ("gradio", PINNED["gradio"])
    assert (SPACE / settings["app_file"]).is_file()
    assert len(settings["short_description"]) <= 60
    assert re.search(rf"^# {re.escape(settings['title'])}$", text, re.MULTILINE)


def test_the_container_is_made_of_what_is_there():
    """It serves the app to others, as a user of its own."""
    steps = [line.split(maxsplit=1) for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if line]
    by_name = {name: rest for name, rest in steps if name != "#"}
    words = yaml.safe_load(by_name["CMD"])
    assert parameters(words)["host"] == "0.0.0.0"
    assert by_name["EXPOSE"] == str(parameters(words)["port"])
    assert by_name["USER"] == "1000"
    installed = [word for name, rest in steps if name == "RUN" for word in shlex.split(rest)]
    assert f"torch=={PINNED['torch']}" in installed
    kept = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [name for name in kept if not (REPOSITORY / name).exists()] == []
    assert {"peft_pvm", "peft_pvm_cli.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(kept)

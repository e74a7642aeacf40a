"""The code blocks of README, CONTRIBUTING and docs run: page by page, on tiny models of the names given."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import huggingface_hub.constants
import pytest


pytest.importorskip("typer", reason="the pages show what needs the extra lab")
pytest.importorskip("datasets", reason="the pages show what needs the extra train")

import typer
from pages import BLOCKS, REPOSITORY
from typer.testing import CliRunner

from experiments.commands import app as experiments_app
from peft_pvm.cli.app import app
from peft_pvm.demo.for_trainers import make_chats, save_as_folder, write_chats
from peft_pvm.demo.tiny_vlm import load_tiny_vlm


MODELS = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-2B-Instruct")
# What takes long is done on less: options after those on the page, by how a command begins.
LESS = {
    "peft-pvm lab recall": ("--rows", "1"),
    "peft-pvm calibrate": ("--lengths", "0,64"),
    "peft-pvm compare": ("--lengths", "0"),
}
SHOWN = ("text", "console")  # what is not code
WITH_CODE = [name for name, blocks in BLOCKS.items() if any(block.language not in SHOWN for block in blocks)]


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory) -> Path:
    """A cache of the Hub in which every model is the lab's tiny one."""
    cache = tmp_path_factory.mktemp("hub")
    save_as_folder(load_tiny_vlm(), cache / "tiny")
    for model_id in MODELS:
        repository = cache / f"models--{model_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(cache / "tiny")
    return cache


@pytest.fixture
def checkout(hub_cache, tmp_path, monkeypatch) -> Path:
    """The working folder: what a checkout has, and the adapter, image and data that pages speak of."""
    for name in ("adapters", "examples", "experiments"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "adapters" / "pvm-tiny-vlm", tmp_path / "my-pvm")
    write_chats(make_chats("messages", 2, 0), tmp_path / "my-chats")
    chats = make_chats("prompts", 2)
    chats[0]["images"][0].save(tmp_path / "photo.jpg")
    questions = chats.map(lambda row: {"question": "?", "answer": row["solution"], "image": row["images"][0]})
    questions.select_columns(["question", "answer", "image"]).to_parquet(tmp_path / "questions.parquet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_line(words: list[str]) -> tuple[typer.Typer, list[str]] | None:
    """The app that words of a shell call, and its arguments; `None` if they call another program."""
    if words[0] == "peft-pvm":
        return app, words[1:]
    return (experiments_app, words[3:]) if words[:3] == ["python", "-m", "experiments"] else None


def run_command(words: list[str]) -> None:
    less = next((less for start, less in LESS.items() if " ".join(words).startswith(start)), ())
    called = command_line([*words, *less])
    if called is None:
        pytest.fail(f"No test can run {shlex.join(words)!r}: say why in a comment before the block.")
    result = CliRunner().invoke(*called, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_run(name, checkout):
    namespace: dict = {"__name__": "__main__"}
    for block in BLOCKS[name]:
        if block.reason is not None or block.language in SHOWN:
            continue
        if block.language == "python":
            code = "\n" * (block.line + 1) + block.code  # so that a traceback names the page's own line
            exec(compile(code, REPOSITORY / name, "exec", dont_inherit=True), namespace)
        else:
            for words in block.commands():
                run_command(words)


@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_name_a_language_that_is_run(name):
    assert {block.language for block in BLOCKS[name]} <= {"python", "bash", *SHOWN}


def parse(called: typer.Typer, arguments: list[str]) -> None:
    """Have typer read the arguments of a command line, without running it."""
    command = typer.main.get_command(called)
    context = command.make_context("called", arguments)
    while isinstance(command, typer.core.TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def check_command(words: list[str]) -> None:
    """A command that is not run exists, with the options, files, targets or extras that it names."""
    if (called := command_line(words)) is not None:
        with pytest.MonkeyPatch.context() as patch:  # what a command reads need not be there
            patch.setattr("peft_pvm.cli.options.check_there", lambda what, source: None)
            parse(*called)
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    for word in words:
        if re.match(r"(examples|tests|docs|experiments|adapters)\b", word):
            assert (REPOSITORY / word).exists(), word
        if match := re.fullmatch(r"\.\[([\w,]+)\]", word):
            extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(match[1].split(",")) <= set(extras), word


USAGE_ERROR = typer.BadParameter.__base__  # click's, which typer brings along in some versions
NOT_RUN = [
    (name, block) for name, blocks in BLOCKS.items() for block in blocks if block.reason and block.language == "bash"
]


@pytest.mark.parametrize(("name", "block"), NOT_RUN, ids=[f"{name}:{block.line + 1}" for name, block in NOT_RUN])
def test_commands_that_are_not_run_exist(name, block, checkout):
    for words in block.commands():
        check_command(words)


@pytest.mark.parametrize("name", WITH_CODE)
def test_no_line_of_code_hides_in_a_comment(name):
    """As when two lines were joined."""
    lines = [line for block in BLOCKS[name] for line in block.code.splitlines() if block.language == "python"]
    assert [line for line in lines if re.search(r"# .*(# |\w\(.*\) *$)", line)] == []


@pytest.mark.parametrize(
    "words",
    [
        ["peft-pvm", "prob"],
        ["peft-pvm", "lab", "recall", "--bytes", "3"],
        ["peft-pvm", "card"],
        ["python", "-m", "experiments", "trian"],
        ["python", "-m", "experiments", "limits", "--bytes", "3"],
        ["make", "tests"],
        ["python", "examples/none.py"],
        ["pip", "install", ".[laboratory]"],
    ],
    ids=" ".join,
)
def test_a_command_that_does_not_exist_is_noticed(words):
    with pytest.raises((USAGE_ERROR, AssertionError)):
        check_command(words)

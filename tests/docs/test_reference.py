"""The reference holds every public name, and what code writes into docs/ is what it writes today."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest


pytest.importorskip("matplotlib", reason="figures and command line need the extra lab")

from pages import BLOCKS, REPOSITORY
from reference import IDENTIFIERS, documented

import peft_pvm
from peft_pvm import integrations
from peft_pvm.methods import METHODS


DOCS = REPOSITORY / "docs"
EXPORTING = [
    info.name
    for info in pkgutil.walk_packages(peft_pvm.__path__, "peft_pvm.")
    if info.ispkg and "__all__" in (REPOSITORY / info.name.replace(".", "/") / "__init__.py").read_text()
]


@pytest.mark.parametrize("package", ["peft_pvm", *EXPORTING])
def test_every_exported_name_is_in_the_reference(package):
    module = importlib.import_module(package)
    known = documented()
    assert [name for name in module.__all__ if not any(getattr(module, name) is entry for entry in known)] == []


def test_every_integration_is_in_the_reference():
    modules = {f"peft_pvm.integrations.{info.name}" for info in pkgutil.iter_modules(integrations.__path__)}
    assert modules <= set(IDENTIFIERS)


def test_every_name_that_pages_and_examples_import_is_in_the_reference():
    known = documented()
    missing = set()
    sources = [block.code for blocks in BLOCKS.values() for block in blocks if block.language == "python"]
    sources += [path.read_text() for path in (REPOSITORY / "examples").glob("*.py")]
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("peft_pvm"):
                module = importlib.import_module(node.module)
                missing |= {a.name for a in node.names if not any(getattr(module, a.name) is k for k in known)}
    assert missing == set()


def test_nothing_is_shown_twice():
    assert len(set(IDENTIFIERS)) == len(IDENTIFIERS)


def pinned(package: str) -> bool:
    """Whether the version that wrote the committed files is installed: others may write other bytes."""
    return f"{package}=={importlib.metadata.version(package)}\n" in (REPOSITORY / "constraints.txt").read_text()


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    sys.path.insert(0, str(DOCS / "figures"))
    try:
        return importlib.import_module("draw")
    finally:
        sys.path.pop(0)


@pytest.mark.skipif(not pinned("matplotlib"), reason="other versions of matplotlib draw other bytes")
def test_figures_are_what_their_code_draws(drawing: ModuleType):
    assert {path.stem for path in DOCS.rglob("*.svg")} == set(drawing.DRAWN)
    for name, draw in drawing.DRAWN.items():
        drawn = draw()
        assert drawn == (DOCS / "figures" / f"{name}.svg").read_text(), f"{name}.svg: run `make generate`"
        assert len(drawn) < 100_000


def test_the_table_of_files_is_what_their_docstrings_say(drawing: ModuleType):
    page = (DOCS / "design.md").read_text()
    files = [*drawing.PACKAGE.rglob("*.py"), *(REPOSITORY / "experiments").rglob("*.py")]
    rows = [row.split(" | ") for row in drawing.table_of_files().splitlines()[2:]]
    assert len(rows) == len(files)
    assert [name for name, said in rows if len(said) < 10] == [], "files without a docstring"
    assert drawing.with_table(page) == page, "run `make generate`"


def test_the_tables_of_launches_and_predictions_are_what_their_files_say(drawing: ModuleType):
    page = (DOCS / "performance.md").read_text()
    assert len(drawing.TABLE_OF_PREDICTIONS.findall(page)) == len(drawing.TABLE_OF_LAUNCHES.findall(page)) == 1
    assert drawing.with_predictions(page) == page, "run `make predictions`"


@pytest.mark.skipif(not pinned("typer"), reason="other versions of typer write other pages")
def test_the_page_of_the_command_line_is_what_typer_writes():
    command = [sys.executable, "-m", "typer", "peft_pvm.cli.app", "utils", "docs", "--name", "peft-pvm"]
    command += ["--title", "Command line"]
    written = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert written.strip() == (DOCS / "api" / "cli.md").read_text().strip(), "run `make generate`"


def test_settings_are_shown_by_their_defaults():
    """And not by the calls that make fields of them."""
    griffe = pytest.importorskip("griffe", reason="the documentation needs the extra `docs`")
    extensions = griffe.load_extensions(str(DOCS / "griffe_settings.py"))
    package = griffe.load("peft_pvm", search_paths=[REPOSITORY], extensions=extensions)
    for config in (row.config for row in METHODS):
        shown = package[f"{config.__module__.removeprefix('peft_pvm.')}.{config.__name__}"].parameters
        for field in dataclasses.fields(config):
            if field.init and field.name in shown and field.name != "format_version":
                assert str(shown[field.name].default) == repr(field.default)

"""What docs/api/ and the pages of methods document, found in the package."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

from pages import REPOSITORY


IDENTIFIERS = [
    identifier
    for folder in ("api", "methods")
    for page in (REPOSITORY / "docs" / folder).glob("*.md")
    for identifier in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def resolve(identifier: str) -> object:
    try:
        return importlib.import_module(identifier)
    except ModuleNotFoundError as error:
        if error.name != identifier:
            raise
        module, _, name = identifier.rpartition(".")
        return getattr(importlib.import_module(module), name)


def public_names(module: ModuleType) -> dict[str, object]:
    """What a module defines and does not hide, as mkdocstrings shows it."""
    return {
        name: found
        for name, found in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(found) or inspect.isfunction(found))
        and found.__module__ == module.__name__
    }


def documented() -> list[object]:
    """The documented classes and functions of every module that can be imported here."""
    found: list[object] = []
    for identifier in IDENTIFIERS:
        if not lacks_a_package(identifier):
            entry = resolve(identifier)
            found += public_names(entry).values() if isinstance(entry, ModuleType) else [entry]
    return found


def lacks_a_package(identifier: str) -> bool:
    """Whether it stands in a module that imports what is not installed. mkdocstrings reads the source without it."""
    try:
        resolve(identifier)
    except ImportError as error:
        if (error.name or "").startswith("peft_pvm"):
            raise
        return True
    return False


@functools.cache
def names_out_of_reach() -> set[str]:
    """The documented names of modules that cannot be imported here, from their sources."""
    found = set()
    for identifier in filter(lacks_a_package, IDENTIFIERS):
        try:
            spec = importlib.util.find_spec(identifier)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            found.add(identifier.rpartition(".")[2])
            continue
        definitions = (ast.ClassDef, ast.FunctionDef)
        tree = ast.parse(Path(spec.origin).read_text())
        found |= {node.name for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")}
    return found

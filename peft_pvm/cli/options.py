"""Checks of options and arguments that several commands share; they come before any work is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer


Value = TypeVar("Value")

MANY = 10**6  # the largest number of anything that is counted
LARGEST_SEED = 2**32 - 1  # that both torch and numpy take


def one_of(names: Collection[str]) -> Callable[[Value], Value]:
    """A callback for an option that is one of some names, or a list of them."""

    def check(value: Value) -> Value:
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if name is not None and name not in names:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(names)}.")
        return value

    return check


def check_device(device: str) -> None:
    """Refuse what torch cannot compute on; not as a callback, since it is about the machine, not the command line."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch's own says what is accepted; builds without CUDA raise an AssertionError
        reason = str(error).strip().partition("\n")[0]
        raise typer.BadParameter(f"{device!r} cannot be used: {reason}", param_hint=["--device"]) from error


def new_folder(path: Path | None) -> Path | None:
    """A callback for a folder to write to, which need not be there yet."""
    if path is not None:
        _check_place(path, _nearest(path))
    return path


def new_file(path: Path | None) -> Path | None:
    """A callback for a file to write; its folder must be there."""
    if path is None:
        return None
    nearest = _nearest(path)
    if nearest == path.absolute():
        if path.is_dir():
            raise typer.BadParameter(f"{os.fspath(path)!r} is a folder, but must be a file.")
        try:
            path.open("r+b").close()
        except OSError as error:
            raise typer.BadParameter(f"{os.fspath(path)!r} cannot be written: {error.strerror}.") from error
    elif nearest != path.absolute().parent and nearest.is_dir():
        raise typer.BadParameter(f"{os.fspath(path)!r} cannot be written: there is no folder {path.parent}.")
    else:
        _check_place(path, nearest)
    return path


def _nearest(path: Path) -> Path:
    """The path, or the nearest of the folders above it that is there."""
    path = path.absolute()
    for place in (path, *path.parents):
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise typer.BadParameter(f"{os.fspath(path)!r} cannot be used: {error.strerror}.") from error
        return place
    raise typer.BadParameter(f"{os.fspath(path)!r} cannot be used: nothing above it is there.")


def _check_place(path: Path, place: Path) -> None:
    if not place.is_dir():
        raise typer.BadParameter(f"{os.fspath(path)!r} cannot be written: {place} is not a folder.")
    try:  # permissions do not tell: root has all of them, also where nothing can be written
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise typer.BadParameter(f"{os.fspath(path)!r} cannot be written: {error.strerror}.") from error


def refuse_beside(context: typer.Context, option: str, allowed: Collection[str] = (), reason: str = "") -> None:
    """Refuse options that would have no effect beside another one.

    Args:
        context: Of the command.
        option: The other one.
        allowed: Names of parameters that have an effect.
        reason: Why the rest has none, for the error.
    """
    idle = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.opts[0] != option and parameter.name not in allowed and given(context, str(parameter.name))
    ]
    if idle:
        raise typer.BadParameter(f"{reason}, so {', '.join(idle)} cannot be given.", param_hint=[option])


def given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter was given, as opposed to left at its default."""
    source: Any = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"

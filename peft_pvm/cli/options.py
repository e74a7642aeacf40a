"""Options that several commands share, and checks of their values before any work is done."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .choices import LoadedAs
from .refusals import check_there


Value = TypeVar("Value")

MANY = 10**6  # the largest number of anything that is counted
LARGEST = 10**9  # the largest number among several between commas
LARGEST_SEED = 2**32 - 1  # that both torch and numpy take
TINY, REAL = "tiny", "real"  # the models of the lab, by name
REAL_BASE = Path("runs", "real", "base")  # from the repository's root


def located(model: str) -> str:
    """The folder of the lab's second base for its name, unless there is a folder of that name; else what is given."""
    return str(REAL_BASE) if model == REAL and not os.path.exists(model) else model


def there(what: str) -> Callable[[Value], Value]:
    """A callback for folders or Hub ids, or adapters with `+` between: refuses at once what is neither.

    Args:
        what: What they should be, a key of `HOLDS`.
    """

    def check(value: Value) -> Value:
        for given in value if isinstance(value, list) else [value]:
            if isinstance(given, str):
                joined = what == "an adapter" and not os.path.exists(given)
                for part in given.split("+") if joined else [given]:  # without `separate`, which comes with torch
                    check_there(what, part)
        return value

    return check


Model = Annotated[
    str,
    typer.Option(help="Folder or Hub id of a vision-language model.", callback=there("a model that reads images")),
]


def known_device(name: str) -> str:
    """A callback for a device, of which torch knows the rest."""
    if name.partition(":")[0] == "gpu":
        raise typer.BadParameter(f"torch has no device {name!r}. Use cuda, or mps on a Mac.")
    return name


Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.", callback=known_device)]
DType = Annotated[LoadedAs, typer.Option(help="The dtype of the weights; auto: that of the checkpoint.")]
Kernel = Annotated[str | None, typer.Option(help="The attention kernel, such as sdpa.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables and sentences.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model a command loads, and how.

    Attributes:
        model: Folder or Hub id.
        device: Where it is to run.
        dtype: Of its weights.
        attn_implementation: The attention kernel; `None`: transformers chooses.
    """

    model: str
    device: str
    dtype: LoadedAs
    attn_implementation: str | None


def counted(help: str) -> Any:
    """An option that says how many there are of something, at least one."""
    return typer.Option(min=1, max=MANY, help=help)


def one_of(names: Collection[str]) -> Callable[[Value], Value]:
    """A callback for an option that is one of some names, or a list of them."""

    def check(value: Value) -> Value:
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if name is not None and name not in names:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(names)}.")
        return value

    return check


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
        context: The context of the command.
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


def separated(option: str, text: str, read: Callable[[str], Value], accepted: str) -> list[Value]:
    """What an option holds between commas.

    Args:
        option: Its name.
        text: What it was given.
        read: Makes a value of each part; raises ValueError if it is none.
        accepted: What parts may be, for the error.

    Raises:
        BadParameter: A part is empty, or cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [read(part) for part in parts]
    except ValueError:
        values = []
    if not values or not all(parts):
        raise typer.BadParameter(f"{text!r} must be {accepted}, separated by commas.", param_hint=[option])
    return values


def whole_number(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """For `separated`: reads whole numbers of a range."""

    def read(part: str) -> int:
        number = int(part)
        if not low <= number <= high:
            raise ValueError(f"{number} is not from {low} to {high}.")
        return number

    return read


def finite_number(part: str) -> float:
    """For `separated`: reads a number."""
    number = float(part)
    if not math.isfinite(number):
        raise ValueError(f"{part} is not finite.")
    return number


def name_among(names: tuple[str, ...]) -> Callable[[str], str]:
    """For `separated`: reads one of some names."""

    def read(part: str) -> str:
        if part not in names:
            raise ValueError(f"{part!r} is none of {names}.")
        return part

    return read


def counts(option: str, text: str) -> list[int]:
    """The whole numbers above 0 that an option holds between commas."""
    return separated(option, text, whole_number(1), "whole numbers above 0")

"""Checks of what commands are given, which come before any work is done.

Models and adapters are checked by their configurations alone: loading weights can take minutes.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from peft import PeftConfig
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from ..folders.adapter_file import AdapterFile, inspect_adapter
from ..tuners.base import VisualConfig
from .refusals import reading


Value = TypeVar("Value")

MANY = 10**6  # the largest number of anything that is counted
LARGEST = 10**9  # the largest number among several between commas
LARGEST_SEED = 2**32 - 1  # that both torch and numpy take
DTYPES = ("float32", "bfloat16", "float16")


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


def without_weights(source: str, attn_implementation: str | None = None) -> nn.Module:
    """A vision-language model of which only the configuration is read.

    Args:
        source: Folder or Hub id.
        attn_implementation: The attention kernel; `None`: transformers chooses.

    Raises:
        OSError: There is none.
        ValueError: It is no vision-language model.
        BadParameter: The kernel cannot be used.
    """
    with reading("a model that reads images", source):
        config = AutoConfig.from_pretrained(source)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"{source} is a {config.model_type!r}, but must be a model that reads images and writes text."
            )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    if attn_implementation is not None:
        set_kernel(model, attn_implementation)
    return model


def set_kernel(model: Any, attn_implementation: str) -> None:
    """Give a model another attention kernel.

    Raises:
        BadParameter: transformers does not know it for this model, or a package that it needs is missing.
    """
    try:
        model.set_attn_implementation(attn_implementation)
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{attn_implementation!r} cannot be used: {error}", param_hint=["--attn-implementation"]
        ) from error


def check_adapter(adapter: str, base: str) -> Any:
    """Refuse an adapter that cannot be read or does not fit.

    Args:
        adapter: Folder or Hub id.
        base: Folder or Hub id of the base model, of which only the configuration is read.

    Returns:
        Its configuration.

    Raises:
        OSError: There is none.
        ValueError: It is damaged, of no known method, or does not fit.
    """
    with reading("an adapter", adapter):
        config = PeftConfig.from_pretrained(adapter)
        if not isinstance(config, VisualConfig):
            AdapterFile(adapter).read()
        elif (misfit := inspect_adapter(adapter, base).misfit) is not None:
            raise ValueError(f"The adapter {adapter} does not fit {base}: {misfit}")
    return config

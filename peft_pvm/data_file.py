"""Files of data: read with errors that name the file, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .replacing import write_file


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text in another encoding, and a million brackets
        raise ValueError(f"{os.fspath(path)} is damaged or not JSON: {error}") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file. An older one stays as it is until the new one is whole."""
    write_file(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def holding(path: str | os.PathLike, what: str) -> Iterator[None]:
    """While the content of a file is taken apart: say in words that it is not what it should be.

    Args:
        path: The file or folder.
        what: What it should hold, for the error.

    Raises:
        ValueError: The content has another structure.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} does not hold {what} ({type(error).__name__}: {error}).") from error

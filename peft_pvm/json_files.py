"""JSON that others wrote: read with a limit, and refused in a sentence."""

from __future__ import annotations

import json
import os
from typing import Any

from .text import plain


LONGEST_FILE = 8 * 2**20  # bytes; parsed, they take many times as much memory


def read_json(path: str | os.PathLike, limit: int = LONGEST_FILE) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        limit: How many bytes it may have.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is too long, not JSON or too deeply nested.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    where = plain(path, 200)
    if len(content) > limit:
        raise ValueError(f"{where} is longer than {limit:,} bytes, which no such file has. It may be damaged.")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply. It may be damaged.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {plain(error, 200)}") from error

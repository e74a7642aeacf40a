"""JSON that others wrote: read with a limit, and refused in a sentence."""

from __future__ import annotations

import json
import os
from typing import Any


LONGEST_FILE = 8 * 2**20  # bytes; parsed, they take many times as much memory


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is too long, not JSON or too deeply nested.
    """
    with open(path, "rb") as file:
        content = file.read(LONGEST_FILE + 1)
    if len(content) > LONGEST_FILE:
        raise ValueError(f"{path} is longer than {LONGEST_FILE:,} bytes, which no such file has. It may be damaged.")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply. It may be damaged.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error

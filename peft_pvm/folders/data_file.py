"""Files of data: read with errors that name the file, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save

from ..utils.text import plain
from .replacing import write_file


if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


LONGEST_FILE = 64 * 2**20  # bytes
LENGTH_BYTES = 8  # of the length of the header, with which a safetensors file begins
OF_ADAPTERS = 8 * 2**20  # bytes of a configuration, or of results beside it


def read_json(path: str | os.PathLike, limit: int = LONGEST_FILE) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        limit: How many bytes it may have. Parsed, they take many times as much memory.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is too long, not JSON or too deeply nested.
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    return parse_json(content, plain(os.fspath(path), 200), limit)


def read_image(path: str | os.PathLike) -> Image:
    """The image in a file, in RGB. Needs Pillow.

    Args:
        path: The file.

    Raises:
        ValueError: There is no such file, or it is no image, a damaged one, or one so large that it may be an attack.
            The message continues a sentence that begins with the name that the user gave.
    """
    import PIL.Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # twice as large, it is an error
        try:
            with PIL.Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # of a damaged file, whatever Pillow's readers trip over, of which it has no list
            raise ValueError(f"cannot be read as an image: {plain(error, 200)}") from error


def parse_json(content: str | bytes, where: str, limit: int) -> Any:
    """What JSON from a file holds.

    Args:
        content: The JSON; bytes are UTF-8.
        where: Where it comes from, for the message.
        limit: How long it may be.

    Raises:
        ValueError: It is too long, not JSON or too deeply nested.
    """
    if len(content) > limit:
        raise ValueError(f"{where} is longer than {limit:,} bytes, which no such file has. It may be damaged.")
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{where} is damaged or not JSON: it is nested too deeply.") from None
    except ValueError as error:  # also text in another encoding
        raise ValueError(f"{where} is damaged or not JSON: {plain(error, 200)}") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file. An older one stays as it is until the new one is whole."""
    write_file(path, json.dumps(content, indent=1) + "\n")


def to_safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file: the same bytes for the same tensors and metadata.

    safetensors itself writes several entries of metadata in an order that changes from call to call. Git and the Hub
    would take such a file for a new one.

    Args:
        tensors: By name, contiguous.
        metadata: By key.
    """
    content = save(dict(tensors), dict(metadata))
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH_BYTES)  # the tensors are aligned
    return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded + content[end:]


@contextlib.contextmanager
def holding(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turn errors that come up while the content of a file is read into one that says what it should hold.

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

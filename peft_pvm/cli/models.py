"""What commands see of a base model and its adapters before they load any weights, which can take minutes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import typer
from peft import PeftConfig
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from ..adapter_file import AdapterFile, inspect_adapter
from ..tuners.base import VisualConfig
from .refusals import DEBUG, REFUSALS


WORDLESS = (json.JSONDecodeError, SafetensorError, UnicodeError)  # refusals that tell a user nothing


@contextlib.contextmanager
def reading(what: str, *sources: str | os.PathLike) -> Iterator[None]:
    """While files of others are read by code of others, which raises whatever it trips over.

    Args:
        what: What they should be, for the error.
        sources: Folders, files or Hub ids.

    Raises:
        ValueError: One cannot be read. Errors that say so in words, and of what, stay as they are.
    """
    try:
        yield
    except Exception as error:
        names = " or ".join(os.fspath(source) for source in sources)
        if not isinstance(error, REFUSALS) or isinstance(error, WORDLESS):
            raise ValueError(
                f"{names} cannot be read as {what} ({type(error).__name__}: {error}). {DEBUG}=1 shows where."
            ) from error
        if getattr(error, "filename", None) or any(os.fspath(source) in str(error) for source in sources):
            raise
        raise ValueError(f"{names}: {str(error).strip()}") from error


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

"""Loads models, processors and rows of data for commands, with progress bars.

Models and adapters are first checked only by their configurations, because loading weights can take minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from peft import PeftConfig
from rich.progress import TaskID
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...demo import for_trainers  # noqa: F401  # makes the tiny model's processor known to AutoProcessor
from ...demo.tiny_vlm import load_tiny_vlm
from ...folders import base_checkpoint
from ...folders.adapter_file import AdapterFile
from ...folders.inspection import inspect_adapter
from ...probe.rows import Chat, read_chats
from ...tokens.families import find_vlm
from ...tuners.base import VisualConfig
from ...tuners.loading import load_adapters
from ...tuners.names import separate
from ...utils.terminal import Bars
from ..options import TINY, ModelOptions
from ..refusals import reading


def check_device(device: str) -> None:
    """Refuse what torch cannot compute on; not as a callback, since it is about the machine, not the command line."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch's own says what is accepted; builds without CUDA raise an AssertionError
        reason = str(error).strip().partition("\n")[0]
        raise typer.BadParameter(f"{device!r} cannot be used: {reason}", param_hint=["--device"]) from error


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
    if source == TINY and not Path(TINY).exists():
        raise ValueError(
            f"This command reads models from folders. Write the lab's first: peft-pvm lab save-base {TINY}"
        )
    with reading("a model that reads images", source):
        model = base_checkpoint.without_weights(source)
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


def check_readable(adapters: Iterable[str]) -> None:
    """Refuse adapters that cannot be read, before anything is loaded.

    Args:
        adapters: Folders or Hub ids, or several with `+` between.
    """
    for part in itertools.chain.from_iterable(map(separate, adapters)):
        with reading("an adapter", part):
            inspect_adapter(part)


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


def check_fit(options: ModelOptions, adapters: Iterable[str]) -> None:
    """Find what is wrong with a model, or the lab's tiny one, and with adapters, as far as configurations tell.

    Raises:
        OSError: One of them is not there.
        ValueError: One cannot be read, or an adapter does not fit.
    """
    if options.model == TINY:
        return check_readable(adapters)
    find_vlm(without_weights(options.model, options.attn_implementation))
    for adapter in adapters:
        check_adapter(adapter, options.model)


def load_tiny(options: ModelOptions) -> Any:
    """The lab's tiny model, with a device and a kernel."""
    model: Any = load_tiny_vlm().to(torch.device(options.device))
    if options.attn_implementation is not None:
        set_kernel(model, options.attn_implementation)
    return model


def load_model(options: ModelOptions, adapters: Sequence[str] = ()) -> Any:
    """A model in eval mode, with adapters.

    Args:
        options: Which, and how.
        adapters: Folders or Hub ids; all act.
    """
    kernel = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    with reading("a model that reads images", options.model):
        loaded = AutoModelForImageTextToText.from_pretrained(
            options.model, dtype=options.dtype, use_safetensors=True, trust_remote_code=False, **kernel
        )
    loaded = loaded.to(torch.device(options.device)).eval()
    load_adapters(loaded, adapters)
    return loaded


def load_processor(source: str) -> Any:
    """The processor of a model, by folder or Hub id. ValueError: it takes no images."""
    with reading("a processor", source):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"The processor of {source} is a {type(processor).__name__}, which takes no images.")
    return processor


def moved(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a device, in a dtype if it is not of integers."""
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


def load_chats(data: str, split: str, rows: int) -> list[Chat]:
    """The first chats of a data set that have images.

    Args:
        data: Folder or Hub id.
        split: The split.
        rows: How many at most. No more of the data set is read.

    Raises:
        OSError: There is none.
        ValueError: It holds no chats with images and answers.
    """
    import datasets  # of the extra `train`

    with reading("a data set of chats with images", data):
        return read_chats(datasets.load_dataset(data, split=split, streaming=True), rows)


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Progress bars on standard error, where they do not mix with what the command prints."""
    with Bars() as bars:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done)

        yield show

"""What commands load once their options are checked: models, processors, rows of data; and the bars meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..probe.rows import Chat, read_chats
from ..tuners.saving import load_adapters
from ..utils.terminal import Terminal
from .options import DTYPES
from .refusals import reading


LOADED_AS = ("auto", *DTYPES)


def load_model(model: str, adapters: Sequence[str], device: str, dtype: str, attn_implementation: str | None) -> Any:
    """A model in eval mode, with adapters.

    Args:
        model: Folder or Hub id.
        adapters: Folders or Hub ids; all act.
        device: Where it is to run.
        dtype: One of `LOADED_AS`.
        attn_implementation: The attention kernel; `None`: transformers chooses.
    """
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with reading("a model that reads images", model):
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, **kernel)
    loaded = loaded.to(torch.device(device)).eval()
    load_adapters(loaded, adapters)
    return loaded


def load_processor(source: str) -> Any:
    """The processor of a model, by folder or Hub id. ValueError: it takes no images."""
    with reading("a processor", source):
        processor = AutoProcessor.from_pretrained(source)
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
    with Progress(console=Terminal(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done)

        yield show

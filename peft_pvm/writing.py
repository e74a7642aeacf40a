"""Saved adapters as they are written: whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .adapter_file import RESULTS_NAME
from .cards import CARD_NAME, is_written_by_a_person
from .replacing import replacing


FORMER_LEFTOVERS = ".unfinished-*"  # beside the folder, from saves by earlier versions that were killed
FORMER_SAVE_SECONDS = 600  # after which nobody is still writing to one


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Write an adapter so that its folder holds the old one or the new one, whenever the process dies.

    The same is true if several processes save into one folder. Adapters in sub-folders are each written whole by
    themselves. Other files in the folder are not touched, nor is a model card that a person wrote.

    Args:
        folder: Where they shall be.

    Yields:
        A folder of the same name, to write to. It holds copies of the model cards and results that are there already,
        which the new cards are made from.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    _remove_former_leftovers(folder)
    with replacing(folder, CONFIG_NAME, stays=is_written_by_a_person) as staged:
        copies: dict[Path, bytes] = {}
        for name in () if staged.samefile(folder) else (CARD_NAME, RESULTS_NAME):  # the same inside another save
            for file in (*folder.glob(name), *folder.glob(f"*/{name}")):
                copy_of_it = staged / file.relative_to(folder)
                copy_of_it.parent.mkdir(exist_ok=True)
                copies[copy_of_it] = shutil.copyfile(file, copy_of_it).read_bytes()
        yield staged
        for path, content in copies.items():
            if path.is_file() and path.read_bytes() == content:
                path.unlink()
                if path.parent != staged and not any(path.parent.iterdir()):
                    path.parent.rmdir()


def write_adapter(folder: str | os.PathLike, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """Save an adapter as PEFT does, whole or not at all. Ours bring a model card.

    Args:
        folder: Where to.
        config: Its configuration.
        tensors: Its tensors, by their keys in the file.

    Returns:
        The folder.
    """
    with written_whole(folder) as staged:
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        saved = copy.copy(config)
        saved.inference_mode = True  # as PEFT saves it
        saved.save_pretrained(str(staged))
    return Path(folder)


def _remove_former_leftovers(folder: Path) -> None:
    folder = Path(os.path.realpath(folder))
    for leftover in folder.parent.glob(FORMER_LEFTOVERS):
        with contextlib.suppress(OSError):  # another user's, or gone already
            newest = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if (leftover / folder.name).is_dir() and newest < time.time() - FORMER_SAVE_SECONDS:
                shutil.rmtree(leftover)

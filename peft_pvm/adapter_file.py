"""Saved adapters: their weights file, checked against a model before it is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .fitting import flaws, misfits
from .text import listed, plain, quoted


FORMAT_VERSION = "1"  # of the adapters we write
RESULTS_NAME = "results.json"  # what was measured with an adapter, for its model card


LONGEST_HEADER = 2 * 2**20  # bytes: some 10,000 tensors, of which an adapter has hundreds
NEXT_LINE = "\n  - "
DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class AdapterFile:
    """The weights file of a saved adapter.

    Args:
        path: A folder or a Hub repository id.
        subfolder: The adapter's folder inside it.
        hub_kwargs: Arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`.
    """

    def __init__(
        self, path: str | os.PathLike, subfolder: str | None = None, hub_kwargs: dict[str, Any] | None = None
    ):
        self.path = os.fspath(path)
        self.subfolder = subfolder
        self.folder = os.path.join(self.path, subfolder or "")
        self.hub_kwargs = hub_kwargs or {}

    def is_config_only(self) -> bool:
        """Whether this is a folder without any weights."""
        return os.path.isdir(self.folder) and not any(
            os.path.isfile(os.path.join(self.folder, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        )

    def locate(self) -> str:
        """The file on this machine, downloaded if need be.

        Raises:
            FileNotFoundError: A folder without `adapter_model.safetensors`. Other formats are not read: they can run
                code.
            ValueError: The subfolder lies outside the adapter's folder.
        """
        if os.path.isabs(self.subfolder or "") or ".." in Path(self.subfolder or "").parts:
            raise ValueError(f"The subfolder {quoted(self.subfolder)} leads out of {plain(self.path, 200)}.")
        if os.path.isdir(self.folder):
            file = os.path.join(self.folder, SAFETENSORS_WEIGHTS_NAME)
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"There is no {SAFETENSORS_WEIGHTS_NAME} in {plain(self.folder, 200)}, which holds "
                    f"{quoted(sorted(os.listdir(self.folder)))}. Adapters are read from safetensors files only."
                )
            return file
        return hf_hub_download(self.path, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.hub_kwargs)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        file = self.locate()
        try:
            with open(file, "rb") as content:
                if (length := int.from_bytes(content.read(8), "little")) > LONGEST_HEADER:
                    raise SafetensorError(f"its header would be {length:,} bytes long")
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, RuntimeError) as error:  # the last: the system cannot map so large a file
            raise ValueError(
                f"{plain(file, 200)} is damaged or not a safetensors file: {plain(error, 200)}"
            ) from error

    def header(self) -> dict[str, torch.Tensor]:
        """By key, a tensor on the meta device with the shape and dtype that the header speaks of. No tensor is read.

        Raises:
            ValueError: The file is damaged.
        """
        blank = {}
        with self._opened() as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                if (dtype := DTYPES.get(part.get_dtype())) is None:
                    raise SafetensorError(f"{plain(key, 100)} is of dtype {part.get_dtype()}")
                try:
                    blank[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                except RuntimeError as error:  # an empty tensor, but one of its sizes is beyond what torch can count
                    raise SafetensorError(f"{plain(key, 100)} is of shape {quoted(part.get_shape())}") from error
        return blank

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every key with its tensor, one after the other.

        Raises:
            ValueError: The file is damaged.
        """
        with self._opened() as tensors:
            for key in tensors.keys():  # noqa: SIM118
                yield key, tensors.get_tensor(key)

    def check(
        self,
        expected: Mapping[str, torch.Tensor],
        base: Collection[str] = (),
        rename: Callable[[str], str] = lambda key: key,
    ) -> dict[str, str]:
        """Compare the file with the tensors that an adapter needs. None is read before all names and shapes fit.

        Args:
            expected: By key, a tensor of the shape and kind of number that is needed.
            base: Keys of the base model, for the message.
            rename: Gives the key on the model for a key in the file.

        Returns:
            The keys on the model, by those in the file.

        Raises:
            ValueError: The file is damaged, or a tensor is missing, superfluous, of another shape or kind of number,
                or holds numbers that no weight can be.
        """
        header = self.header()
        names = {key: rename(key) for key in header}
        problems = misfits({names[key]: tensor for key, tensor in header.items()}, expected, base)
        if twice := len(names) - len(set(names.values())):
            problems.append(f"{twice} of its keys stand for what another key stands for")
        if problems := problems or flaws(self.read()):
            raise ValueError(
                f"{plain(self.locate(), 150)} does not fit this model ({len(problems)} of its tensors), so nothing "
                f"was attached:\n  - {listed(problems, NEXT_LINE)}\nCheck that the adapter was trained on this base "
                "model. To start a new adapter with this configuration, pass dataclasses.replace(config)."
            )
        return names

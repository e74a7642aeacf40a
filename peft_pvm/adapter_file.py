"""Saved adapters: their weights file, checked against a model before it is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


FORMAT_VERSION = "1"  # of the adapters we write
RESULTS_NAME = "results.json"  # what was measured with an adapter, for its model card


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
            raise ValueError(f"The subfolder {self.subfolder!r} leads out of {self.path}.")
        if os.path.isdir(self.folder):
            file = os.path.join(self.folder, SAFETENSORS_WEIGHTS_NAME)
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"There is no {SAFETENSORS_WEIGHTS_NAME} in {self.folder}, which holds "
                    f"{sorted(os.listdir(self.folder))}. Adapters are read from safetensors files only."
                )
            return file
        return hf_hub_download(self.path, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.hub_kwargs)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        file = self.locate()
        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, by key.

        Raises:
            ValueError: The file is damaged.
        """
        with self._opened() as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118

    def check(self, expected: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]]) -> None:
        """Compare the tensors in the file with those an adapter needs, and see that they hold numbers.

        Args:
            expected: Shape of every tensor that must be there, by key.
            base: Shape of every tensor of the base model, by key: those may be there as well.

        Raises:
            ValueError: The file is damaged, or a tensor is missing, superfluous, of another shape or not finite.
        """
        found = {}
        flawed = []
        with self._opened() as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(key)
                found[key] = tuple(tensor.shape)
                if (flaw := flaw_of(tensor)) and (key not in base or tensor.is_floating_point()):
                    flawed.append(f"{key} holds {flaw}")
        problems = [f"{key} is missing" for key in expected if key not in found]
        for key, shape in found.items():
            wanted = expected.get(key, base.get(key))
            if wanted is None:
                problems.append(f"{key} belongs to nothing in this model")
            elif wanted != shape:
                problems.append(f"{key} has shape {shape}, this model needs {wanted}")
        problems += flawed
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:10])
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ValueError(
                f"{self.locate()} does not fit this model ({len(problems)} of its tensors), so nothing was attached:"
                f"{shown}{more}\nCheck that the adapter was trained on this base model. To start a new adapter with "
                "this configuration, pass dataclasses.replace(config)."
            )


def flaw_of(tensor: torch.Tensor) -> str | None:
    """What a tensor holds that no weight may; `None`: it is one."""
    if not tensor.is_floating_point():
        return f"{tensor.dtype}, not floating-point numbers"
    return None if bool(torch.isfinite(tensor.float()).all()) else "NaN or infinity"

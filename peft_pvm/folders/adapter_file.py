"""Saved adapters as files: their configuration and their weights, read and checked without a model."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..utils.checks import LARGEST
from ..utils.text import listed, plain, quoted
from .companions import KEY, Companion, method_of, read_note


FORMAT_VERSION = "1"  # of the adapters we write
PEFT_PREFIX = "base_model.model."  # PEFT saves every key below this name
RESULTS_NAME = "results.json"  # what was measured with an adapter, for its model card
SOURCE = "_source"  # of a configuration that was loaded: the weights file beside it

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
        self.folder = os.path.join(self.path, subfolder) if subfolder else self.path
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

    def companions(self) -> tuple[Companion, ...]:
        """The adapters that this one was trained together with; none, if the file is not on this machine.

        Raises:
            ValueError: The file is damaged, or does not say it as it should.
        """
        if (file := self.at_hand()) is None:
            return ()
        with self._opened(file, longest=math.inf) as tensors:  # another method's may have any number of tensors
            note = (tensors.metadata() or {}).get(KEY)
        return () if note is None else read_note(note, file)

    def at_hand(self) -> str | None:
        """The file, if it is on this machine already: the Hub is not asked."""
        file: Any = os.path.join(self.folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isdir(self.folder):
            name = "/".join(filter(None, (self.subfolder, SAFETENSORS_WEIGHTS_NAME)))
            places = {key: self.hub_kwargs[key] for key in ("cache_dir", "revision") if key in self.hub_kwargs}
            with contextlib.suppress(HFValidationError):
                file = try_to_load_from_cache(self.path, name, **places)
        return file if isinstance(file, str) and os.path.isfile(file) else None

    @contextlib.contextmanager
    def _opened(self, file: str, longest: float = LONGEST_HEADER) -> Iterator[Any]:
        try:
            with open(file, "rb") as content:
                if (length := int.from_bytes(content.read(8), "little")) > longest:
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
        with self._opened(self.locate()) as tensors:
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
        with self._opened(self.locate()) as tensors:
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
            problems.append(f"{twice} of its keys name the same tensor as another key")
        if problems := problems or flaws(self.read()):
            raise ValueError(
                f"{plain(self.locate(), 150)} does not fit this model ({len(problems)} of its tensors), so nothing "
                f"was attached:\n  - {listed(problems, NEXT_LINE)}\nCheck that the adapter was trained on this base "
                "model. To start a new adapter with this configuration, pass dataclasses.replace(config)."
            )
        return names


@dataclass
class SavedConfig(PeftConfig):
    """What saving and loading need of the configuration of an adapter of this package."""

    method: ClassVar[str]  # its name in lower case
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]  # its number on arXiv
    has_parameters: ClassVar[bool] = True

    @property
    def source(self) -> AdapterFile | None:
        """The weights file beside the configuration, if it was loaded from somewhere."""
        return vars(self).get(SOURCE)

    def set_source(self, path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> None:
        """Remember the folder or Hub repository this config was loaded from."""
        setattr(self, SOURCE, AdapterFile(path, subfolder, hub_kwargs))

    def misfits(self, header: Mapping[str, torch.Tensor]) -> list[str]:
        """What does not fit between this configuration and the names and shapes in a file, a sentence for each.

        Args:
            header: As `AdapterFile.header` returns it. What depends on the base model is not checked.
        """
        return []

    def gates(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[int, float]]:
        """The gates of each branch that the adapter adds beside the base's modules, by layer index.

        Args:
            tensors: By their keys in the adapter's file.
        """
        return []


def misfits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], base: Collection[str] = ()
) -> list[str]:
    """What is wrong with the names, shapes and dtypes of an adapter's tensors, a sentence for each problem.

    Args:
        found: By key; their numbers are not looked at.
        expected: By key, a tensor of the shape and kind of number that is needed.
        base: Keys of the base model, for the message.
    """
    missing = [f"{key} is missing" for key in expected if key not in found]
    problems, strays = [], []
    for key, tensor in found.items():
        if key not in expected and key in base:
            problems.append(f"{key} belongs to the base model, and modules_to_save does not name it")
        elif key not in expected:
            strays.append(f"{key} belongs to nothing in this model")
        elif tensor.shape != expected[key].shape:
            shape, needed = tuple(tensor.shape), tuple(expected[key].shape)
            problems.append(f"{key} has shape {shape}, this model needs {needed}")
        elif tensor.is_floating_point() != expected[key].is_floating_point():
            kind = "floating-point" if expected[key].is_floating_point() else "whole"
            problems.append(f"{key} holds {tensor.dtype}, not {kind} numbers")
    return problems + missing + strays


def flaws(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Which tensors hold numbers that no weight can be, a sentence for each.

    Args:
        tensors: With their keys.
    """
    found = []
    for key, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        largest = float(tensor.detach().float().abs().max())  # NaN if any number is
        if not math.isfinite(largest):
            found.append(f"{key} holds NaN or infinity")
        elif largest > LARGEST:
            found.append(f"{key} holds {largest:.3g}, which is larger than any number of fp16")
    return found


Saved = TypeVar("Saved", bound=PeftConfig)


def open_adapter(path: str | os.PathLike, kind: type[Saved], whose: str, **kwargs: Any) -> tuple[Saved, AdapterFile]:
    """The configuration of a saved adapter, and its weights file, of which nothing is read yet.

    Args:
        path: Folder or Hub id.
        kind: What the configuration must be.
        whose: The same in words, for the message.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is of another kind, or damaged.
    """
    config = PeftConfig.from_pretrained(os.fspath(path), **kwargs)
    if not isinstance(config, kind):
        raise ValueError(f"{plain(path, 200)} is an adapter of type {method_of(config)}, not {whose}.")
    return config, vars(config).get(SOURCE) or AdapterFile(path)


def read_tensors(config: SavedConfig, file: AdapterFile) -> dict[str, torch.Tensor]:
    """All tensors of a saved adapter, by their keys. Names and shapes are compared with its configuration first.

    Raises:
        ValueError: The file is damaged, or its tensors are not those that the configuration speaks of.
        FileNotFoundError: There is none.
    """
    problems = config.misfits(file.header())
    tensors = {} if problems else dict(file.read())
    if problems := problems or flaws(tensors.items()):
        raise ValueError(
            f"{plain(file.path, 200)} does not hold what its configuration describes: {listed(problems)}."
        )
    return tensors


def read_config(adapter: str | os.PathLike, **kwargs: Any) -> SavedConfig:
    """The configuration of a saved adapter of this package.

    Args:
        adapter: Folder or Hub id.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is of another package, damaged, or of a method without parameters and holds some.
    """
    return open_ours(adapter, **kwargs)[0]


def open_ours(adapter: str | os.PathLike, **kwargs: Any) -> tuple[SavedConfig, AdapterFile]:
    """As `read_config`, with the weights file."""
    config, file = open_adapter(adapter, SavedConfig, "of peft_pvm", **kwargs)
    if not config.has_parameters and not file.is_config_only() and (strays := list(file.header())):
        raise ValueError(f"{plain(adapter, 200)} is an adapter without parameters, but holds {listed(strays)}.")
    return config, file

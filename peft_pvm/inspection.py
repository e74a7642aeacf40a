"""What a saved adapter is, read from its files."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForImageTextToText

from .adapter_file import AdapterFile
from .pvm import PVMConfig
from .pvm.branch import weight_name
from .pvm.files import read_adapter
from .text import listed, plain
from .tuners.base import VisualConfig


@dataclass(frozen=True)
class Inspection:
    """What a saved adapter is.

    Attributes:
        method: "pvm", "dipe" or "tdrs".
        parameters: How many numbers it holds.
        num_bytes: Of its tensors.
        dtypes: Of its tensors.
        gates: Of each branch of a PVM adapter, its gate by layer index.
        config: The fields of its configuration.
        base: The base model that it was compared with; `None`: none.
        misfit: Why it does not fit that; `None`: it does, or was not compared.
    """

    method: str
    parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    gates: list[dict[int, float]]
    config: dict[str, Any]
    base: str | None
    misfit: str | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**dataclasses.asdict(self), "dtypes": list(self.dtypes)}


def read_config(adapter: str | os.PathLike, **kwargs: Any) -> VisualConfig:
    """The configuration of a saved adapter of this package.

    Args:
        adapter: Folder or Hub id.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is of another package, damaged, or of a method without parameters and holds some.
    """
    config = PeftConfig.from_pretrained(os.fspath(adapter), **kwargs)
    if not isinstance(config, VisualConfig):
        raise ValueError(f"{plain(adapter, 200)} is an adapter of type {config.peft_type}, not of peft_pvm.")
    file = cast(AdapterFile, config._source)
    if not config.has_parameters and not file.is_config_only() and (strays := list(file.header())):
        raise ValueError(f"{plain(adapter, 200)} is an adapter without parameters, but holds {listed(strays)}.")
    return config


def inspect_adapter(adapter: str | os.PathLike, base: str | os.PathLike | None = None, **kwargs: Any) -> Inspection:
    """Read what a saved adapter is, and whether it fits a base model.

    Args:
        adapter: Folder or Hub id.
        base: Folder or Hub id of a base model, of which only the configuration is read; `None`: not compared.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is no adapter of this package, or damaged.
        FileNotFoundError: It has no weights file.
    """
    config = read_config(adapter, **kwargs)
    file = cast(AdapterFile, config._source)
    tensors = {} if file.is_config_only() else file.header()
    gates: list[dict[int, float]] = []
    if isinstance(config, PVMConfig):
        _, tensors = read_adapter(adapter, **kwargs)
        for number, part in enumerate(config.parts()):
            name = f".pvm.{weight_name('gate', number)}.weight"
            found = {key.rpartition(".layers.")[2]: tensor for key, tensor in tensors.items() if key.endswith(name)}
            gates.append({layer_idx: float(found[f"{layer_idx}{name}"]) for layer_idx in part.layer_indices})
    return Inspection(
        config.method,
        sum(tensor.numel() for tensor in tensors.values()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        gates,
        {name: value for name, value in config.to_dict().items() if value is not None},
        None if base is None else os.fspath(base),
        None if base is None else _misfit(config, os.fspath(base)),
    )


def _misfit(config: VisualConfig, base: str) -> str | None:
    """Why an adapter does not fit a base model, found by attaching it to the model without weights."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None

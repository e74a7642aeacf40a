"""Says what a saved adapter is, and whether it fits a base model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, inject_adapter_in_model

from .adapter_file import SavedConfig, open_adapter, open_ours, read_tensors
from .base_checkpoint import without_weights
from .companions import Companion, as_json, method_of


@dataclass(frozen=True)
class Inspection:
    """What a saved adapter is.

    Attributes:
        method: The method's name in lower case.
        parameters: How many numbers it holds.
        num_bytes: Of its tensors.
        dtypes: Of its tensors.
        gates: The gates of each branch that it adds beside the base's modules, by layer index.
        config: The fields of its configuration.
        base: The base model that it was compared with; `None`: none.
        misfit: Why it does not fit that; `None`: it does, or was not compared.
        trained_with: The adapters that it was trained together with.
    """

    method: str
    parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    gates: list[dict[int, float]]
    config: dict[str, Any]
    base: str | None
    misfit: str | None
    trained_with: tuple[Companion, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        fields = dataclasses.asdict(self)
        return {**fields, "dtypes": list(self.dtypes), "trained_with": list(fields["trained_with"])}


def inspect_adapter(adapter: str | os.PathLike, base: str | os.PathLike | None = None, **kwargs: Any) -> Inspection:
    """Read what a saved adapter is, and whether it fits a base model.

    Args:
        adapter: Folder or Hub id.
        base: Folder or Hub id of a base model, of which only the configuration is read; `None`: not compared.
        kwargs: Arguments of `PeftConfig.from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        ValueError: It is damaged, or of no method that PEFT or this package knows.
        FileNotFoundError: It has no weights file.
    """
    config, file = open_adapter(adapter, PeftConfig, "an adapter", **kwargs)
    gates: list[dict[int, float]] = []
    if isinstance(config, SavedConfig):
        config, file = open_ours(adapter, **kwargs)
        tensors = read_tensors(config, file) if config.has_parameters else {}
        gates = config.gates(tensors)
    else:
        tensors = dict(file.read())
    return Inspection(
        method_of(config).lower(),
        sum(tensor.numel() for tensor in tensors.values()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        gates,
        {name: value for name, value in as_json(config).items() if value is not None},
        None if base is None else os.fspath(base),
        None if base is None else _misfit(config, os.fspath(base)),
        file.companions(),
    )


def _misfit(config: PeftConfig, base: str) -> str | None:
    """Why an adapter does not fit a base model, found by attaching it to the model without weights."""
    model = without_weights(base)
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None

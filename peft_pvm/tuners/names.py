"""Names of adapters: which can be used, how one is made from the name of a folder, and how several are written."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..utils.packages import is_tuner_child


FORM = re.compile(r"[\w-]+")
TOGETHER = "+"  # between adapters that are on at once: commas and semicolons end arguments elsewhere
LONGEST = 200  # bytes: adapters are saved in folders of their names
# What a container of weights has itself cannot be the name of weights in it.
RESERVED = {*dir(nn.ModuleDict()), "base_model", "modules_to_save", "original_module"}


def check_adapter_name(name: Any, model: nn.Module) -> None:
    """Check that an adapter can have this name: its weights are kept and its file is written under it.

    Args:
        name: The name.
        model: The model that the adapter is to be attached to.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(name, str) or not FORM.fullmatch(name) or len(name.encode()) > LONGEST:
        shown = repr(name)
        raise ValueError(
            f"An adapter cannot be named {shown if len(shown) <= 60 else shown[:60] + ' ...'}. A name consists of "
            f"letters, digits, '_' and '-' and is at most {LONGEST} bytes long. Pass another adapter_name."
        )
    if name in RESERVED or name in _parts_of_names(model):
        raise ValueError(
            f"An adapter cannot be named {name!r}: {type(model).__name__} or PyTorch has something of that name, and "
            f"PEFT would mistake one for the other. Pass another adapter_name, such as {'adapter-' + name!r}."
        )


def separate(adapter: str | os.PathLike | Sequence[str]) -> list[str]:
    """The adapters in an argument that says which are on at once: those of a sequence, or with `+` between.

    Args:
        adapter: Folders or Hub ids.

    Raises:
        ValueError: One of them has no name.

    Example:
        >>> separate("mine+adapters/another")
        ['mine', 'adapters/another']
    """
    parts = os.fspath(adapter).split(TOGETHER) if isinstance(adapter, (str, os.PathLike)) else list(map(str, adapter))
    if not all(part.strip() for part in parts):
        raise ValueError(f"adapter is {adapter!r}, but must be folders or Hub ids, with {TOGETHER} between.")
    return parts


def adapter_names(sources: Collection[str], model: nn.Module | None = None) -> dict[str, str]:
    """A name for each adapter, from its folder or Hub id. Names that are taken are numbered.

    Args:
        sources: Folders or Hub ids.
        model: The model that they are to be attached to.

    Returns:
        Sources by name, in their order.

    Example:
        >>> adapter_names(["runs/pvm", "someone/pvm", "dipe-1.0/", "runs/eval"])
        {'pvm': 'runs/pvm', 'pvm-2': 'someone/pvm', 'dipe-1-0': 'dipe-1.0/', 'adapter-eval': 'runs/eval'}
    """
    taken = set(getattr(model, "peft_config", {}))
    clashing = RESERVED if model is None else RESERVED | _parts_of_names(model)
    names: dict[str, str] = {}
    for source in sources:
        folder = Path(source).resolve().name if source in (".", "..") else Path(source).name
        stem = re.sub(r"[^\w-]+", "-", folder).encode()[: LONGEST // 2].decode(errors="ignore")
        if not stem or stem in clashing - taken:
            stem = f"adapter-{stem}".rstrip("-")
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        names[name] = source
    return names


def _parts_of_names(model: nn.Module) -> set[str]:
    """What the names of the model's tensors consist of, those of our layers aside."""
    ours = {
        inner
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and is_tuner_child(layer)
        for inner in layer.modules()
    }
    parts = set()
    for name, module in model.named_modules():
        if module not in ours:
            parts |= {name.rpartition(".")[2], *module._parameters, *module._buffers}
    return parts

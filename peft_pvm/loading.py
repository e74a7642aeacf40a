"""Loading adapters of whatever types onto one model, by transformers' own adapter API."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .text import listed, plain


def adapter_names(sources: Collection[str]) -> dict[str, str]:
    """A name for each adapter, from its folder or Hub id; those that are alike are numbered.

    Args:
        sources: Folders or Hub ids.

    Returns:
        Sources by name, in their order.

    Example:
        >>> adapter_names(["runs/pvm", "someone/pvm", "dipe-1.0/"])
        {'pvm': 'runs/pvm', 'pvm-2': 'someone/pvm', 'dipe-1-0': 'dipe-1.0/'}
    """
    names: dict[str, str] = {}
    for source in sources:
        # Modules are looked up by adapter name, in which a dot would separate two.
        stem = re.sub(r"[^\w-]+", "-", Path(source).resolve().name if source in (".", "..") else Path(source).name)
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = source
    return names


def load_adapters(model: Any, sources: Collection[str]) -> list[str]:
    """Attach saved adapters to a model, in place; all of them act.

    Args:
        model: A transformers model.
        sources: Folders or Hub ids.

    Returns:
        The adapters' names on the model.

    Raises:
        ValueError: An adapter cannot be read, does not fit, or leaves something without weights.
    """
    names = adapter_names(sources)
    for name, source in names.items():
        _load(model, name, source)
    if names:
        model.set_adapter(list(names))
    return list(names)


def _load(model: Any, name: str, source: str) -> None:
    refusal = f"The adapter {plain(source, 100)} does not fit {type(model).__name__} or cannot be read"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
            loaded = model.load_adapter(source, adapter_name=name)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(plain(f"{refusal}: {error}", keep="\n")) from error
    # transformers would only warn, and run with half an adapter.
    missing = sorted(key for key in loaded.missing_keys if f".{name}." in key)
    strays = sorted(loaded.unexpected_keys)
    if missing or strays:
        lacks = f"it lacks {listed(missing)}" if missing else ""
        brings = f"nothing takes its {listed(strays)}" if strays else ""
        raise ValueError(f"{refusal}: {' and '.join(filter(None, (lacks, brings)))}.")

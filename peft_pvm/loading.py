"""Loading adapters of whatever types onto one model, by transformers' own adapter API."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from .names import adapter_names


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
    names = adapter_names(sources, model)
    for name, source in names.items():
        _load(model, name, source)
    if names:
        model.set_adapter(list(names))
    return list(names)


def _load(model: Any, name: str, source: str) -> None:
    refusal = f"The adapter {source} does not fit {type(model).__name__} or cannot be read"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several are wanted
            loaded = model.load_adapter(source, adapter_name=name)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(f"{refusal}: {error}") from error
    # transformers would only warn, and run with half an adapter.
    missing = sorted(key for key in loaded.missing_keys if f".{name}." in key)
    strays = sorted(loaded.unexpected_keys)
    if missing or strays:
        lacks = f"it lacks {len(missing)} tensors ({missing[0]} ...)" if missing else ""
        brings = f"{len(strays)} of its tensors belong to nothing ({strays[0]} ...)" if strays else ""
        raise ValueError(f"{refusal}: {' and '.join(filter(None, (lacks, brings)))}.")

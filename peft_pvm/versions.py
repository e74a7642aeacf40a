"""Which versions of transformers and PEFT are supported, and every name that differs between them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_outputs import BaseModelOutputWithPast


# The oldest and the newest minor version that the tests run on. pyproject.toml and README.md say the same.
SUPPORTED = {"transformers": ("5.16", "5.24"), "peft": ("0.20", "0.21")}

# The argument that takes a KV cache, and the field of an output that holds it. Renamed in transformers 5.24, which
# also takes the old name of the argument.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)

# By modality, the keywords of a multimodal forward that bring its features. `generate` encodes them beforehand and
# hands over a dict by modality; Idefics3 and its kin also take a tensor of image features, under either name.
FEATURE_KEYWORDS = {
    "image": ("pixel_values", "image_hidden_states"),
    "video": ("pixel_values_videos",),
}
ENCODED_FEATURES = "mm_encoder_outputs"

# Older ones warn that the tensors of `modules_to_save` are unexpected, and run without them.
LOADS_MODULES_TO_SAVE = "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter)


def supported_ranges() -> str:
    """The supported versions in words.

    Example:
        >>> supported_ranges()
        'transformers 5.16 to 5.24 and peft 0.20 to 0.21'
    """
    return " and ".join(f"{package} {oldest} to {newest}" for package, (oldest, newest) in SUPPORTED.items())


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Refuse versions that are too old, and warn of those that nobody has tested.

    Args:
        installed: Versions by package; `None`: those that are installed.

    Raises:
        ImportError: A package is older than the oldest supported version.
    """
    if installed is None:
        installed = {package: importlib.metadata.version(package) for package in SUPPORTED}
    untested = []
    for package, (oldest, newest) in SUPPORTED.items():
        found = f"{package} {installed[package]}"
        if _minor(installed[package]) < _minor(oldest):
            raise ImportError(f"peft_pvm supports {supported_ranges()}, but {found} is installed. Upgrade {package}.")
        if _minor(installed[package]) > _minor(newest):
            untested.append(found)
    if untested:
        warnings.warn(
            f"peft_pvm is tested with {supported_ranges()}, but {' and '.join(untested)} is installed. It may work: "
            "compare its outputs with those on a tested version.",
            stacklevel=2,
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def cache_in(inputs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the inputs of a forward, by whatever name it was given."""
    return next((inputs[name] for name in CACHE_NAMES if isinstance(inputs.get(name), Cache)), None)


def caches_in(output: Any) -> list[Cache]:
    """The KV caches in what a text model returned."""
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Cache)]


def paged_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """The inputs of a forward that several conversations share one row of: a paged cache, and the tables for it."""
    paged = [name for name in CACHE_NAMES if isinstance(inputs.get(name), PagedAttentionCache)]
    return paged + [name for name in ("cu_seq_lens_q", "block_table") if inputs.get(name) is not None]


def modalities_in(inputs: Mapping[str, Any]) -> list[str]:
    """The modalities that bring features to a multimodal forward, encoded beforehand or not."""
    encoded = inputs.get(ENCODED_FEATURES)
    if encoded is not None and not isinstance(encoded, Mapping):
        encoded = {"image": encoded}
    return [
        modality
        for modality, keywords in FEATURE_KEYWORDS.items()
        if (encoded or {}).get(modality) is not None or any(inputs.get(keyword) is not None for keyword in keywords)
    ]

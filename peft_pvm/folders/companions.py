"""What an adapter was trained together with, as it is noted in the metadata of its weights file.

An adapter that learns beside others computes the same later only if they act too. The note is kept with the weights
because it is about them: whoever writes other weights into the folder replaces it, and reading it needs no further
request to the Hub. Other programs do not read it, whereas stock PEFT answers an unknown field of the configuration
with the advice to upgrade.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import PeftType

from ..utils.checks import is_text
from ..utils.text import plain, quoted
from .data_file import parse_json


KEY = "trained_with"  # in the metadata
MOST_COMPANIONS = 100
LONGEST_NOTE = 2**20  # characters
NOTED = "_trained_with"  # of a configuration that was loaded: the companions that its weights file speaks of
# Fields that say where an adapter comes from or how it started, not what it computes.
OF_ORIGIN = {field.name for field in dataclasses.fields(PeftConfig)} | {"format_version", "lineage"}


@dataclass(frozen=True)
class Companion:
    """An adapter that acted while another one was trained.

    Attributes:
        name: Its name on that model.
        method: Its type, as PEFT calls it.
        fields: What its configuration says of what it computes, as JSON holds it.
        weights: A hash of its weights; `None`: it has none, or they were out of reach.
    """

    name: str
    method: str
    fields: dict[str, Any]
    weights: str | None

    def __str__(self) -> str:
        return f"{quoted(self.name)} ({plain(self.method, 40)})"

    @property
    def settings(self) -> str:
        """What tells it from others of its type, in words: the hash of its weights, or else its fields."""
        if self.weights is not None:
            return f"weights {plain(self.weights, 64)}"
        chosen = {name: value for name, value in self.fields.items() if value is not None}
        return ", ".join(f"{plain(name, 100)}={quoted(value)}" for name, value in chosen.items())

    def differences(self, other: Companion) -> list[str]:
        """What another adapter of this type has that this one had not, each in words.

        Args:
            other: The adapter. Fields that only one of the two knows are not compared: versions differ in them.
        """
        found = [
            f"{plain(name, 100)}={quoted(other.fields[name])} in place of {quoted(value)}"
            for name, value in self.fields.items()
            if name in other.fields and other.fields[name] != value
        ]
        if self.weights is not None and self.weights != other.weights:
            found.append("other weights")
        return found


def method_of(config: PeftConfig) -> str:
    """The type of a configuration's adapter, as PEFT calls it, such as "LORA"."""
    return PeftType(config.peft_type).value


def fields_of(config: PeftConfig) -> dict[str, Any]:
    """The fields of a configuration that say what its adapter computes, as JSON holds them."""
    fields = as_json(config).items()
    return {name: value for name, value in fields if name not in OF_ORIGIN and not name.startswith("init_")}


def as_json(config: PeftConfig) -> dict[str, Any]:
    """The fields of a configuration, as JSON holds them: sets become sorted lists."""
    fields = json.dumps(
        config.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return json.loads(fields)


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A hash of weights, 16 hexadecimal digits, whatever dtype holds the same numbers; `None` on the meta device.

    Args:
        tensors: By their names.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return None
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def of_all(configs: Iterable[PeftConfig]) -> tuple[Companion, ...]:
    """The companions of what is made from several adapters: those of each, once.

    Args:
        configs: Of the adapters, as they were loaded.
    """
    found: dict[str, Companion] = {}
    for companion in (companion for config in configs for companion in vars(config).get(NOTED, ())):
        found.setdefault(as_note([dataclasses.replace(companion, name="")]), companion)
    return tuple(found.values())


def as_note(companions: Collection[Companion]) -> str:
    """The note about companions, which `read_note` reads."""
    return json.dumps([dataclasses.asdict(companion) for companion in companions])


def read_note(note: str, where: str) -> tuple[Companion, ...]:
    """The companions that a note speaks of.

    Args:
        note: As it is in the file.
        where: The file, for the message.

    Raises:
        ValueError: It does not say what it should.
    """
    source = f"{KEY!r} in the metadata of {plain(where, 200)}"
    content = parse_json(note, source, LONGEST_NOTE)
    if not isinstance(content, list) or len(content) > MOST_COMPANIONS or not all(map(_is_companion, content)):
        raise ValueError(
            f"{source} does not say which adapters this one was trained together with: it must hold at most "
            f"{MOST_COMPANIONS} objects with name, method, fields and weights."
        )
    return tuple(Companion(**companion) for companion in content)


def _is_companion(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in dataclasses.fields(Companion)}
        and is_text(value["name"], 200)
        and is_text(value["method"], 100)
        and isinstance(value["fields"], dict)
        and (value["weights"] is None or is_text(value["weights"], 64))
    )

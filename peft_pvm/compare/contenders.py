"""What is compared: the base, trivial controls, methods at their defaults, and adapters of the user."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..methods import METHODS, LogBiasConfig, VARConfig
from ..probe.rows import Lesson, ask
from ..probe.sinks import outliers, proposed
from ..tuners.active import attached, base_of
from ..tuners.base import VisualConfig
from ..tuners.loading import loaded
from ..tuners.names import TOGETHER, adapter_names, separate
from .tasks import Asked


BASE, TEMPERATURE = "base", "temperature"
CONTROL, METHOD, ADAPTER = "control", "method", "adapter"
WARMTH = 0.7  # of the control that samples
FEW = 8  # questions that show a model's sinks, as many as `peft-pvm sinks` reads
UNTRAINED = {method.name.lower(): method for method in METHODS if not method.needs_training}
NULL = next(name for name, method in UNTRAINED.items() if method.config is LogBiasConfig)
OF_ALL = {*(field.name for field in dataclasses.fields(PeftConfig)), "format_version", "init_weights"}


@dataclass(frozen=True)
class Contender:
    """One way to have a model answer.

    Attributes:
        name: What tables call it.
        kind: `CONTROL`, `METHOD` or `ADAPTER`.
        config: What is attached.
        adapters: Folders or Hub ids of what is loaded; all act together.
        temperature: Of sampling; `None`: greedy.
    """

    name: str
    kind: str
    config: VisualConfig | None = None
    adapters: Sequence[str] = ()
    temperature: float | None = None

    def settings(self) -> dict[str, Any]:
        """What decides its answers, as JSON holds it."""
        said: dict[str, Any] = {"kind": self.kind}
        if self.config is not None:
            said |= {name: value for name, value in self.config.to_dict().items() if name not in OF_ALL}
        if self.adapters:
            said["adapters"] = {source: _fingerprint(source) for source in self.adapters}
        if self.temperature is not None:
            said["temperature"] = self.temperature
        return said

    @contextlib.contextmanager
    def acting(self, model: nn.Module) -> Iterator[None]:
        """Have it act on a model without adapters, for the length of a block."""
        if self.config is not None:
            with attached(model, self.config):
                yield
        elif self.adapters:
            with loaded(base_of(model), self.adapters):
                yield
        else:
            yield


def contenders(methods: Collection[str] | None = None, adapters: Sequence[str] = ()) -> list[Contender]:
    """The base, the controls, methods and adapters, in the order in which they run.

    Args:
        methods: Lower-case names of methods that need no training; `None`: all.
        adapters: Folders or Hub ids, or several with `+` between, which act together.

    Raises:
        ValueError: There is no such method, or it has to be trained first.
    """
    for name in methods or ():
        if name not in UNTRAINED:
            raise ValueError(
                f"{name!r} is not a method that needs no training: {', '.join(UNTRAINED)}. Give a trained adapter "
                "with --adapter."
            )
    chosen = [name for name in UNTRAINED if name != NULL and (methods is None or name in methods)]
    names: dict[str, str] = {}  # of adapters, by what they are loaded from
    for source in adapters:
        taken = {BASE, TEMPERATURE, *(method.name for method in UNTRAINED.values()), *names.values()}
        short = TOGETHER.join(adapter_names(separate(source)))
        names[source] = next(name for name in _numbered(short) if name not in taken)
    return [
        Contender(BASE, CONTROL),
        Contender(TEMPERATURE, CONTROL, temperature=WARMTH),
        Contender(UNTRAINED[NULL].name, CONTROL, UNTRAINED[NULL].config()),
        *(Contender(UNTRAINED[name].name, METHOD, UNTRAINED[name].config()) for name in chosen),
        *(Contender(name, ADAPTER, adapters=separate(source)) for source, name in names.items()),
    ]


class NothingToDo(Exception):
    """A contender would leave the model as it is. The message says why."""


def needs_channels(contender: Contender) -> bool:
    """Whether this is VAR without sink channels."""
    return isinstance(contender.config, VARConfig) and contender.config.sink_channels is None


def with_channels(
    contender: Contender, model: nn.Module, processor: Any, asked: Sequence[Asked], known: Sequence[int] | None
) -> Contender:
    """VAR with the sink channels that `peft-pvm sinks` would propose on the first questions.

    Args:
        contender: VAR without channels.
        model: The model; its adapters are off.
        processor: Its processor.
        asked: All questions.
        known: Channels that were found before. `None`: they are to be found.

    Raises:
        NothingToDo: There are no such channels, or no visual token is a sink by them.
        ValueError: VAR cannot act on the model.
        NotImplementedError: Its layers have several residual streams.
    """
    config = cast(VARConfig, contender.config)
    if known is None:
        few = asked[:FEW]
        lessons = (Lesson(ask(processor, one.messages, one.question.images), 0) for one in few)
        found = proposed(outliers(model, lessons, len(few), config.tau, None), config.tau)
        if not found.visual_share:
            raise NothingToDo(found.reason)
        known = found.channels
    return dataclasses.replace(contender, config=dataclasses.replace(config, sink_channels=list(known)))


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _fingerprint(source: str) -> str | None:
    """The first 16 hexadecimal digits of the SHA-256 of a folder's configuration and weights; `None` for a Hub id."""
    files = [Path(source, name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]

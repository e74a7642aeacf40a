"""The findings about the real base: what each is called, what measures it, and where it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_pvm.demo.mosaic import Split
from peft_pvm.tuners.names import separate

from ..arithmetic import one_thread
from .costs import costs
from .heads import dipe_heads
from .knowing import readable, text
from .looking import attention, calibration, dipe_layers, limit
from .study import Study


@dataclass(frozen=True)
class Finding:
    """A question about the real base.

    Attributes:
        measure: Measures what answers it.
        rows: How many rows it takes unless others are wanted.
    """

    measure: Callable[[Study], None]
    rows: int


FINDINGS = {
    "attention": Finding(attention, 6),
    "dipe-layers": Finding(dipe_layers, 16),
    "dipe-heads": Finding(dipe_heads, 16),
    "limit": Finding(limit, 6),
    "calibrate": Finding(calibration, 4),
    "readable": Finding(readable, 40),
    "text": Finding(text, 25),
    "costs": Finding(costs, 3),
}


@dataclass(frozen=True)
class FindingPlan:
    """What is measured, and on what.

    Attributes:
        names: Keys of `FINDINGS`.
        rows: Rows in each cell; `None`: each finding's own number.
        split: Where digits and text come from.
        seed: Decides them.
    """

    names: tuple[str, ...] = tuple(FINDINGS)
    rows: int | None = None
    split: Split = "test"
    seed: int = 0


def find(
    base: str | os.PathLike,
    plan: FindingPlan,
    out: str | os.PathLike,
    adapters: Sequence[str] = (),
    gguf: Path | None = None,
) -> list[Path]:
    """Measure findings. What was measured before is not measured again.

    Args:
        base: Folder of the real base.
        plan: What is measured.
        out: Folder of the results, one JSON file for each finding.
        adapters: Folders of adapters, or several with `+` between, which the finding "text" tests beside the methods.
        gguf: The GGUF file of the language model under the base, which "text" compares with.

    Returns:
        The files.

    Raises:
        FileNotFoundError: There is no such base or adapter.
        ValueError: Something cannot be read, or the results that are there are about something else.
    """
    needed = [
        Path(folder, name)
        for together in adapters
        for folder in separate(together)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    ]
    for path in needed if gguf is None else [*needed, gguf]:
        if not path.is_file():  # now, not after an hour
            raise FileNotFoundError(f"There is no file {path}, which the finding 'text' needs.")
    paths = []
    for name in plan.names:
        path = Path(out, f"{name}.json")
        rows = plan.rows or FINDINGS[name].rows
        study = Study(name, base, path, rows, plan.split, plan.seed, tuple(adapters), gguf)
        with one_thread():
            FINDINGS[name].measure(study)
        paths.append(path)
    return paths

"""What a training with `GazeCallback` logged, as a picture: loss or reward, PVM's gates, the size of its updates.

The names under which it logs are made and read here. Nothing here needs TRL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..folders.data_file import holding, read_json
from ..utils.plotting import as_png, line_look, new_figure, styled


STATE = "trainer_state.json"  # in a checkpoint of transformers' Trainer, and where `save_state` puts it
VISUAL_MASS = "gaze/visual_mass"  # the name of the share of attention that reaches visual tokens
BRANCH_KEY = re.compile(r"gaze/(?P<kind>gate|update)/(?P<adapter>[^/]+)/(?P<layer>\d+)")


def branch_key(kind: Literal["gate", "update"], adapter: str, layer_idx: int) -> str:
    """The name under which a number of one PVM adapter in one layer is logged, which `BRANCH_KEY` reads.

    Example:
        >>> branch_key("gate", "default", 10)
        'gaze/gate/default/10'
    """
    return f"gaze/{kind}/{adapter}/{layer_idx}"


def read_log(folder: str | os.PathLike) -> list[dict[str, float]]:
    """The numbers that a trainer logged.

    Args:
        folder: An output folder or a checkpoint of transformers' `Trainer`.

    Raises:
        FileNotFoundError: There is no `trainer_state.json`.
        ValueError: It is damaged.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {STATE} in {folder}: give a checkpoint, or a folder that save_state wrote."
        )
    state = read_json(path)
    with holding(path, "what a trainer logged"):
        return [
            {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
            for entry in state["log_history"]
        ]


@styled
def draw_curves(log: Sequence[Mapping[str, float]]) -> bytes:
    """Three panels over steps: loss, or the reward if there is one; gates; updates over the residual stream. A PNG.

    Args:
        log: What `read_log` returns.

    Raises:
        ValueError: It holds neither loss nor reward.
    """
    score = next((name for name in ("reward", "loss") if any(name in entry for entry in log)), None)
    if score is None:
        raise ValueError("The log holds neither a loss nor a reward: nothing was logged before it was saved.")
    figure, axes = new_figure(2.6, columns=3)
    panels = {score: axes[0][0], "gate": axes[0][1], "update": axes[0][2]}
    panels[score].plot(*_series(log, score), **line_look(0, 0.1))
    found = filter(None, map(BRANCH_KEY.fullmatch, {name for entry in log for name in entry}))
    logged = sorted((key["kind"], key["adapter"], int(key["layer"]), key[0]) for key in found)
    for kind, title in (("gate", "gate"), ("update", "update / residual stream")):
        of_kind = [key for key in logged if key[0] == kind]
        for number, (_, adapter, layer, name) in enumerate(of_kind):
            label = f"layer {layer}" if adapter in ("default", "pvm") else f"{adapter}, layer {layer}"
            panels[kind].plot(*_series(log, name), label=label, **line_look(number, 0.1))
        panels[kind].set_ylabel(title)
        if of_kind:
            panels[kind].legend()
    panels[score].set_ylabel(score)
    for panel in panels.values():
        panel.set_xlabel("step")
    return as_png(figure)


def _series(log: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    entries = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    return [step for step, _ in entries], [value for _, value in entries]

"""Where a model looks while it writes, token by token. The probe's own forwards say more, but afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.call import AttentionCall
from ..tokens.families import VisionLanguageModel
from ..utils.html import render
from ..utils.plotting import COLOURS
from .maps import heat
from .measures import numbers
from .observers import AttentionObserver, calling
from .words import percent


WIDTH, HEIGHT = 300, 60  # of the curves' plane, which is stretched over the page


@dataclass(frozen=True)
class Glance:
    """Where a model looked when it chose a token.

    Attributes:
        share: Of its attention, what reached the visual tokens, averaged over heads and layers.
        weights: What reached each of them, the same average.
    """

    share: float
    weights: list[float]


class Watcher(AttentionObserver):
    """Watches the steps of `generate` in which a single token is read, the first of them after each `glance`.

    What reads the prompt is left out, because to watch it would take as long as to read it. So are forwards that a
    method runs beside a step.
    """

    def __init__(self) -> None:
        super().__init__(num_queries=1)

    def __call__(self, call: AttentionCall) -> None:
        if call.query.shape[2] == 1 and call.module.layer_idx not in self.masses:
            super().__call__(call)

    def glance(self) -> Glance | None:
        """Where the model looked in the last step; `None` if it read the prompt."""
        masses = list(self.masses.values())
        self.masses.clear()
        if not masses:
            return None
        most = max(mass.per_token.shape[1] for mass in masses)
        # A layer with a sliding window has dropped the first visual tokens.
        padded = [torch.nn.functional.pad(mass.per_token[0], (most - mass.per_token.shape[1], 0)) for mass in masses]
        weights = torch.stack(padded).mean(0)
        return Glance(float(weights.sum()), numbers(weights))


@contextlib.contextmanager
def watched(vlm: VisionLanguageModel) -> Iterator[Watcher]:
    """Watch a model, for the length of a block. Nothing of it changes.

    Args:
        vlm: The model's parts; adapters may be attached.

    Raises:
        ValueError: The model's attention cannot be reached.
    """
    watcher = Watcher()
    with calling(vlm, watcher):
        yield watcher


def panel(picture: bytes, grids: Sequence[tuple[int, int]], seen: Mapping[str, Sequence[Glance]]) -> str:
    """What was seen so far, as HTML for a page: the latest look of each answer over the image, and a curve for each.

    Args:
        picture: The image, a PNG file.
        grids: Rows and columns of visual tokens, if they are known: one pair.
        seen: By whose answer it is.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    latest = {name: glances[-1] for name, glances in seen.items() if glances}
    strongest = max((max(glance.weights) for glance in latest.values()), default=0.0) or 1.0
    rows, columns = grids[0] if grids else (1, -1)
    maps = {name: heat(np.array(glance.weights).reshape(rows, columns) / strongest) for name, glance in latest.items()}
    highest = max((glance.share for glances in seen.values() for glance in glances), default=0.0) or 1.0
    longest = max(2, *map(len, seen.values()))
    curves = {
        name: [(WIDTH * token / (longest - 1), HEIGHT * (1 - glance.share / highest)) for token, glance in at]
        for name, at in ((name, list(enumerate(glances))) for name, glances in seen.items())
    }
    return render(
        "probe/live.html",
        picture=picture if grids else None,
        latest=latest,
        maps=maps,
        curves=curves,
        places={name: place for place, name in enumerate(seen)},
        highest=highest,
        colours=COLOURS,
        percent=percent,
        width=WIDTH,
        height=HEIGHT,
    )

"""Where a model looks, laid over its images: a small transparent picture for each map, and what lies under it."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.html import render
from ..utils.plotting import COLOURS
from .findings import Findings
from .observers import Glance
from .words import percent, shown


STRIP = (1, 12)  # sides of a map where it is not known how the tokens lie on the image
COARSE = 128  # pixels: images that are less wide are shown pixel by pixel
WIDTH, HEIGHT = 300, 60  # of the plane of the curves in `panel`, which is stretched over the page
STRONGEST = 0.75  # the opacity of the strongest colour


@dataclass(frozen=True)
class Frame:
    """What lies under the maps of one image.

    Attributes:
        height: Of the picture or, without one, of the grid of tokens.
        width: The same.
        image: The picture, a PNG file, if there is one.
    """

    height: int
    width: int
    image: bytes | None

    @property
    def is_coarse(self) -> bool:
        """Whether its pixels are to be seen."""
        return self.width < COARSE


@dataclass(frozen=True)
class Overlay:
    """One map of one image.

    Attributes:
        png: The PNG file, a pixel for each visual token, transparent where the model does not look.
        alternative: The text in its place where it cannot be seen.
    """

    png: bytes
    alternative: str


@dataclass(frozen=True)
class Map:
    """Where a forward or a branch looks at one token, or over the whole answer.

    Attributes:
        share: What reaches all visual tokens together.
        overlays: One for each frame.
    """

    share: float
    overlays: list[Overlay]


@dataclass(frozen=True)
class Maps:
    """Maps of the same images.

    Attributes:
        titles: What a row has a map for.
        rows: By the name of what looks, the maps for each title.
        scales: For each title, the weight of one visual token at which the colour is strongest, in all rows.
    """

    titles: list[str]
    rows: dict[str, list[Map]]
    scales: list[float]


def pictures_of(result: Findings) -> list[Frame]:
    """The images of the prompt by themselves."""
    return [_framed(image) for image in result.images]


def _framed(png: bytes) -> Frame:
    width, height = struct.unpack(">II", png[16:24])  # the header of a PNG file
    return Frame(height, width, png)


def frames(result: Findings) -> list[Frame]:
    """One for each image whose tokens lie in a known grid; otherwise one for all visual tokens in a row."""
    if not result.grids:
        return [Frame(*STRIP, None)]
    pictures = pictures_of(result)[: len(result.grids)]
    return [*pictures, *(Frame(*grid, None) for grid in result.grids[len(pictures) :])]


def looks(result: Findings) -> Maps:
    """Where each forward looks, over the whole answer and at some of its tokens. Each of these has its own scale."""
    titles = ["whole answer", *_titles(result, result.base.maps)]
    rows = {forward.label: [forward.mean_map, *forward.maps.values()] for forward in result.forwards}
    # Beside sinks, all else would be dark.
    sinks = {sink for forward in result.forwards for layer in forward.attention for sink in layer.sinks}
    counted = [token for token in range(result.num_visual_tokens) if token not in sinks]
    scales = [
        max((weights[token] for weights in of_title for token in counted), default=0.0)
        for of_title in zip(*rows.values())
    ]
    return _drawn(result, titles, rows, scales)


def retrievals(result: Findings) -> Maps:
    """Where each branch of PVM reads its memory, at some tokens, in one scale."""
    tokens = result.retrieval_tokens
    rows = {
        f"{branch.adapter}, layer {branch.layer_idx}": [branch.retrieval[token] for token in tokens]
        for branch in result.branches
        if tokens
    }
    largest = max((weight for row in rows.values() for weights in row for weight in weights), default=0.0)
    return _drawn(result, _titles(result, tokens), rows, [largest] * len(tokens))


def _titles(result: Findings, tokens: Iterable[int]) -> list[str]:
    return [f"{token}: {shown(result.tokens[token])}" for token in tokens]


def _drawn(
    result: Findings, titles: list[str], rows: Mapping[str, Sequence[Sequence[float]]], scales: list[float]
) -> Maps:
    drawn = {
        name: [
            Map(sum(weights), _overlays(result, f"{name}, {title}", weights, scale or 1.0))
            for title, weights, scale in zip(titles, row, scales)
        ]
        for name, row in rows.items()
    }
    return Maps(titles, drawn, scales)


def _overlays(result: Findings, name: str, weights: Sequence[float], largest: float) -> list[Overlay]:
    overlays, start = [], 0
    for rows, columns in result.grids or [(1, result.num_visual_tokens)]:
        part = np.array(weights[start : start + rows * columns]).reshape(rows, columns)
        row, column = np.unravel_index(part.argmax(), part.shape)
        alternative = (
            f"{name}: {percent(float(part.sum()))}, most at row {row + 1} of {rows}, column {column + 1} of {columns}."
        )
        overlays.append(Overlay(heat(part / largest), alternative))
        start += rows * columns
    return overlays


def heat(strength: np.ndarray) -> bytes:
    """A PNG file, a pixel for each number.

    Args:
        strength: `(rows, columns)`. From 0, which is transparent, to 1; more counts as 1. Colours follow the square
            root, so that what is weak can be seen.
    """
    from matplotlib import colormaps
    from matplotlib.image import imsave

    root = np.sqrt(strength.clip(0, 1))
    pixels = colormaps["inferno"](root)
    pixels[..., 3] = STRONGEST * root
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return buffer.getvalue()


def panel(picture: bytes, grids: Sequence[tuple[int, int]], seen: Mapping[str, Sequence[Glance]]) -> str:
    """What was seen so far, as HTML for a page: the latest look of each answer over the image, and a curve for each.

    Args:
        picture: The image, a PNG file.
        grids: Rows and columns of visual tokens, if they are known: one pair.
        seen: The looks of each answer, by its name.

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

"""Accuracy against latency, as a picture: who is better or faster than whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.plotting import COLOURS, MARKERS, as_png, logarithmic, new_figure, styled
from .comparison import Comparison
from .statistics import Estimate


Point = tuple[float, float]  # the time of an answer, accuracy


def front(points: Mapping[str, Point]) -> list[str]:
    """The names that no other beats: none is faster without being less accurate. They are sorted by time.

    Example:
        >>> front({"base": (1.0, 0.5), "slow": (2.0, 0.9), "slower": (3.0, 0.9)})
        ['base', 'slow']
    """
    best, kept = -1.0, []
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            best = accuracy
            kept.append(name)
    return kept


@styled
def draw_pareto(comparison: Comparison) -> bytes:
    """A panel for all lengths together and, of several, one for the longest, as PNG."""
    lengths = comparison.lengths
    panels = {f"mean of {', '.join(f'{length:,}' for length in lengths)} tokens of text": lengths}
    if len(lengths) > 1:
        panels[f"{lengths[-1]:,} tokens of text"] = lengths[-1:]
    else:
        panels = {f"{lengths[0]:,} tokens of text": lengths}
    figure, axes = new_figure(4.2, columns=len(panels), sharey=True)
    for panel, (title, chosen) in zip(axes[0], panels.items()):
        _draw(panel, comparison, chosen)
        panel.set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return as_png(figure)


def _draw(panel: Any, comparison: Comparison, lengths: Sequence[int]) -> None:
    points: dict[str, Point] = {}
    for number, (name, cells) in enumerate(comparison.cells.items()):
        colour = COLOURS[(number + number // len(MARKERS)) % len(COLOURS)]
        look = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 6, "linestyle": "none"}
        slowdown = comparison.slowdown(name, lengths) if cells.keys() >= set(lengths) else None
        if slowdown is None:  # it refused or has no time, but may be in the other panel
            if cells:
                panel.plot([], [], label=name, **look)
            continue
        accuracy = Estimate.of(comparison.accuracies(name, lengths))
        points[name] = slowdown, accuracy.mean
        panel.errorbar(*points[name], yerr=accuracy.standard_error or 0, label=name, elinewidth=0.8, **look)
    best = [points[name] for name in front(points)]
    panel.plot(*zip(*best), color="grey", linewidth=1, linestyle=":", drawstyle="steps-post", zorder=0)
    panel.set_xlabel("time of an answer, base = 1")
    panel.set_ylim(-0.03, 1.05)
    logarithmic(panel, "x")

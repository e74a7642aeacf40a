"""A probe's result as curves: readable in print, on a phone and by the colour-blind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.plotting import as_svg, line_look, logarithmic, new_figure, styled
from ..utils.text import plain
from .findings import Findings, ForwardRecord, most_text_tokens


SMALLEST = 1e-6  # nats: below, a logarithmic axis shows noise
TOKENS, LAYERS, SHARE = "generated token (number)", "decoder layer (number)", "share of attention on the image"
WIDTH, HEIGHT = 4.2, 3.0  # inches: about the width of a phone, so that letters keep their size


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: The name of its file, without extension.
        title: Its heading.
        explanation: What it shows, in plain words.
        svg: The picture, an SVG element.
        is_detail: Whether it is folded away at first.
    """

    name: str
    title: str
    explanation: str
    svg: str
    is_detail: bool = True


def draw(result: Findings) -> list[Picture]:
    """All pictures of a result in which there is something to see. The same result gives the same bytes."""
    compared = _compared(result)
    several_tokens = len(result.tokens) > 1
    has_changed = any(max(forward.kl_to_base) > 100 * SMALLEST for forward in result.forwards)
    has_lens = all(forward.lens is not None and len(forward.lens) > 1 for forward in compared)
    layers = [layer for forward in compared for layer in forward.attention]
    wanted = {
        _by_token: several_tokens,
        _divergence: several_tokens and has_changed,
        _by_layer: True,
        _by_text: any(forward.mean_decay for forward in compared),
        _by_token_and_layer: several_tokens,
        _decay_by_layer: any(layer.decay for layer in layers),
        _sinks_by_layer: any(layer.sinks for layer in layers),
        _lens: has_lens,
        _updates: several_tokens and any(max(branch.relative_update) > 0 for branch in result.branches),
    }
    return [make(result) for make, is_wanted in wanted.items() if is_wanted]


def _compared(result: Findings) -> list[ForwardRecord]:
    """Base and all adapters together."""
    return result.forwards[:2]


def _axes() -> tuple[Any, Any]:
    figure, ((axes,),) = new_figure(HEIGHT, width=WIDTH)
    return figure, axes


def _numbered(axes: Any, label: str) -> None:
    """Label a horizontal axis that counts something."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Any) -> None:
    """Below the axes, where it covers nothing."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, labels)) > 30 else 2
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=8)


def _name(forward: ForwardRecord) -> str:
    return plain(forward.label, limit=60)


@styled
def _by_token(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(result.forwards):
        look = line_look(number, every=0.12)
        axes.plot(forward.mean_mass, label=_name(forward), **look)
    for number, forward in enumerate(_compared(result)):
        if any(layer.sinks for layer in forward.attention):
            faint = {**line_look(number, every=0.12), "linewidth": 0.8, "markersize": 2, "alpha": 0.6}
            axes.plot(forward.mean_mass_without_sinks, label=f"{_name(forward)}, without sinks", **faint)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(SHARE)
    _numbered(axes, TOKENS)
    _legend(axes)
    return Picture(
        "visual-mass",
        "Attention on the image, token by token",
        "The share of attention that reaches image and video tokens, averaged over heads and layers. If visual sinks "
        "hold a part of it, faint lines leave them out.",
        as_svg(figure),
        is_detail=False,
    )


@styled
def _divergence(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(result.forwards):
        if number > 0:
            look = line_look(number, every=0.12)
            axes.plot(np.maximum(forward.kl_to_base, SMALLEST), label=_name(forward), **look)
    logarithmic(axes, "y")
    axes.set_ylabel("KL to the base (nats)")
    _numbered(axes, TOKENS)
    _legend(axes)
    return Picture(
        "divergence",
        "How much adapters change what comes next",
        f"How far each prediction is from the base's on the same text. Differences below {SMALLEST:g} are drawn as "
        f"{SMALLEST:g}. A difference is a change, not yet an improvement.",
        as_svg(figure),
        is_detail=False,
    )


@styled
def _by_layer(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(_compared(result)):
        mean, low, high = (
            np.array([np.mean(getattr(layer, name)) for layer in forward.attention])
            for name in ("visual_mass", "lowest_head", "highest_head")
        )
        ranges = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
        axes.errorbar(_places(forward, number), mean, ranges, label=_name(forward), capsize=2, **line_look(number))
    axes.set_ylim(bottom=0)
    axes.set_ylabel(SHARE)
    _numbered(axes, LAYERS)
    _legend(axes)
    return Picture(
        "by-layer",
        "Attention on the image, layer by layer",
        "Averaged over generated tokens. The bars reach from the head that looks least to the one that looks most.",
        as_svg(figure),
        is_detail=False,
    )


def _places(forward: ForwardRecord, number: int) -> np.ndarray:
    """Where the layers of a forward are on the axis, a little beside those of the others."""
    return np.array([layer.layer_idx for layer in forward.attention]) + 0.12 * number


@styled
def _by_text(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(_compared(result)):
        look = line_look(number, every=0.12)
        text_tokens = most_text_tokens(forward.attention)
        points = {**look, "linestyle": "none", "markevery": 1}
        axes.plot(text_tokens, [mass or np.nan for mass in forward.mean_mass], label=_name(forward), **points)
        law = forward.mean_decay
        if law is not None:
            kept = [(t, mass) for t, mass in zip(text_tokens, forward.mean_mass) if t > 0 and mass > 0]
            at = np.array([t for t, _ in kept], dtype=float)
            level = np.mean(np.log([mass for _, mass in kept]) + law.exponent * np.log(at))
            label = f"exponent {law.exponent:.3f} ± {law.standard_error:.3f}"
            axes.plot(at, np.exp(level) * at**-law.exponent, label=label, **{**look, "marker": None})
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    axes.set_xlabel("text tokens seen (number)")
    axes.set_ylabel(SHARE)
    _legend(axes)
    return Picture(
        "decay",
        "How fast attention falls as text grows",
        "Both axes are logarithmic. A straight line is a power law and its slope the exponent: 1 for a fall like one "
        "over the length, 0 for none.",
        as_svg(figure),
    )


@styled
def _by_token_and_layer(result: Findings) -> Picture:
    forwards = _compared(result)
    figure, rows = new_figure(2.2 * len(forwards) + 0.3, len(forwards), width=WIDTH, sharex=True)
    largest = max(mass for forward in forwards for layer in forward.attention for mass in layer.visual_mass)
    for axes, forward in zip(rows[:, 0], forwards):
        masses = [layer.visual_mass for layer in forward.attention]
        image = axes.imshow(masses, aspect="auto", cmap="cividis", vmin=0, vmax=largest or 1, origin="lower")
        axes.set_title(_name(forward), fontsize=9)
        axes.set_ylabel(LAYERS)
        axes.grid(False)
        step = max(len(masses) // 10, 1)
        axes.set_yticks(range(0, len(masses), step), [layer.layer_idx for layer in forward.attention[::step]])
    _numbered(axes, TOKENS)
    figure.colorbar(image, ax=list(rows[:, 0]), label=SHARE)
    return Picture(
        "by-token-and-layer",
        "Which layers look at the image, and when",
        "Each cell is one layer at one generated token. Brighter is more attention on the image, averaged over heads.",
        as_svg(figure),
    )


@styled
def _decay_by_layer(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(_compared(result)):
        places = zip(_places(forward, number), forward.attention)
        fitted = [(at, layer.decay) for at, layer in places if layer.decay is not None]
        axes.errorbar(
            [at for at, _ in fitted],
            [law.exponent for _, law in fitted],
            [law.standard_error for _, law in fitted],
            label=_name(forward),
            capsize=2,
            **line_look(number),
        )
    axes.set_ylabel("decay exponent")
    _numbered(axes, LAYERS)
    _legend(axes)
    return Picture(
        "decay-by-layer",
        "How fast each layer stops looking",
        "The exponent of the decay with its standard error, where it could be fitted. 1 is a fall like one over the "
        "length.",
        as_svg(figure),
    )


@styled
def _sinks_by_layer(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(_compared(result)):
        places = _places(forward, number)
        shares = [float(np.mean(layer.sink_mass)) for layer in forward.attention]
        axes.plot(places, shares, label=_name(forward), **line_look(number))
        for at, share, layer in zip(places, shares, forward.attention):
            if layer.sinks:
                axes.annotate(f"{len(layer.sinks)}", (at, share), (0, 4), textcoords="offset points", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of attention on visual sinks")
    _numbered(axes, LAYERS)
    _legend(axes)
    return Picture(
        "sinks",
        "What visual sinks hold",
        "Visual tokens that draw attention whatever the query; the small numbers count them. Attention on sinks does "
        "not mean that the model looks at the image.",
        as_svg(figure),
    )


@styled
def _lens(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, forward in enumerate(_compared(result)):
        means = [float(np.mean(layer)) for layer in forward.lens or []][:-1]
        axes.plot(np.maximum(means, SMALLEST), label=_name(forward), **line_look(number))
    logarithmic(axes, "y")
    axes.set_ylabel("KL to the last layer (nats)")
    _numbered(axes, LAYERS)
    _legend(axes)
    return Picture(
        "logit-lens",
        "When the answer forms",
        "Each layer's hidden state is read out as if it were the last: how far that prediction is from the final one, "
        "averaged over generated tokens. The last layer, at 0 by definition, is left out.",
        as_svg(figure),
    )


@styled
def _updates(result: Findings) -> Picture:
    figure, axes = _axes()
    for number, branch in enumerate(result.branches):
        label = plain(f"layer {branch.layer_idx}, {branch.adapter}, gate {branch.gate:.3g}", limit=60)
        axes.plot(branch.relative_update, label=label, **line_look(number, every=0.12))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("size of update\n(share of residual stream)")
    _numbered(axes, TOKENS)
    _legend(axes)
    return Picture(
        "updates",
        "How much PVM adds",
        "The norm of what a PVM branch adds, divided by the norm of the residual stream that it reads. The gate is "
        "the learned scalar that the branch is multiplied by.",
        as_svg(figure),
    )

"""A probe's result as pictures: readable in print and by the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.plotting import as_png, line_look, logarithmic, new_figure, styled
from .findings import BranchRecord, Findings, ForwardRecord, most_text_tokens


SMALLEST = 1e-6  # nats: below, a logarithmic axis shows noise
TOKENS, LAYERS, SHARE = "generated token (number)", "decoder layer (number)", "share of attention on the image"


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: The name of its file, without extension.
        title: Its heading.
        explanation: What it shows, in plain words.
        alternative: The text in its place where it cannot be seen.
        png: The file.
    """

    name: str
    title: str
    explanation: str
    alternative: str
    png: bytes


def draw(result: Findings) -> list[Picture]:
    """All pictures of a result. The same result gives the same bytes."""
    pictures = [_decay(result), _mass_by_layer(result), _layers(result)]
    if len(result.forwards) > 1:
        pictures.append(_divergence(result))
    if all(forward.lens is not None for forward in result.forwards):
        pictures.append(_lens(result))
    if result.branches:
        pictures += [_updates(result), _retrieval(result)]
    return pictures


def _numbered(axes: Any, label: str) -> None:
    """Label a horizontal axis that counts something."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Any, columns: int = 2) -> None:
    """Below the axes, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, fontsize=8)


def _compared(result: Findings) -> list[ForwardRecord]:
    """Base and all adapters together."""
    return result.forwards[:2]


@styled
def _decay(result: Findings) -> Picture:
    figure, ((by_token, by_text),) = new_figure(3.6, 1, 2)
    for number, forward in enumerate(result.forwards):
        look = line_look(number, every=0.12)
        by_token.plot(forward.mean_mass, label=forward.name, **look)
        if number < 2 and any(layer.sinks for layer in forward.attention):
            faint = {**look, "linewidth": 0.8, "markersize": 2, "alpha": 0.6}
            by_token.plot(forward.mean_mass_without_sinks, label=f"{forward.name}, sinks left out", **faint)
    by_token.set_ylim(bottom=0)
    by_token.set_ylabel(SHARE)
    _numbered(by_token, TOKENS)
    _legend(by_token)
    for number, forward in enumerate(_compared(result)):
        look = line_look(number, every=0.12)
        text_tokens = most_text_tokens(forward.attention)
        points = {**look, "linestyle": "none", "markevery": 1}
        by_text.plot(text_tokens, [mass or np.nan for mass in forward.mean_mass], label=forward.name, **points)
        law = forward.mean_decay
        if law is not None:
            kept = [(t, mass) for t, mass in zip(text_tokens, forward.mean_mass) if t > 0 and mass > 0]
            at = np.array([t for t, _ in kept], dtype=float)
            level = np.mean(np.log([mass for _, mass in kept]) + law.exponent * np.log(at))
            label = f"exponent {law.exponent:.3f} ± {law.standard_error:.3f}"
            by_text.plot(at, np.exp(level) * at**-law.exponent, label=label, **{**look, "marker": None})
    logarithmic(by_text, "x")
    logarithmic(by_text, "y")
    by_text.set_xlabel("text tokens seen (number)")
    by_text.set_ylabel(SHARE)
    _legend(by_text)
    return Picture(
        "visual-mass",
        "How much of its attention goes to the image",
        "Left: for each generated token, the share of attention that reaches image and video tokens, averaged over "
        "heads and layers. Right: the same against the number of text tokens in sight, both axes logarithmic; a "
        "straight line is a power law and its slope the exponent, 1 for a fall like one over the length, 0 for none. "
        "The share alone misleads: a few visual tokens, the sinks, can hold most of it whatever is asked. Where there "
        "are any, faint lines leave them out.",
        "Two line plots: share of attention on the image by generated token, and against text length with fitted "
        "power laws.",
        as_png(figure),
    )


@styled
def _mass_by_layer(result: Findings) -> Picture:
    forwards = _compared(result)
    figure, (row,) = new_figure(3.2, 1, len(forwards), sharey=True)
    largest = max(mass for forward in forwards for layer in forward.attention for mass in layer.visual_mass)
    for axes, forward in zip(row, forwards):
        masses = [layer.visual_mass for layer in forward.attention]
        image = axes.imshow(masses, aspect="auto", cmap="cividis", vmin=0, vmax=largest or 1, origin="lower")
        axes.set_title(forward.name)
        axes.grid(False)
        _numbered(axes, TOKENS)
        step = max(len(masses) // 10, 1)
        axes.set_yticks(range(0, len(masses), step), [layer.layer_idx for layer in forward.attention[::step]])
    row[0].set_ylabel(LAYERS)
    figure.colorbar(image, ax=list(row), label=SHARE)
    return Picture(
        "mass-by-layer",
        "Which layers look at the image, and when",
        "Each cell is one layer at one generated token; brighter is more attention on the image, averaged over heads. "
        "Both pictures have the same scale.",
        "Heat maps of the share of attention on the image by layer and generated token.",
        as_png(figure),
    )


@styled
def _layers(result: Findings) -> Picture:
    figure, column = new_figure(6.6, 3, 1, sharex=True)
    masses, exponents, sinks = column[:, 0]
    for number, forward in enumerate(_compared(result)):
        look = line_look(number)
        layers = np.array([layer.layer_idx for layer in forward.attention]) + 0.12 * number
        mean, low, high = (
            np.array([np.mean(getattr(layer, name)) for layer in forward.attention])
            for name in ("visual_mass", "lowest_head", "highest_head")
        )
        ranges = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
        masses.errorbar(layers, mean, yerr=ranges, label=forward.name, capsize=2, **look)
        fitted = [(at, layer.decay) for at, layer in zip(layers, forward.attention) if layer.decay is not None]
        exponents.errorbar(
            [at for at, _ in fitted],
            [law.exponent for _, law in fitted],
            yerr=[law.standard_error for _, law in fitted],
            label=forward.name,
            capsize=2,
            **look,
        )
        sinks.plot(layers, [np.mean(layer.sink_mass) for layer in forward.attention], label=forward.name, **look)
        for at, layer in zip(layers, forward.attention):
            if layer.sinks:
                height = float(np.mean(layer.sink_mass))
                sinks.annotate(f"{len(layer.sinks)}", (at, height), (0, 4), textcoords="offset points", fontsize=7)
    masses.set_ylabel("share of attention\non the image")
    exponents.set_ylabel("decay exponent\n(1 is one over the length)")
    sinks.set_ylabel("share of attention\non visual sinks")
    _numbered(sinks, LAYERS)
    for axes in (masses, sinks):
        axes.set_ylim(bottom=0)
    if not any(layer.sinks for forward in _compared(result) for layer in forward.attention):
        sinks.text(0.5, 0.5, "no visual sink in any layer", transform=sinks.transAxes, ha="center")
    masses.legend()
    return Picture(
        "layers",
        "Layer by layer",
        "Top: the share of attention on the image, averaged over generated tokens; the bars reach from the head that "
        "looks least to the one that looks most. Middle: the exponent of its decay with its standard error, where it "
        "could be fitted. Bottom: what visual sinks hold, visual tokens that draw attention whatever the query; the "
        "small numbers count them. Mass on sinks is no looking.",
        "Three plots over decoder layers: attention on the image, decay exponent, attention on visual sinks.",
        as_png(figure),
    )


@styled
def _divergence(result: Findings) -> Picture:
    figure, ((axes,),) = new_figure(3.2)
    for number, forward in enumerate(result.forwards):
        if number > 0:
            axes.plot(np.maximum(forward.kl_to_base, SMALLEST), label=forward.name, **line_look(number, every=0.12))
    logarithmic(axes, "y")
    axes.set_ylabel("KL to the base (nats)")
    _numbered(axes, TOKENS)
    _legend(axes)
    return Picture(
        "divergence",
        "How much adapters change what comes next",
        "For each generated token, how far the prediction with adapters is from the base's on the very same text. "
        f"Differences below {SMALLEST:g} are drawn as {SMALLEST:g}. A difference is a change, not yet an improvement.",
        "Line plot of the KL divergence to the base for each generated token.",
        as_png(figure),
    )


@styled
def _lens(result: Findings) -> Picture:
    figure, ((axes,),) = new_figure(3.2)
    for number, forward in enumerate(_compared(result)):
        means = [float(np.mean(layer)) for layer in forward.lens or []][:-1]
        axes.plot(np.maximum(means, SMALLEST), label=forward.name, **line_look(number))
    logarithmic(axes, "y")
    axes.set_ylabel("KL to the last layer (nats)")
    _numbered(axes, LAYERS)
    _legend(axes)
    return Picture(
        "logit-lens",
        "When the answer forms",
        "Each layer's hidden state is read out as if it were the last: how far that prediction is from the final one, "
        "averaged over generated tokens. The last layer, at 0 by definition, is left out.",
        "Line plot of the divergence of each layer's prediction from the final one.",
        as_png(figure),
    )


@styled
def _updates(result: Findings) -> Picture:
    figure, ((axes,),) = new_figure(3.2)
    for number, branch in enumerate(result.branches):
        axes.plot(
            branch.relative_update, label=f"{_place(branch)}, gate {branch.gate:.3g}", **line_look(number, every=0.12)
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("size of update\n(share of residual stream)")
    _numbered(axes, TOKENS)
    _legend(axes)
    return Picture(
        "updates",
        "How much PVM adds",
        "For each generated token, the norm of what a PVM branch adds, divided by the norm of the residual stream "
        "that it reads. The gate is the learned scalar that the branch is multiplied by.",
        "Line plot of the relative size of PVM's updates for each generated token.",
        as_png(figure),
    )


def _place(branch: BranchRecord) -> str:
    return f"layer {branch.layer_idx}, {branch.adapter}"


@styled
def _retrieval(result: Findings) -> Picture:
    tokens = result.retrieval_tokens
    figure, rows = new_figure(1.4 * len(result.branches) + 0.5, len(result.branches), max(len(tokens), 1))
    for branch, row in zip(result.branches, rows):
        largest = max(max(weights) for weights in branch.retrieval.values()) if branch.retrieval else 1.0
        for axes, token in zip(row, tokens):
            drawn = _draw_weights(axes, result, branch.retrieval[token], largest)
            axes.set_title(f"token {token}", fontsize=7)
        row[0].set_ylabel(_place(branch), fontsize=7)
        if tokens:
            figure.colorbar(drawn, ax=list(row), label="share of retrieval").ax.tick_params(labelsize=7)
    where = "laid over the image" if result.grids else "as strips, in the order in which they stand in the prompt"
    return Picture(
        "retrieval",
        "Where PVM looks",
        f"For some generated tokens, PVM's cross-attention over the visual tokens, averaged over heads, {where}. "
        "Brighter is more; each row of pictures has one scale. Numbers are those of the generated tokens.",
        "Maps of PVM's cross-attention over the image for some generated tokens.",
        as_png(figure),
    )


def _draw_weights(axes: Any, result: Findings, weights: Sequence[float], largest: float) -> Any:
    """What the colour bar is made for."""
    from matplotlib.image import imread

    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    if not result.grids:
        return axes.imshow([weights], aspect="auto", cmap="cividis", vmin=0, vmax=largest)
    widest = max(columns for _, columns in result.grids)
    top, start = 0, 0
    for number, (height, width) in enumerate(result.grids):
        extent = (0, width, top + height, top)
        if number < len(result.images):
            picture = imread(io.BytesIO(result.images[number]), format="png")
            axes.imshow(picture[..., :3].mean(-1), extent=extent, cmap="gray", vmin=0, vmax=1)
        part = np.array(weights[start : start + height * width]).reshape(height, width)
        alpha = 0.65 if number < len(result.images) else 1.0
        drawn = axes.imshow(part, extent=extent, cmap="cividis", vmin=0, vmax=largest, alpha=alpha)
        top, start = top + height, start + height * width
    axes.set_xlim(0, widest)
    axes.set_ylim(top, 0)
    return drawn

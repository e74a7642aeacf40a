"""A probe's result as a folder: its numbers, its pictures, and one page that needs nothing else.

The pictures are inside the page. It has no script, and loads nothing from outside.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..folders.replacing import replacing
from ..utils.html import document, figure, table
from ..utils.packages import require
from .findings import Findings
from .measures import Dilution, PowerLaw
from .plots import Picture, draw


@dataclass(frozen=True)
class ProbeResult(Findings):
    """What `probe` found. Every number is rounded to six significant digits.

    Attributes:
        model_name: The model.
        prompt: The prompt, as it was given.
        environment: Versions and device.
        settings: The arguments of the probe, and how the model computes.
        num_prompt_tokens: Length of the prompt.
        num_visual_tokens: Visual tokens among them.
        grids: Rows and columns of visual tokens, for each image, where they are known; otherwise empty.
        token_ids: The generated tokens.
        tokens: The generated tokens as text.
        unobserved_layers: Decoder layers without softmax attention, which have no weights to record.
        forwards: What each forward showed; the base is the first.
        adapters: All attached adapters.
        branches: The branches of the PVM adapters that act.
        images: PNG files of the images in the prompt, for the report.
    """

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `probe.json`, the pictures and `report.html`, all or none. The same result gives the same bytes.

        Args:
            folder: Made if it is not there; files of the same name are overwritten.

        Returns:
            The path of the report.

        Raises:
            ImportError: matplotlib is not installed. All but the pictures and the report is written by then: `load`
                reads it where matplotlib is.
        """
        files = {f"image-{number}.png": image for number, image in enumerate(self.images)}
        files["probe.json"] = self.to_json().encode()
        missing = None
        try:
            require("lab", "matplotlib")
        except ImportError as error:
            missing = error
        else:
            pictures = draw(self)
            files |= {f"{picture.name}.png": picture.png for picture in pictures}
            files["report.html"] = page(self, pictures).encode()
        with replacing(folder, entry="probe.json") as staged:
            for name, content in files.items():
                (staged / name).write_bytes(content)
        if missing is not None:
            raise ImportError(f"{folder} has the numbers, but neither pictures nor report. {missing}") from missing
        return Path(folder) / "report.html"


def page(result: Findings, pictures: Sequence[Picture]) -> str:
    """The page, a whole HTML document, with the pictures that `draw` makes of a result."""
    sections = [_summary(result), _looked_at(result), _forwards(result), _adapters(result), _signs(result)]
    sections += [_figure(picture) for picture in pictures]
    sections += [_tokens(result), _setting(result)]
    return document(f"Probe of {result.model_name}", sections)


def _summary(result: Findings) -> str:
    answer = "".join(result.tokens)
    text = (
        f"{result.num_prompt_tokens} prompt tokens, {result.num_visual_tokens} of them visual; "
        f"{len(result.token_ids)} tokens generated."
    )
    if result.unobserved_layers:
        layers = ", ".join(map(str, result.unobserved_layers))
        text += f" Layers without softmax attention, which have no weights to show: {layers}."
    return (
        f"<p>{escape(text)}</p>\n<h2>Prompt</h2>\n<pre>{escape(result.prompt)}</pre>\n"
        f"<h2>Answer</h2>\n<pre>{escape(answer)}</pre>"
    )


def _looked_at(result: Findings) -> str:
    return "\n".join(figure(image, f"Image {number + 1} of the prompt") for number, image in enumerate(result.images))


def _forwards(result: Findings) -> str:
    rows = [
        (
            forward.name,
            f"{forward.mean_mass[0]:.3g} → {forward.mean_mass[-1]:.3g}",
            f"{forward.mean_mass_without_sinks[0]:.3g} → {forward.mean_mass_without_sinks[-1]:.3g}",
            _exponent(forward.mean_decay),
            _tokens_to_half(forward.mean_dilution),
            _mean(forward.kl_to_base),
            f"{forward.agreement:.0%}",
        )
        for forward in result.forwards
    ]
    header = (
        "Forward",
        "Attention on the image, first → last token",
        "Without sinks",
        "Decay exponent",
        "Dilution: text tokens at which the share is one half",
        "Mean KL to the base (nats)",
        "Would have said the same",
    )
    explanation = (
        "Every forward reads the same prompt and answer: the base with every adapter off, the model as it stands, and "
        "each adapter by itself. Attention on the image is a share of all attention, averaged over heads and layers. "
        "Read it beside the share without sinks, for a model can put much of its attention on a few visual tokens "
        "without looking at the image. An exponent of 1 is a fall like one over the number of text tokens; the "
        "dilution law is what a softmax gives that tells only text from image. The last column is the share of "
        "generated tokens that are this forward's first choice."
    )
    return f"<h2>What was measured</h2>\n<p>{escape(explanation)}</p>\n{table(header, rows)}"


def _exponent(law: PowerLaw | None) -> str:
    if law is None:
        return "not fitted"
    explained = "" if law.r_squared is None else f", R² {law.r_squared:.2f}"
    return f"{law.exponent:.3f} ± {law.standard_error:.3f}{explained}"


def _tokens_to_half(law: Dilution | None) -> str:
    if law is None:
        return "not fitted"
    return f"{law.a:.3g}" if law.r_squared is None else f"{law.a:.3g}, R² {law.r_squared:.2f}"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3g}"


def _adapters(result: Findings) -> str:
    if not result.adapters:
        return ""
    rows = []
    for adapter in result.adapters:
        alone = "" if adapter.kl_alone is None else _mean(adapter.kl_alone)
        gates = ", ".join(
            f"{branch.gate:.3g} (layer {branch.layer_idx})"
            for branch in result.branches
            if branch.adapter == adapter.name
        )
        rows.append((adapter.name, adapter.method, "yes" if adapter.active else "no", alone, gates))
    header = ("Adapter", "Type", "Acts", "Mean KL to the base by itself (nats)", "Gates")
    return f"<h2>Adapters</h2>\n{table(header, rows)}"


def _signs(result: Findings) -> str:
    if not all(layer.scores_below_zero for layer in result.base.attention):
        return ""  # what an earlier version wrote
    rows = [(str(layer.layer_idx), f"{layer.share_below_zero:.0%}") for layer in result.base.attention]
    explanation = (
        "Shares of the base's scores of visual keys, before the softmax, over heads and generated tokens. A method "
        "that multiplies scores by more than 1 takes attention from these keys."
    )
    return f"<h2>Scores below 0</h2>\n<p>{explanation}</p>\n{table(('Layer', 'Below 0'), rows)}"


def _figure(picture: Picture) -> str:
    shown = figure(picture.png, picture.alternative)
    return f"<h2>{escape(picture.title)}</h2>\n<p>{escape(picture.explanation)}</p>\n{shown}"


def _tokens(result: Findings) -> str:
    rows = [
        (str(number), repr(token), *(f"{forward.mean_mass[number]:.3g}" for forward in result.forwards))
        for number, token in enumerate(result.tokens)
    ]
    header = ("Number", "Token", *(f"Attention on the image, {forward.name}" for forward in result.forwards))
    return f"<h2>Token by token</h2>\n{table(header, rows)}"


def _setting(result: Findings) -> str:
    rows = [(name, str(value)) for name, value in (*result.settings.items(), *result.environment.items())]
    return f"<h2>Settings and versions</h2>\n{table(('Name', 'Value'), rows)}"

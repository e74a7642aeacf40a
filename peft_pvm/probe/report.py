"""A probe's result as a folder: its numbers, its pictures, and one page that needs nothing else.

The page is made from `report.html` beside this file. It has no script and loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path

import numpy as np

from ..folders.replacing import replacing
from ..utils.extras import require
from ..utils.html import render
from ..utils.plotting import COLOURS
from .findings import Findings
from .maps import frames, heat, looks, pictures_of, retrievals
from .measures import Dilution, PowerLaw
from .plots import Picture, draw
from .words import nats, percent, share_changed, shown, verdict


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
        base_token_ids: What is generated with every adapter off.
        base_tokens: The same as text.
        unobserved_layers: Decoder layers without softmax attention, which have no weights to record.
        forwards: What each forward showed; the base is the first.
        adapters: All attached adapters.
        branches: The branches of the PVM adapters that act.
        images: PNG files of the images in the prompt, for the report.
    """

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `probe.json`, the pictures and `report.html`, all or none. The same result gives the same bytes.

        Args:
            folder: It is created if it does not exist. Files of the same name are overwritten.

        Returns:
            The path of the report.

        Raises:
            ImportError: jinja2 or matplotlib is not installed. Everything but the pictures and the report is then
                written, and `load` can read it where both are installed.
        """
        files = {f"image-{number}.png": image for number, image in enumerate(self.images)}
        files["probe.json"] = self.to_json().encode()
        missing = None
        try:
            require("lab", "jinja2", "matplotlib")
        except ImportError as error:
            missing = error
        else:
            pictures = draw(self)
            files |= {f"{picture.name}.svg": picture.svg.encode() for picture in pictures}
            files["report.html"] = page(self, pictures).encode()
        with replacing(folder, entry="probe.json") as staged:
            for name, content in files.items():
                (staged / name).write_bytes(content)
        if missing is not None:
            raise ImportError(f"{folder} has the numbers, but neither pictures nor report. {missing}") from missing
        return Path(folder) / "report.html"


def page(result: Findings, pictures: Sequence[Picture]) -> str:
    """The page, a whole HTML document, with the pictures that `draw` makes of a result."""
    return render(
        "probe/report.html",
        result=result,
        verdict=verdict(result),
        images=pictures_of(result),
        frames=frames(result),
        looks=looks(result),
        retrievals=retrievals(result),
        ramp=heat(np.linspace(0, 1, 64)[None]),
        answers=answers(result),
        pictures=pictures,
        tables=_tables(result),
        colours=COLOURS,
        percent=percent,
        share_changed=share_changed,
        nats=nats,
    )


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2g}"


@dataclass(frozen=True)
class Answer:
    """An answer beside another.

    Attributes:
        label: Whose it is.
        parts: Its text in pieces, and whether the other lacks them.
    """

    label: str
    parts: list[tuple[str, bool]]


def answers(result: Findings) -> list[Answer]:
    """The base's answer and that with the active adapters; one of them if they are the same."""
    of_base, of_model = result.base.label, result.forwards[:2][-1].label
    if result.base_token_ids == result.token_ids:
        both = of_base if of_base == of_model else f"{of_base} and {of_model}, the same"
        return [Answer(both, [("".join(result.tokens), False)])]
    alike = SequenceMatcher(None, result.base_token_ids, result.token_ids, autojunk=False).get_matching_blocks()
    kept_of_base = {block.a + step for block in alike for step in range(block.size)}
    kept_of_model = {block.b + step for block in alike for step in range(block.size)}
    return [
        Answer(of_base, _parts(result.base_tokens, kept_of_base)),
        Answer(of_model, _parts(result.tokens, kept_of_model)),
    ]


def _parts(tokens: Sequence[str], kept: set[int]) -> list[tuple[str, bool]]:
    runs = groupby(enumerate(tokens), key=lambda numbered: numbered[0] not in kept)
    return [("".join(token for _, token in run), is_changed) for is_changed, run in runs]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: Its heading.
        explanation: What it shows.
        header: The names of its columns.
        rows: Its rows.
    """

    title: str
    explanation: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def _tables(result: Findings) -> list[Table]:
    tables = [_forwards(result), _adapters(result), _signs(result), _tokens(result), _setting(result)]
    return [table for table in tables if table.rows]


def _forwards(result: Findings) -> Table:
    rows = [
        (
            forward.label,
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
        "Would have chosen the same tokens",
    )
    explanation = (
        "Every forward reads the same prompt and the same answer. Attention is averaged over heads and layers. A "
        "decay exponent of 1 means that attention falls like one over the number of text tokens. The dilution law is "
        "what a softmax gives that only tells text from image."
    )
    return Table("Every forward in numbers", explanation, header, rows)


def _exponent(law: PowerLaw | None) -> str:
    if law is None:
        return "not fitted"
    explained = "" if law.r_squared is None else f", R² {law.r_squared:.2f}"
    return f"{law.exponent:.3f} ± {law.standard_error:.3f}{explained}"


def _tokens_to_half(law: Dilution | None) -> str:
    if law is None:
        return "not fitted"
    return f"{law.a:.3g}" if law.r_squared is None else f"{law.a:.3g}, R² {law.r_squared:.2f}"


def _adapters(result: Findings) -> Table:
    rows = []
    for adapter in result.adapters:
        alone = "" if adapter.kl_alone is None else _mean(adapter.kl_alone)
        gates = ", ".join(
            f"{branch.gate:.3g} (layer {branch.layer_idx})"
            for branch in result.branches
            if branch.adapter == adapter.name
        )
        rows.append(
            (
                adapter.name,
                adapter.method,
                "yes" if adapter.active else "no",
                alone,
                *([gates] if result.branches else []),
            )
        )
    explanation = "What each adapter changes by itself, on the same text."
    gates_of = ("Gates",) if result.branches else ()
    header = ("Adapter", "Type", "Acts", "Mean KL to the base by itself (nats)", *gates_of)
    return Table("Adapters", explanation, header, rows)


def _signs(result: Findings) -> Table:
    rows = [(str(layer.layer_idx), percent(layer.share_below_zero)) for layer in result.base.attention]
    explanation = (
        "The share of the base's scores of visual keys that are below 0 before the softmax, over heads and generated "
        "tokens. A method that multiplies scores by more than 1 takes attention from these keys."
    )
    return Table("Scores below 0", explanation, ("Layer", "Below 0"), rows)


def _tokens(result: Findings) -> Table:
    rows = [
        (
            str(number),
            shown(token),
            shown(result.base.choices[number]) if result.base.choice_ids[number] != result.token_ids[number] else "",
            *(f"{forward.mean_mass[number]:.3g}" for forward in result.forwards),
            *(f"{forward.kl_to_base[number]:.2g}" for forward in result.forwards[1:]),
        )
        for number, token in enumerate(result.tokens)
    ]
    header = (
        "Number",
        "Token",
        "The base would choose",
        *(f"Attention on the image, {forward.label}" for forward in result.forwards),
        *(f"KL to the base, {forward.label}" for forward in result.forwards[1:]),
    )
    return Table("Token by token", "Tokens are counted from 0.", header, rows)


def _setting(result: Findings) -> Table:
    rows = [(name, str(value)) for name, value in (*result.settings.items(), *result.environment.items())]
    return Table("Settings and versions", "What the numbers depend on.", ("Name", "Value"), rows)

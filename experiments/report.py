"""docs/results.md and its pictures, made from the results' JSON and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import fmean

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.folders.replacing import write_file
from peft_pvm.utils.plotting import as_png, line_look, logarithmic, new_figure, styled

from .claims import claims
from .methods import METHODS
from .runs import MAIN_RECIPE, RECIPES
from .summary import Entry, Results


ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 28)
# Methods in the pictures, each with the recipe that is better for it.
IN_PICTURES = {
    "base": MAIN_RECIPE,
    "lora": "plain-1024-long",
    "mlp": "plain-1024",
    "pvm": "hidden-1024-long",
    "dipe": MAIN_RECIPE,
    "pvm+dipe": "hidden-1024-long",
}


def write_report(results: str | os.PathLike, docs: str | os.PathLike) -> Path:
    """Write `results.md` and `figures/recall.png`: the same bytes from the same results.

    Args:
        results: Folder of JSON files.
        docs: Folder to write to.

    Returns:
        The page.

    Raises:
        FileNotFoundError: There are no results.
    """
    found = Results(results)
    write_file(Path(docs) / "figures" / "recall.png", draw_recall(found))
    page = Path(docs) / "results.md"
    write_file(page, render(found))
    return page


@styled
def draw_recall(results: Results) -> bytes:
    """Accuracy by distractor length and by generated position, as PNG."""
    figure, axes = new_figure(3.2, columns=2)
    left, right = axes[0]
    for number, (name, recipe) in enumerate(IN_PICTURES.items()):
        entry = results.find(name, recipe)
        if entry is None:
            continue
        for panel, form, offset, factor in ((left, "one mosaic", 32, 1), (right, "transcription", 0, NUM_CELLS)):
            keys = entry.keys(form)
            cells = [entry.cell(form, key) for key in keys]
            places = [max(key * factor, offset) for key in keys]
            look = line_look(number)
            panel.plot(places, [cell.mean for cell in cells], label=METHODS[name].title, **look)
            low, high = ([cell.mean + sign * cell.spread for cell in cells] for sign in (-1, 1))
            panel.fill_between(places, low, high, color=look["color"], alpha=0.12, linewidth=0)
    lengths = results.entries[next(iter(results.entries))].keys("one mosaic")
    left.set_xscale("log", base=2)
    left.set_xticks([max(length, 32) for length in lengths], [str(length) for length in lengths])
    left.minorticks_off()
    left.set_xlabel("bytes of text between image and question")
    left.set_ylabel("share of digits told right")
    logarithmic(right, "x")
    right.set_xlabel("cells written, the image never repeated")
    for panel in axes[0]:
        panel.set_ylim(0, 1.02)
        panel.axhline(0.1, color="grey", linewidth=0.8, linestyle=(0, (1, 3)))
    left.legend(fontsize=7, loc="lower left")
    return as_png(figure)


def render(results: Results) -> str:
    """The page, in Markdown."""
    tested = {recipe for _, recipe in results.entries} | {MAIN_RECIPE}
    by_recipe = {
        recipe: [entry for entry in results.under(recipe) if recipe == MAIN_RECIPE or entry.recipe == recipe]
        for recipe in RECIPES
        if recipe in tested
    }
    everything = [entry for entries in by_recipe.values() for entry in entries]
    lengths = everything[0].keys("one mosaic")
    parts = [
        *_head(results),
        *_claims(results),
        *_one_mosaic(by_recipe),
        *_transcription(everything),
        *_attention(everything, lengths),
        *_retrieval(everything, lengths),
    ]
    for form in ("two mosaics", "three mosaics"):
        parts += ["", f"## {form.capitalize()}, by bytes of text", "", *_accuracies_table(everything, form)]
    return "\n".join(parts) + "\n"


def _head(results: Results) -> list[str]:
    trained = {name for name, recipe in results.entries if recipe is not None}
    return [
        "# Results",
        "",
        "Written by `python -m experiments report` from the JSON in `experiments/results/`; do not edit. What is "
        "tested and how is in [the lab](lab.md), what was found beside these numbers too.",
        "",
        *_setting(results),
        "",
        "![Accuracy by distractor length, and by cells written](figures/recall.png)",
        "",
        "Bands: standard deviation over seeds. Dotted: guessing. Training: "
        + ", ".join(f"{METHODS[name].title} {recipe}" for name, recipe in IN_PICTURES.items() if name in trained)
        + ".",
    ]


def _claims(results: Results) -> list[str]:
    return [
        "",
        "## The papers' claims, here",
        "",
        "A difference counts if it is more than twice its standard error.",
        "",
        *_table(("Claim", "Here", "Numbers"), [astuple(claim) for claim in claims(results)]),
    ]


def _one_mosaic(by_recipe: dict[str, list[Entry]]) -> list[str]:
    parts = [
        "",
        "## One mosaic, by bytes of text before the questions",
        "",
        "Mean ± standard deviation over the seeds of training; without training, one run ± standard error over rows.",
    ]
    for recipe, entries in by_recipe.items():
        parts += [
            "",
            f"### Training: {recipe}",
            "",
            f"{RECIPES[recipe]}.",
            "",
            *_accuracies_table(entries, "one mosaic", label=lambda entry: METHODS[entry.method].title),
        ]
    return parts


def _transcription(entries: Sequence[Entry]) -> list[str]:
    return [
        "",
        "## Transcription, by round",
        "",
        "The model writes out its nine cells over and over, greedily; the image is never repeated. Here and below, "
        f"training is {MAIN_RECIPE} where nothing else is said.",
        "",
        *_accuracies_table(entries, "transcription", ROUNDS),
    ]


def _attention(entries: Sequence[Entry], lengths: Sequence[int]) -> list[str]:
    masses = [(_label(entry), *(f"{fmean(entry.mean_mass(length)):.4f}" for length in lengths)) for entry in entries]
    return [
        "",
        "## Attention that reaches the mosaic from the questions, by bytes of text",
        "",
        "Mean over layers, heads, questions and seeds. PVM's retrieval is not in it: it has a softmax of its own.",
        "",
        *_table(("Method", *map(str, lengths)), masses),
    ]


def _retrieval(entries: Sequence[Entry], lengths: Sequence[int]) -> list[str]:
    retrieved = [
        (_label(entry), str(layer_idx), *(f"{entry.mean_retrieved(n)[layer_idx]:.3f}" for n in lengths))
        for entry in entries
        for layer_idx in entry.mean_retrieved(lengths[0])
    ]
    return [
        "",
        "## Share of PVM's retrieval that goes to the cell asked for, by bytes of text",
        "",
        f"Mean over heads, questions and seeds; chance is {1 / NUM_CELLS:.3f}.",
        "",
        *_table(("Method", "Layer", *map(str, lengths)), retrieved),
    ]


def _setting(results: Results) -> list[str]:
    packages = ("torch", "transformers", "peft", "Python", "Platform", "CPU threads", "GPU")
    environments = {tuple(file["environment"][name] for name in packages) for file in results.files}
    seeds = sorted({file["seed"] for file in results.files if file["recipe"] is not None})
    recipe = next((file["training"]["recipe"] for file in results.files if file["training"]), None)
    rows = len(next(iter(results.files[0]["right of nine"]["one mosaic"].values())))
    lines = [f"- {rows} rows of {NUM_CELLS} questions in every cell, the same for all; held-out digits and text."]
    if recipe is not None:
        lines.append(
            f"- Seeds of training: {', '.join(map(str, seeds))}; learning rate {recipe['learning_rate']}. The base is "
            "frozen and the same for all; so are the questions that they train on."
        )
    for environment in sorted(environments):
        lines.append("- Machine: " + ", ".join(map(" ".join, zip(packages, environment))) + ".")
    return lines


def _label(entry: Entry) -> str:
    title = METHODS[entry.method].title
    return title if entry.recipe in (None, MAIN_RECIPE) else f"{title} ({entry.recipe})"


def _accuracies_table(
    entries: Sequence[Entry],
    form: str,
    keys: Sequence[int] | None = None,
    label: Callable[[Entry], str] = _label,
) -> list[str]:
    keys = entries[0].keys(form) if keys is None else [key for key in keys if key in entries[0].keys(form)]
    rows = [
        (
            label(entry),
            f"{entry.parameters:,}",
            str(len(entry.runs)),
            *(str(entry.cell(form, k)) for k in keys),
        )
        for entry in entries
    ]
    return _table(("Method", "Parameters", "Runs", *map(str, keys)), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]

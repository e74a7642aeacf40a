"""docs/results.md and its pictures, made from the results' JSON and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.folders.replacing import write_file
from peft_pvm.utils.plotting import as_png, line_look, logarithmic, new_figure, styled

from .claims import NOT_TESTED, Claim, claims
from .markdown import folded, machines, one_level_down, table
from .methods import METHODS
from .real.claims import claims as real_claims
from .real.findings.page import render_findings
from .real.report import OF_CLAIMS, draw_real, read_bases, render_base
from .real.summary import Results as RealResults
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
    """Write `results.md`, `figures/recall.png` and `figures/real.png`: the same bytes from the same results.

    Args:
        results: Folder of JSON files of the toy. Its folders of the real bases are read if they have results.
        docs: Folder to write to.

    Returns:
        The page.

    Raises:
        FileNotFoundError: There are no results of the toy.
        ValueError: Results are damaged, or cannot be compared.
    """
    toy, bases = Results(results), read_bases(results)
    figures = Path(docs) / "figures"
    write_file(figures / "recall.png", draw_recall(toy))
    if bases:
        write_file(figures / "real.png", draw_real(next(iter(bases.values()))))
    page = Path(docs) / "results.md"
    write_file(page, render(toy, bases))
    return page


def render(toy: Results, bases: Mapping[str, RealResults]) -> str:
    """The page, in Markdown.

    Args:
        toy: What is there of the toy.
        bases: What is there of real bases, by what the page calls them.
    """
    tested = {title: results for title, results in bases.items() if title in OF_CLAIMS}
    by_base = {"The toy": claims(toy), **{title: real_claims(results) for title, results in tested.items()}}
    parts = [
        "# Results",
        "",
        "Written by `python -m experiments report` from the JSON in `experiments/results/`; do not edit. "
        "[A real language model](real-model.md) and, for the toy, [the lab](lab.md) say what is tested and how, and "
        "what else was found.",
        *_real_picture(bases),
        *_claims(by_base),
    ]
    for title, results in bases.items():
        parts += ["", f"## {title}", "", *render_base(results)]
        if results.findings.is_dir():
            parts += ["", *one_level_down(render_findings(results.findings).splitlines())]
    return "\n".join([*parts, "", "## The toy", "", *one_level_down(_toy(toy))]) + "\n"


def _real_picture(bases: Mapping[str, RealResults]) -> list[str]:
    if not bases:
        return []
    title = next(iter(bases))
    return [
        "",
        f"![Accuracy by tokens of text, {title.lower()}](figures/real.png)",
        "",
        f"{title}. Bars show the standard deviation over seeds of training or, without training, the standard error "
        "over rows. The dotted line is guessing. Points of one length are drawn side by side.",
    ]


def _claims(by_base: Mapping[str, Sequence[Claim]]) -> list[str]:
    texts = list(dict.fromkeys(claim.text for found in by_base.values() for claim in found))
    verdicts, numbers = [], []
    for text in texts:
        same = {title: [claim for claim in found if claim.text == text] for title, found in by_base.items()}
        verdicts.append((text, *map(_verdicts, same.values())))
        numbers += [
            (text, title, claim.setting, claim.verdict, claim.numbers)
            for title, found in same.items()
            for claim in found
            if claim.verdict != NOT_TESTED
        ]
    return [
        "",
        "## The papers' claims and ours",
        "",
        "A difference counts if it is more than twice its standard error. On the toy, this is the standard error over "
        "seeds of training or, without training, over rows. On a real base, differences are paired by row, and the "
        "squared error over the seeds of each trained method is added to that over rows. This standard error is at "
        "least 1.5 answers, because another row might differ even if all rows agree.",
        "",
        *table(("Claim", *by_base), verdicts),
        "",
        *folded("The numbers", table(("Claim", "Base", "Setting", "Verdict", "Numbers"), numbers)),
    ]


def _verdicts(found: Sequence[Claim]) -> str:
    """One word if all settings agree; else each verdict with its settings."""
    settings: dict[str, list[str]] = {}
    for claim in found:
        settings.setdefault(claim.verdict, []).append(claim.setting)
    if len(settings) > 1:
        return "<br>".join(f"{verdict}: {'; '.join(names)}" for verdict, names in settings.items())
    return next(iter(settings), NOT_TESTED)


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
    left.set_ylabel("accuracy")
    logarithmic(right, "x")
    right.set_xlabel("cells written, the image never repeated")
    for panel in axes[0]:
        panel.set_ylim(0, 1.02)
        panel.axhline(0.1, color="grey", linewidth=0.8, linestyle=(0, (1, 3)))
    left.legend(fontsize=7, loc="lower left")
    return as_png(figure)


def _toy(results: Results) -> Iterator[str]:
    """The part about the toy: setting, picture and tables."""
    tested = {recipe for _, recipe in results.entries} | {MAIN_RECIPE}
    by_recipe = {
        recipe: [entry for entry in results.under(recipe) if recipe == MAIN_RECIPE or entry.recipe == recipe]
        for recipe in RECIPES
        if recipe in tested
    }
    everything = [entry for entries in by_recipe.values() for entry in entries]
    lengths = everything[0].keys("one mosaic")
    yield from _setting(results)
    yield from _picture(results)
    yield from _one_mosaic(by_recipe)
    yield from _transcription(everything)
    yield from _attention(everything, lengths)
    yield from _retrieval(everything, lengths)
    for form in ("two mosaics", "three mosaics"):
        yield from ["", f"## {form.capitalize()}, by bytes of text", "", *_accuracies_table(everything, form)]


def _picture(results: Results) -> list[str]:
    trained = {name for name, recipe in results.entries if recipe is not None}
    return [
        "",
        "![Accuracy by distractor length, and by cells written](figures/recall.png)",
        "",
        "Bands show the standard deviation over seeds. The dotted line is guessing. The recipes of training are: "
        + ", ".join(f"{METHODS[name].title} {recipe}" for name, recipe in IN_PICTURES.items() if name in trained)
        + ".",
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
        f"the recipe of training is {MAIN_RECIPE} unless a row names another.",
        "",
        *_accuracies_table(entries, "transcription", ROUNDS),
    ]


def _attention(entries: Sequence[Entry], lengths: Sequence[int]) -> list[str]:
    masses = [(_label(entry), *(f"{fmean(entry.mean_mass(length)):.4f}" for length in lengths)) for entry in entries]
    return [
        "",
        "## Attention that reaches the mosaic from the questions, by bytes of text",
        "",
        "Mean over layers, heads, questions and seeds. PVM's retrieval is not included; it has its own softmax.",
        "",
        *table(("Method", *map(str, lengths)), masses),
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
        *table(("Method", "Layer", *map(str, lengths)), retrieved),
    ]


def _setting(results: Results) -> list[str]:
    seeds = sorted({file["seed"] for file in results.files if file["recipe"] is not None})
    recipe = next((file["training"]["recipe"] for file in results.files if file["training"]), None)
    rows = len(next(iter(results.files[0]["right of nine"]["one mosaic"].values())))
    lines = [
        f"- Each cell has {rows} rows of {NUM_CELLS} questions on held-out digits and text, the same for all methods."
    ]
    if recipe is not None:
        lines.append(
            f"- Seeds of training: {', '.join(map(str, seeds))}; learning rate {recipe['learning_rate']}. All "
            "methods have the same frozen base and train on the same questions."
        )
    return [*lines, *machines(file["environment"] for file in results.files)]


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
    return table(("Method", "Parameters", "Runs", *map(str, keys)), rows)

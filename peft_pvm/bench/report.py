"""Shows measurements and estimates as tables and a picture."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..utils.plotting import line_look, logarithmic, new_figure, styled
from ..utils.terminal import Terminal
from .models import METHODS, footprint


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ratios(result: dict[str, Any], context: int, name: str, what: str) -> list[float]:
    """A method's times divided by the base's, one for each round; empty if the method was left out.

    Args:
        result: What `measure` returns.
        context: Length of the prompt.
        name: The name of the method.
        what: "prefill_s" or "decode_s".
    """
    (methods,) = (entry["methods"] for entry in result["contexts"] if entry["context"] == context)
    return [own / base for own, base in zip(methods[name][what], methods["base"][what])]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """A table for every length of the prompt, and what loading takes."""
    settings, model = result["settings"], result["model"]
    for entry in result["contexts"]:
        context = entry["context"]
        table = Table(
            "", "prefill s", "of base", "token ms", "of base", "prefill MiB", "attn", "attn, token",
            title=f"{context:,} tokens, {settings['visual_tokens']:,} of them visual, batch {settings['batch']}",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        left_out = {name: measured["left_out"] for name, measured in entry["methods"].items() if measured["left_out"]}
        for name, measured in entry["methods"].items():
            if name in left_out:
                table.add_row(METHODS[name].title, "left out")
                continue
            table.add_row(
                METHODS[name].title,
                f"{statistics.median(measured['prefill_s']):.3f}",
                _middle(ratios(result, context, name, "prefill_s")),
                f"{statistics.median(measured['decode_s']) * 1000:.2f}",
                _middle(ratios(result, context, name, "decode_s")),
                f"{measured['prefill_bytes'] / 2**20:,.0f}",
                _middle(measured["attention_prefill"]),
                _middle(measured["attention_decode"]),
            )
        console.print(table)
        for name, reason in left_out.items():
            console.print(f"{METHODS[name].title} was left out: {reason}")
    loading, machine = result["loading"], result["machine"]
    console.print(
        f"{model['name']}, {model['parameters']:,} parameters in {model['decoder_layers']} decoder layers, "
        f"{model['dtype']}, {model['attn_implementation']}. Of base: the median of the rounds, "
        "± half of what lies between their quartiles. Attn: attention of one layer alone, over its kernel."
    )
    if in_generate := [METHODS[name].title for name in settings["methods"] if METHODS[name].in_generate]:
        console.print(
            f"{', '.join(in_generate)}: as in generate. A prefill includes what the method reads before it, and a "
            "token what changes its scores, such as a second forward."
        )
    for name, fields in result.get("given", {}).items():
        given = ", ".join(f"{field}={value}" for field, value in fields.items())
        console.print(f"{METHODS[name].title}: with {given}, so that it acts on this prompt.")
    if "left_out" in loading:
        console.print(f"Loading was left out: {loading['left_out']}")
    else:
        console.print(
            f"A PVM adapter: attached in {loading['attach']:.3f} s (of which {loading['draw_weights']:.3f} s go into "
            f"its random weights), loaded in {loading['load']:.3f} s, swapped in {loading['swap'] * 1000:.2f} ms. "
            f"import peft: {loading['import_peft']:.2f} s; import peft_pvm then: {loading['import_peft_pvm']:.2f} s."
        )
        if "first_forward" in loading:  # not in files of earlier versions
            console.print(
                f"The first forward after attaching, of one token: {loading['first_forward'] * 1000:.1f} ms; "
                f"the next: {loading['next_forward'] * 1000:.1f} ms."
            )
    console.print(
        f"{machine['device']}, {machine['cpus']} CPUs, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}."
    )


def print_launches(result: dict[str, Any], console: Console) -> None:
    """A table of operations, of a prefill and of a step of decoding."""
    settings = result["settings"]
    table = Table(
        "", "prefill", "beyond the base", "a token", "beyond the base", "layers", "a layer", "once",
        title=f"Operations, {settings['contexts'][0]:,} tokens, {settings['visual_tokens']:,} of them visual",
    )  # fmt: skip
    is_compiled = "kernels" in result["methods"]["base"]
    if is_compiled:
        table.add_column("compiled")
        table.add_column("beyond the base")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, own in result["methods"].items():
        prefill, step = own["prefill"], own["step"]
        numbers = [prefill["in all"], prefill["beyond the base"], *step.values()]
        if "kernels" in own:
            numbers += [own["kernels"], own["kernels"] - result["methods"]["base"]["kernels"]]
        table.add_row(METHODS[name].title, *map("{:,}".format, numbers))
    console.print(table)
    console.print(
        "Operations that compute or copy, as torch dispatches them; views are free. A layer: in each decoder layer "
        "that the method changes. Once: what these share."
        + (" Compiled: the kernels of a token." if is_compiled else "")
    )


def print_prediction(result: dict[str, Any], console: Console) -> None:
    """Tables of the times that are predicted for steps on a device, by batch."""
    device = result["device"]
    for batch, methods in result["batches"].items():
        table = Table(
            "", "calls", "eager, ms", "of base", "operations", "GB", "in a graph, ms", "of base", "memory",
            title=f"{result['shape']}, {result['device']['title']}, batch {int(batch):,}",
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        base = methods["base"]
        for name, own in methods.items():
            eager, graph = own["eager"], own["graph"]
            memory = f"{own['held_gb']:,.0f} GB of {device['memory'] / 1e9:.0f}"
            table.add_row(
                METHODS[name].title,
                f"{eager['launches']:,}", f"{eager['ms']:.1f}", f"{eager['ms'] / base['eager']['ms']:.2f}",
                f"{graph['launches']:,}", f"{graph['gb']:.1f}", f"{graph['ms']:.1f}",
                f"{graph['ms'] / base['graph']['ms']:.2f}", memory if own["fits"] else f"does not fit: {memory}",
            )  # fmt: skip
        console.print(table)
    console.print(
        f"A step of decoding after {result['context']:,} tokens, {result['visual_tokens']:,} of them visual, in "
        f"bf16, only by what is launched, read and multiplied: {device['bandwidth'] / 1e9:,.0f} GB a second, "
        f"{device['flops'] / 1e12:,.0f} TFLOP a second, {device['launch'] * 1e6:g} us a call in eager mode, views "
        f"included, {device['kernel'] * 1e6:g} us an operation in a graph. GB: in a graph. Memory: weights and KV "
        "cache; the vision tower and what a step needs meanwhile are not counted."
    )


def print_check(result: dict[str, Any], console: Console) -> None:
    """A table of steps as measured and as predicted."""
    for title, methods in result["shapes"].items():
        table = Table("", "measured, ms", "predicted, ms", "of measured", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, own in methods.items():
            ratio = own["predicted"] / own["measured"]
            table.add_row(METHODS[name].title, f"{own['measured']:.2f}", f"{own['predicted']:.2f}", f"{ratio:.2f}")
        console.print(table)
    console.print(
        f"What a call takes, {result['launch_us']:.1f} us, and the bandwidth, {result['bandwidth_gb']:.1f} GB a "
        "second, are those with which the base's steps take as long as measured. All else is predicted."
    )


def _middle(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ±{(high - low) / 2:.2f}"


@styled
def draw(result: dict[str, Any]) -> Figure:
    """A picture of the times of prefill and decoding, relative to the base, by length of the prompt."""
    figure, axes = new_figure(2.8, columns=2)
    names = [name for name in result["contexts"][0]["methods"] if name != "base"]
    for panel, what, title in ((axes[0, 0], "prefill_s", "Prefill"), (axes[0, 1], "decode_s", "A token")):
        for number, name in enumerate(names):
            points = []
            for entry in result["contexts"]:
                if values := ratios(result, entry["context"], name, what):
                    points.append((entry["context"], statistics.median(values)))
            if points:
                panel.plot(*zip(*points), label=METHODS[name].title, **line_look(number + 1))
        panel.axhline(1.0, **{**line_look(0), "marker": None}, label="base")
        panel.set(xlabel="Tokens of the prompt", ylabel="Time, of the base's", title=title)
        if len(result["contexts"]) > 1:
            logarithmic(panel, "x")
    axes[0, 0].legend()
    return figure


def show_scale(
    preset: str,
    contexts: list[int],
    visual_tokens: list[int],
    batches: list[int],
    sequences: list[int],
    branches: int | None = None,
    bandwidth: float | None = None,
) -> None:
    """Print how much memory conversations keep, and how much steps read.

    Args:
        preset: One of `PRESETS`.
        contexts: Lengths of a conversation, visual tokens included.
        visual_tokens: How many of them are visual.
        batches: Conversations decoded in one step.
        sequences: Conversations kept at once.
        branches: The number of branches, as for `footprint`.
        bandwidth: The bandwidth of memory in GB a second, to print times as well.

    Raises:
        ValueError: As `footprint`, or a number out of its range.
    """
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth is {bandwidth}, but must be a finite number above 0.")
    for name, numbers in {
        "contexts": contexts, "visual_tokens": visual_tokens, "batches": batches, "sequences": sequences
    }.items():  # fmt: skip
        if min(numbers) < 1:
            raise ValueError(f"{name} is {numbers}, but must be numbers of 1 or more.")
    if min(visual_tokens) >= max(contexts):
        raise ValueError(f"visual_tokens is {visual_tokens}, but must be below a context: those are {contexts}.")
    console, foot = Terminal(), footprint(preset, branches)
    console.print(
        f"{preset} in bf16. Of the base a step reads {foot.weights / 1e9:.2f} GB of weights, of PVM "
        f"{foot.pvm_weights / 1e6:.1f} MB. A token of the KV cache takes {foot.cache:,} bytes; of PVM a visual token "
        f"takes {foot.projections:,} bytes of keys and values and {foot.embeddings:,} of its embedding."
    )
    shapes = [(context, visual) for context in contexts for visual in visual_tokens if visual < context]
    table = Table("Conversations", "tokens", "visual", "KV cache", "PVM's keys, values", "embeddings", "of the cache")
    for number, (context, visual) in itertools.product(sequences, shapes):
        kept = [number * part for part in foot.kept(context, visual)]
        sizes = map(_readable, kept)
        table.add_row(f"{number:,}", f"{context:,}", f"{visual:,}", *sizes, f"{sum(kept[1:]) / kept[0]:.2%}")
    console.print(table)
    times = () if bandwidth is None else ("base, ms", "PVM, ms")
    table = Table("Batch", "tokens", "visual", "the base reads", "PVM beyond that", "ratio", *times)
    for batch, (context, visual) in itertools.product(batches, shapes):
        base, pvm = foot.read(context, visual, batch)
        row = [_readable(base), _readable(pvm), f"{1 + pvm / base:.4f}"]
        if bandwidth is not None:
            row += [f"{part / bandwidth / 1e6:,.1f}" for part in (base, pvm)]
        table.add_row(f"{batch:,}", f"{context:,}", f"{visual:,}", *row)
    console.print(table)


def _readable(number: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(number, 1000)), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"

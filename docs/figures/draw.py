"""The drawn figures of the docs, as SVG beside this file, and the tables that code writes into pages: `make generate`.

Nothing in them is drawn by eye that can be computed: DIPE's distances and T-DRS's factors come from the functions that
the adapters use, measured curves from the JSON in `experiments/results/`, arrows between rooms from the imports, and
what a file holds from its docstring. The same code gives the same bytes.
"""

from __future__ import annotations

import ast
import io
import pathlib
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import networkx as nx
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from experiments.summary import Results
from peft_pvm.bench.models import METHODS
from peft_pvm.demo.mosaic import NUM_CELLS, NUM_DIGITS
from peft_pvm.folders.data_file import read_json
from peft_pvm.methods.tdrs.weights import Floor, distance_boost, semantic_position
from peft_pvm.tokens.positions import PADDING, modalities, run_anchors, run_starts
from peft_pvm.utils.plotting import COLOURS, logarithmic, new_figure, styled
from tests import published_configs
from tests.test_rooms import PACKAGE, House, Module


FIGURES = pathlib.Path(__file__).parent
REPOSITORY = FIGURES.parents[1]
RESULTS = Results(REPOSITORY / "experiments" / "results")
BLACK, ORANGE, BLUE, GREEN, PINK, SKY, _ = COLOURS
TEXT_FILL, IMAGE_FILL, PVM_FILL, BASE_FILL = "#E8E8E8", "#F6C9A8", "#BFDDF0", "#F4F4F4"

# By room: where it stands from left to right, and what it is for. Which floor it is on follows from the imports.
ROOMS = {
    "experiments": (5.0, "the lab, not in the wheel"),
    "cli": (5.0, "peft-pvm"),
    "integrations": (0.7, "lmms-eval, vLLM, TRL"),
    "compare": (3.6, "who helps, who hurts"),
    "bench": (6.5, "time and memory"),
    "training": (8.5, "what makes it look"),
    "probe": (1.5, "how much it looks"),
    "": (5.0, "the public names"),
    "demo": (9.4, "task and tiny model"),
    "methods": (5.0, "PVM, DIPE, T-DRS, ..."),
    "tuners": (5.0, "the side that PEFT sees"),
    "attention": (3.7, "calls, stages, kernels"),
    "tokens": (3.7, "what a forward knows"),
    "folders": (7.2, "saved adapters"),
    "env": (0.7, "bug reports"),
    "utils": (5.0, "for every room"),
}
BENCH = REPOSITORY / "experiments" / "results" / "bench"
PREDICTED = BENCH / "predicted-h100-8b.json"
LAUNCHES = BENCH / "launches-fp32.json", BENCH / "launches-bf16.json"
# At most so many operations in each layer of a step, whatever the dtype: our aims.
AIMS = {
    **dict(pvm=18, dipe=10, var=16),
    **{"t-drs": 45},
    **dict.fromkeys(("vaf", "log-bias", "savaa"), 6),
    **dict.fromkeys(("memvr", "vista"), 10),
}
TABLE_OF_LAUNCHES = re.compile(r"(<!-- launches:[^>]*-->\n).*?(<!-- launches end -->)", re.DOTALL)
TABLE_OF_PREDICTIONS = re.compile(r"(<!-- predictions:[^>]*-->\n).*?(<!-- predictions end -->)", re.DOTALL)
TABLE_OF_FILES = re.compile(r"(<!-- files:[^>]*-->\n).*?(<!-- files end -->)", re.DOTALL)


def as_svg(figure: Figure) -> str:
    """An SVG file, its letters drawn as paths: it looks the same whatever fonts a reader has."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "peft-pvm", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _box(
    axes: Any, x: float, y: float, text: str, fill: str, width: float = 3.0, height: float = 0.95, edge: str = "-"
) -> None:
    style = "round,pad=0.02,rounding_size=0.2"
    corner = (x - width / 2, y)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor="#555555", linestyle=edge)
    )
    axes.text(x, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = "#333333") -> None:
    style = dict(arrowstyle="-|>", color=colour, shrinkA=0, shrinkB=0, linewidth=1.1)
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


@styled
def fading() -> str:
    """Measured on the lab's base: attention on the image, and what it still tells, by text in between."""
    figure, axes = new_figure(2.7, columns=2)
    base = RESULTS.only("base", None, 0)
    lengths = [length for length in base.keys("one mosaic") if length]
    mass = [torch.tensor(base.mean_mass(length)).mean().item() for length in lengths]
    left, right = axes[0]
    left.plot(lengths, mass, "o-", color=BLUE, markersize=4, label="measured, mean over layers")
    left.plot(lengths, [mass[-1] * lengths[-1] / t for t in lengths], "--", color=BLACK, label="1/t")
    logarithmic(left, "x")
    logarithmic(left, "y")
    left.set(xlabel="bytes of text after the image", title="share of attention on the image")
    left.legend(loc="lower left")
    right.plot(lengths, [base.cell("one mosaic", length).mean for length in lengths], "s-", color=ORANGE, markersize=4)
    right.axhline(1 / NUM_DIGITS, color=BLACK, linestyle=":")
    right.text(lengths[0], 1 / NUM_DIGITS + 0.02, "guessing")
    logarithmic(right, "x")
    right.set(xlabel="bytes of text after the image", title="questions about it answered right", ylim=(0, 1.03))
    return as_svg(figure)


@styled
def pvm() -> str:
    """Where the branch stands, and how it finds in the lab what attention has lost."""
    figure, axes = new_figure(3.7, columns=2, width_ratios=[1.25, 1])
    layer, curve = axes[0]
    layer.set(xlim=(0, 12.4), ylim=(0, 11.2), title="a decoder layer with PVM")
    layer.set_axis_off()

    def box(*args: Any, **kwargs: Any) -> None:
        _box(layer, *args, **kwargs)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        _arrow(layer, start, end)

    def line(*points: tuple[float, float]) -> None:
        layer.plot(*zip(*points), color="#333333", linewidth=1.1, solid_capstyle="round")

    stream, ffn, branch, memory = 0.8, 3.2, 7.1, 10.9
    arrow((stream, 0.1), (stream, 9.7))
    layer.text(stream + 0.25, 0.15, "x, after attention", fontsize=8, va="center")
    line((stream, 1.0), (branch, 1.0))
    arrow((ffn, 1.0), (ffn, 3.3))
    box(ffn, 3.3, "norm", BASE_FILL, width=2.2)
    arrow((ffn, 4.25), (ffn, 5.0))
    box(ffn, 5.0, "FFN", BASE_FILL, width=2.2)
    line((ffn, 5.95), (ffn, 10.0))
    arrow((ffn, 10.0), (stream + 0.35, 10.0))

    arrow((branch, 1.0), (branch, 1.6))
    box(branch, 1.6, "text down to r", PVM_FILL)
    arrow((branch, 2.55), (branch, 3.3))
    box(branch, 3.3, "cross-attention,\nno positions", PVM_FILL, height=1.25)
    arrow((branch, 4.55), (branch, 5.3))
    box(branch, 5.3, "MLP", PVM_FILL)
    arrow((branch, 6.25), (branch, 6.8))
    box(branch, 6.8, "up, norm", PVM_FILL)
    arrow((branch, 7.75), (branch, 8.3))
    box(branch, 8.3, "times gate\n(0 at first; text only)", PVM_FILL, width=4.0, height=1.1)
    line((branch, 9.4), (branch, 10.0), (ffn, 10.0))

    box(memory, 1.2, "visual\nembeddings", IMAGE_FILL, width=2.4, height=1.3)
    arrow((memory, 2.5), (memory, 3.45))
    box(memory, 3.45, "down to r", PVM_FILL, width=2.4)
    arrow((memory - 1.2, 3.93), (branch + 1.5, 3.93))
    layer.text(memory, 4.65, "the same at\nany distance", fontsize=7.5, ha="center", va="bottom", style="italic")

    layer.text(stream, 10.0, "+", ha="center", va="center", fontsize=13)
    layer.add_patch(Circle((stream, 10.0), 0.33, fill=False, edgecolor="#333333"))
    arrow((stream, 10.33), (stream, 11.1))
    layer.text(stream + 0.25, 10.8, "y", fontsize=8, va="center")

    trained = RESULTS.find("pvm", "hidden-1024-long")
    if trained is None:
        raise FileNotFoundError("experiments/results/ lacks pvm.hidden-1024-long, which this figure shows.")
    base = RESULTS.only("base", None, 0)
    lengths = [length for length in base.keys("one mosaic") if length]
    curve.axhline(1 / NUM_CELLS, color=BLACK, linestyle=":", linewidth=1)
    for layer_idx, colour, dashes, height in ((1, SKY, "-.", 0.19), (3, BLUE, "--", 0.35), (4, GREEN, "-", 0.89)):
        retrieved = [trained.mean_retrieved(length)[layer_idx] for length in lengths]
        curve.plot(lengths, retrieved, dashes, color=colour, marker="o", markersize=4)
        curve.text(1024, height, f"PVM, layer {layer_idx}", color=colour, ha="center")
    mass = [torch.tensor(base.mean_mass(length)).mean().item() for length in lengths]
    curve.plot(lengths, mass, "s-", color=ORANGE, markersize=4)
    curve.text(1600, 0.045, "attention, whole image", color=ORANGE, ha="center")
    logarithmic(curve, "x")
    curve.set(xlabel="bytes of text after the image", title="weight on the cell that is asked for", ylim=(0, 1))
    return as_svg(figure)


@styled
def dipe() -> str:
    """The distance that each pair of tokens is scored at, with the positions and anchors that the adapter uses."""
    runs = ((False, 4), (True, 6), (False, 13))
    visual = torch.tensor([[kind for kind, length in runs for _ in range(length)]])
    positions = torch.arange(visual.shape[1])[None]
    modality = modalities(visual, None)
    starts = run_starts(modality, torch.tensor([PADDING]))
    anchors = run_anchors(starts, positions, torch.tensor([0]))
    keys, queries = positions, positions.mT
    same = modality.mT == modality
    plain = (queries - keys).float()
    held = torch.where(same, queries - keys, anchors.mT - keys).float()
    causal = queries >= keys

    figure, axes = new_figure(3.7, columns=2, sharey=True)
    length = visual.shape[1]
    colours = ScalarMappable(Normalize(0, length), matplotlib.colormaps["viridis_r"].resampled(length))
    for panel, distances, title in zip(axes[0], (plain, held), ("rotary positions", "with DIPE")):
        for distance in distances[causal].unique():
            # One path of all its cells: a patch for each would make the file four times as large.
            cells = ((distances == distance) & causal).nonzero().tolist()
            squares = [Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)], closed=True) for y, x in cells]
            colour = colours.to_rgba(distance.item())
            panel.add_patch(PathPatch(Path.make_compound_path(*squares), facecolor=colour, edgecolor="white", lw=0.3))
        panel.set(title=title, xlabel="key", aspect="equal", ylim=(length, -1.4), xlim=(-1.4, length))
        panel.grid(visible=False)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[["left", "bottom"]].set_visible(False)
        first = 0
        for kind, size in runs:
            colour = ORANGE if kind else "#777777"
            panel.add_patch(Rectangle((first + 0.1, -1.2), size - 0.2, 0.9, color=colour))
            panel.add_patch(Rectangle((-1.2, first + 0.1), 0.9, size - 0.2, color=colour))
            first += size
        top, bottom = runs[0][1] + runs[1][1], length
        panel.add_patch(Rectangle((4, top), 6, bottom - top, fill=False, edgecolor=ORANGE, linewidth=1.6))
        panel.text(13, 3.4, "grey: text\norange: image", fontsize=8, va="center")
    axes[0][0].set_ylabel("query")
    axes[0][0].annotate(
        "text looks at\nthe image from\never farther away",
        xy=(10, 12),
        xytext=(13, 7),
        fontsize=8,
        va="center",
        arrowprops=dict(arrowstyle="-", color=ORANGE),
    )
    axes[0][1].annotate(
        "from the same\ndistance, however\nlong the text",
        xy=(10, 12),
        xytext=(13, 7),
        fontsize=8,
        va="center",
        arrowprops=dict(arrowstyle="-", color=ORANGE),
    )
    figure.colorbar(colours, ax=axes[0], label="distance in tokens", shrink=0.85)
    return as_svg(figure)


@styled
def t_drs() -> str:
    """The factors of the three steps, and what they make of a flat row of attention, computed as the adapter does."""
    figure, axes = new_figure(2.75, columns=3)
    precise = {"dtype": torch.float64}  # whose rounding, which differs from CPU to CPU, is in no digit of the file
    distance = torch.linspace(0, 1, 41, **precise)
    floor, farthest = Floor.of(0.1).exponent(None), torch.tensor(1.0, **precise)
    for panel, strengths, title in (
        (axes[0][0], (1, 0), "DC: near keys gain"),
        (axes[0][1], (0, 1), "re: far keep a share"),
    ):
        for similarity, colour, dashes in ((-1, BLACK, ":"), (0, BLUE, "--"), (1, GREEN, "-")):
            semantic = semantic_position(torch.full_like(distance, similarity))
            gain = distance_boost(semantic, distance, farthest, floor, floor, *strengths)
            panel.plot(distance, gain, dashes, color=colour, label=f"{similarity}")
        panel.axhline(0.1, color=BLACK, linewidth=0.6)
        panel.set(title=title, xlabel="distance, of the farthest", ylim=(0, 1.05))
    axes[0][0].set_ylabel("added to a weight of 1")
    axes[0][0].legend(title="similarity", title_fontsize=8, fontsize=8, loc="lower left")
    axes[0][1].text(0.02, 0.12, "floor", fontsize=8)

    keys = 48
    similarity = torch.zeros(keys, **precise)
    similarity[8] = 0.9
    semantic = semantic_position(similarity)
    log_weights = semantic.log_softmax(-1)
    least = log_weights.min()
    distance = torch.arange(keys - 1, -1, -1.0, **precise)
    exponents = (Floor.of(text).exponent(least) for text in ("3*min", "2*min"))
    boost = distance_boost(semantic, distance, distance.max(), *exponents, 1.0, 1.0)
    weights = log_weights.exp() * (1 + boost)
    weights = weights / weights.sum()
    panel = axes[0][2]
    panel.plot([1 / keys] * keys, color=BLACK, linestyle=":", label="before")
    panel.plot(log_weights.exp(), color=BLUE, linestyle="--", label="SD")
    panel.plot(weights, color=GREEN, label="all three")
    panel.text(11, weights[8], "a similar key", fontsize=8, va="center")
    panel.set(title="a flat row of attention", xlabel="key (the query is the last)", ylim=(0, 0.04))
    panel.legend(fontsize=8, loc="lower right")
    return as_svg(figure)


def imported_rooms() -> nx.DiGraph:
    """Which room imports which, `experiments` beside those of the package."""
    house = House(PACKAGE)
    graph = house.rooms.copy()
    for module in House(REPOSITORY / "experiments").modules.values():
        for name in module.imports("experiments"):
            package, _, rest = name.partition(".")
            if package == house.package:
                room = rest.partition(".")[0]
                graph.add_edge("experiments", room if room in house.rooms else "")
    return graph


def floors(graph: nx.DiGraph) -> dict[str, int]:
    """By room, how many rooms there are on the longest way down from it."""
    found: dict[str, int] = {}
    for room in reversed(list(nx.topological_sort(graph))):
        found[room] = max((found[other] + 1 for other in graph.successors(room)), default=0)
    return found


@styled
def rooms() -> str:
    """The rooms on their floors. Arrows are imports, without those that a longer way of arrows says as well."""
    graph = imported_rooms()
    floor = floors(graph)
    step, height, width = 1.6, 1.0, 2.7
    figure, axes = new_figure(5.8)
    house = axes[0][0]
    house.set(xlim=(-0.75, 10.85), ylim=(-0.1, max(floor.values()) * step + height + 0.1))
    house.set_axis_off()
    for start, end in sorted(nx.transitive_reduction(graph).edges):
        start_x, end_x = ROOMS[start][0], ROOMS[end][0]
        aside = max(-1.1, min(1.1, (end_x - start_x) / 3))  # arrows that part leave a box at different places
        _arrow(house, (start_x + aside, floor[start] * step), (end_x - aside, floor[end] * step + height))
    for room, (x, purpose) in ROOMS.items():
        is_folder = bool(room) and (PACKAGE / room).is_dir()
        name = f"{room}/" if is_folder or room == "experiments" else f"{room or '__init__'}.py"
        fill, edge = {"methods": (PVM_FILL, "-"), "experiments": (TEXT_FILL, "--")}.get(room, (BASE_FILL, "-"))
        _box(house, x, floor[room] * step, f"{name}\n{purpose}", fill, width, height, edge)
    return as_svg(figure)


def table_of_files() -> str:
    """Every file, from the top floor down, with the first paragraph of its docstring."""
    package, floor = House(PACKAGE), floors(imported_rooms())
    rows = ["| File | What it holds |", "|---|---|"]
    for room in sorted(package.rooms, key=lambda room: (-floor[room], room)):
        own = (module for module in package.modules.values() if module.room == room)
        rows += [_row(module, module.path.relative_to(PACKAGE)) for module in own]
    lab = House(REPOSITORY / "experiments").modules.values()
    rows += [_row(module, module.path.relative_to(REPOSITORY)) for module in lab]
    return "\n".join(rows)


def _row(module: Module, place: pathlib.Path) -> str:
    is_folder = module.path.name == "__init__.py" and len(place.parts) > 1
    name = f"**`{place.parent}/`**" if is_folder else f"`{place}`"
    said = " ".join((ast.get_docstring(module.tree) or "").partition("\n\n")[0].split())
    return f"| {name} | {said.replace('|', chr(92) + '|')} |"


def with_table(page: str) -> str:
    """docs/design.md with the table of files as it is now."""
    return TABLE_OF_FILES.sub(lambda found: f"{found[1]}\n{table_of_files()}\n\n{found[2]}", page)


def table_of_predictions() -> str:
    """What a step of decoding takes on a GPU, on paper: of the base in milliseconds, of the methods relative to it."""
    batches = read_json(PREDICTED)["batches"]
    columns = [(kind, batch) for kind in ("eager", "graph") for batch in batches]
    base = [batches[batch]["base"][kind]["ms"] for kind, batch in columns]
    titles = [f"{'in a graph' if kind == 'graph' else kind}, batch {batch}" for kind, batch in columns]
    rows = ["| | " + " | ".join(["Calls", "Operations", *titles]) + " |", "|---" + "|---:" * (2 + len(columns)) + "|"]
    for name, own in batches["1"].items():
        took = [batches[batch][name][kind]["ms"] for kind, batch in columns]
        title = "base, in ms" if name == "base" else METHODS[name].title
        numbers = [f"{own[kind]['launches']:,}" for kind in ("eager", "graph")]
        numbers += [f"{ms:.1f}" if name == "base" else f"{ms / of_base:.2f}" for ms, of_base in zip(took, base)]
        rows.append("| " + " | ".join([title, *numbers]) + " |")
    return "\n".join(rows)


def table_of_launches() -> str:
    """How many operations each method adds to a step of decoding of the tiny model, in fp32 and bf16, and compiled."""
    in_fp32, in_bf16 = (read_json(path)["methods"] for path in LAUNCHES)
    header = "| Method | In each layer that it changes, fp32 | bf16 | Aim, at most | | Once a step, fp32 | bf16 |"
    rows = [f"{header} Kernels of a compiled step, in all |", "|---|---:|---:|---:|---|---:|---:|---|"]
    for name, own in in_fp32.items():
        if name == "base":
            continue
        steps = own["step"], in_bf16[name]["step"]
        aim = AIMS.get(name)
        verdict = "" if aim is None else "met" if max(step["a layer"] for step in steps) <= aim else "missed"
        kernels = "not compiled"
        if "kernels" in own:
            layers = steps[0]["layers"]
            beyond = own["kernels"] - in_fp32["base"]["kernels"]
            kernels = f"{beyond}, in {layers} layer{'s' if layers > 1 else ''}"
        a_layer, once = ([f"{step[part]}" for step in steps] for part in ("a layer", "once"))
        cells = [METHODS[name].title, *a_layer, str(aim or "none"), verdict, *once, kernels]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows)


def with_predictions(page: str) -> str:
    """docs/performance.md with the tables of what is counted and predicted, as the stored files have it."""
    for pattern, table in ((TABLE_OF_PREDICTIONS, table_of_predictions), (TABLE_OF_LAUNCHES, table_of_launches)):
        page = pattern.sub(lambda found, table=table: f"{found[1]}\n{table()}\n\n{found[2]}", page)
    return page


DRAWN: dict[str, Callable[[], str]] = {"fading": fading, "pvm": pvm, "dipe": dipe, "t-drs": t_drs, "rooms": rooms}


if __name__ == "__main__":
    for name, draw in DRAWN.items():
        path = FIGURES / f"{name}.svg"
        path.write_text(draw())
        print(path)
    design = FIGURES.parent / "design.md"
    design.write_text(with_table(design.read_text()))
    print(design)
    checkpoints = FIGURES.parent / "checkpoints.md"
    checkpoints.write_text(published_configs.with_table(checkpoints.read_text()))
    print(checkpoints)
    performance = FIGURES.parent / "performance.md"
    performance.write_text(with_predictions(performance.read_text()))
    print(performance)

"""`peft-pvm bench`: what each method costs on a model, here and now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from ..bench.launches import measure_launches
from ..bench.models import METHODS, PRESETS, build_random, load
from ..bench.prediction import DEVICES, PREDICTED, check_predictions, predict
from ..bench.report import draw, print_check, print_launches, print_prediction, print_tables, show_scale
from ..bench.run import Settings, measure
from ..folders.data_file import holding, read_json, write_json
from ..folders.replacing import write_file
from ..tokens.families import find_vlm
from ..utils.packages import require
from ..utils.plotting import as_png
from ..utils.terminal import Terminal
from .options import (
    DTYPES,
    LARGEST_SEED,
    check_device,
    counted,
    counts,
    given,
    name_among,
    new_file,
    one_of,
    refuse_beside,
    separated,
    set_kernel,
    without_weights,
)
from .refusals import reading


DEFAULTS = Settings()
# What matters where operations are counted.
COUNTED = (
    *("model", "preset", "layers", "method", "lengths", "visual_tokens", "batch", "device", "dtype"),
    *("attn_implementation", "static_cache", "compile", "seed", "json_file"),
)
DEFAULT_METHODS, DEFAULT_CONTEXTS = ",".join(DEFAULTS.methods), ",".join(map(str, DEFAULTS.contexts))
Preset = Annotated[
    str,
    typer.Option(
        callback=one_of(PRESETS), help=f"Instead of a model, random weights of a shape: {', '.join(PRESETS)}."
    ),
]
Layers = Annotated[
    int | None, counted("Build only this many decoder layers of the preset, with the same share of its vocabulary.")
]
Lengths = Annotated[
    str,
    typer.Option("--context", help="Lengths of the prompt, visual tokens included, separated by commas."),
]
DType = Annotated[str, typer.Option(callback=one_of(DTYPES), help=f"The dtype of the weights: {', '.join(DTYPES)}.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=new_file, help="Where to write every time measured.")
]
Plot = Annotated[Path | None, typer.Option(callback=new_file, help="Where to draw the ratios by length, as PNG.")]
Show = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Measure nothing: print, or plot, what an earlier --json holds."),
]

Launches = Annotated[
    bool,
    typer.Option(
        help="Count operations instead of measuring times, with the first length of the prompt; with --compile, also "
        "the kernels of a compiled step."
    ),
]


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a vision-language model.")] = None,
    preset: Preset = "tiny",
    layers: Layers = None,
    method: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(METHODS)}.")] = DEFAULT_METHODS,
    lengths: Lengths = DEFAULT_CONTEXTS,
    visual_tokens: Annotated[int, counted("Of the one image in each row.")] = DEFAULTS.visual_tokens,
    batch: Annotated[int, counted("Rows.")] = DEFAULTS.batch,
    new_tokens: Annotated[int, counted("Decoded in a round.")] = DEFAULTS.new_tokens,
    rounds: Annotated[int, counted("Of decoding.")] = DEFAULTS.rounds,
    prefills: Annotated[int, counted("Rounds of prefilling.")] = DEFAULTS.prefills,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: DType = "float32",
    attn_implementation: Annotated[str, typer.Option(help="The attention kernel.")] = "sdpa",
    static_cache: Annotated[bool, typer.Option(help="Give the KV cache its full size from the start.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile decoding; on CUDA, into graphs.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides the embeddings.")] = DEFAULTS.seed,
    launches: Launches = False,
    json_file: JsonFile = None,
    plot: Plot = None,
    show: Show = None,
) -> None:
    """Measure prefill, decoding, memory and loading of the base and of each method, taking turns in one process."""
    if plot is not None:
        require("lab", "matplotlib")
    if show is not None:
        refuse_beside(context, "--show", ("plot",), "It measures nothing")
        return _show(show, plot)
    if launches:
        refuse_beside(context, "--launches", COUNTED, "It times nothing")
    check_device(device)
    if model is not None and (given(context, "preset") or layers is not None):
        raise typer.BadParameter(
            "A model has its own shape, so --preset and --layers cannot be given.", param_hint=["--model"]
        )
    settings = Settings(
        methods=tuple(separated("--method", method, name_among(tuple(METHODS)), f"some of {', '.join(METHODS)}")),
        contexts=tuple(counts("--context", lengths)),
        visual_tokens=visual_tokens,
        batch=batch,
        new_tokens=new_tokens,
        rounds=rounds,
        prefills=prefills,
        static_cache=static_cache,
        compile=compile,
        seed=seed,
    )
    if model is not None:
        vlm = find_vlm(without_weights(model, attn_implementation))
        if any("pvm" in name for name in settings.methods):
            _ = vlm.block  # raises where PVM could not be attached
    built = _built(model, preset, layers, dtype, device, attn_implementation)
    if launches:
        _report(measure_launches(built, settings), json_file, None, print_launches)
    else:
        _report(_measured(built, settings), json_file, plot)


def _show(file: Path, plot: Path | None) -> None:
    result = read_json(file)
    with holding(file, "what bench --json writes"):
        _report(result, None, plot)


def _built(
    model: str | None, preset: str, layers: int | None, dtype: str, device: str, attn_implementation: str
) -> nn.Module:
    """The model to measure."""
    kind: torch.dtype = getattr(torch, dtype)
    if model is None:
        built = build_random(preset, layers, kind, device)
        set_kernel(built, attn_implementation)
        return built
    with reading("a model that reads images", model):
        return load(model, kind, device, attn_implementation)


def _measured(model: nn.Module, settings: Settings) -> dict[str, Any]:
    return _with_progress(lambda progress: measure(model, settings, progress))


def _with_progress(run: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, which is given what it calls with what comes next."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        return run(lambda text: progress.update(task, description=text))


def _report(
    result: dict[str, Any],
    json_file: Path | None,
    plot: Path | None,
    print_result: Callable[[dict[str, Any], Console], None] = print_tables,
) -> None:
    if json_file is not None:
        write_json(json_file, result)
    if plot is not None:
        write_file(plot, as_png(draw(result)))
    print_result(result, Terminal())


def scale(
    typer_context: typer.Context,
    preset: Annotated[
        str, typer.Option(callback=one_of(PRESETS), help=f"A shape: {', '.join(PRESETS)}.")
    ] = "8b-random",
    context: Annotated[str, typer.Option(help="Lengths, visual tokens included, separated by commas.")] = "4096,32768",
    visual_tokens: Annotated[str, typer.Option(help="How many of them are visual.")] = "256,1024,4095",
    batch: Annotated[str, typer.Option(help="Conversations decoded in one step.")] = "1,64",
    sequences: Annotated[str, typer.Option(help="Conversations kept at once.")] = "1,1000,1000000",
    branches: Annotated[int | None, counted("Decoder layers with PVM; by default the paper's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of memory, in GB a second, to tell times as well.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            callback=one_of(DEVICES),
            help=f"Predict a step of decoding there, with the first length and number of visual tokens: "
            f"{', '.join(DEVICES)}.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"What --device and --check are about: some of {', '.join(PREDICTED[1:])}.")
    ] = ",".join(PREDICTED[1:]),
    check: Annotated[
        bool, typer.Option("--check", help="Measure steps on this CPU instead, beside what is predicted of them.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Where to write what --device or --check prints.")
    ] = None,
) -> None:
    """Work out, from shapes alone, what PVM keeps of a chat and reads in a step, or what steps take on a GPU."""
    names = separated("--method", method, name_among(PREDICTED), f"some of {', '.join(PREDICTED)}")
    if check:
        refuse_beside(typer_context, "--check", ("method", "json_file"), "It has a prompt and shapes of its own")
        settings = Settings(methods=(), contexts=(512,), visual_tokens=256)
        found = _with_progress(lambda progress: check_predictions(names, settings, progress))
        return _report(found, json_file, None, print_check)
    options = {"--context": context, "--visual-tokens": visual_tokens, "--batch": batch, "--sequences": sequences}
    contexts, visual, batches, kept = (counts(name, text) for name, text in options.items())
    if device is None:
        refused = [name for name in ("method", "json_file") if given(typer_context, name)]
        if refused:
            raise typer.BadParameter(
                "It has an effect with --device or --check alone.", param_hint=[f"--{refused[0]}"]
            )
        return show_scale(preset, contexts, visual, batches, kept, branches, bandwidth)
    allowed = "preset", "context", "visual_tokens", "batch", "method", "json_file"
    refuse_beside(typer_context, "--device", allowed, "It predicts times")
    if visual[0] >= contexts[0]:
        raise typer.BadParameter(
            f"{visual[0]} visual tokens are no part of {contexts[0]}.", param_hint="--visual-tokens"
        )
    _report(predict(device, preset, contexts[0], visual[0], batches, names), json_file, None, print_prediction)

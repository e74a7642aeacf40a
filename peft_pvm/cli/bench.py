"""`peft-pvm bench`: what each method costs on a model, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bench.methods import METHODS
from ..bench.models import PRESETS, build_random, load
from ..bench.report import draw, print_tables
from ..bench.run import Settings, measure
from ..bench.scale import show_scale
from ..data_file import holding, read_json, write_json
from ..extras import require
from ..families import find_vlm
from ..plotting import as_png
from ..replacing import write_file
from ..terminal import Terminal
from .lists import name_among, separated, whole_number
from .models import reading, set_kernel, without_weights
from .options import LARGEST_SEED, MANY, check_device, given, new_file, one_of, refuse_beside


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = Settings()


def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a vision-language model.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            callback=one_of(PRESETS), help=f"Instead of a model, random weights of a shape: {', '.join(PRESETS)}."
        ),
    ] = "tiny",
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MANY,
            help="Build only this many decoder layers of the preset, with the same share of its vocabulary.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(METHODS)}.")] = ",".join(
        DEFAULTS.methods
    ),
    lengths: Annotated[
        str,
        typer.Option("--context", help="Lengths of the prompt, visual tokens included, separated by commas."),
    ] = ",".join(map(str, DEFAULTS.contexts)),
    visual_tokens: Annotated[
        int, typer.Option(min=1, max=MANY, help="Of the one image in each row.")
    ] = DEFAULTS.visual_tokens,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Rows.")] = DEFAULTS.batch,
    new_tokens: Annotated[int, typer.Option(min=1, max=MANY, help="Decoded in a round.")] = DEFAULTS.new_tokens,
    rounds: Annotated[int, typer.Option(min=1, max=MANY, help="Of decoding.")] = DEFAULTS.rounds,
    prefills: Annotated[int, typer.Option(min=1, max=MANY, help="Rounds of prefilling.")] = DEFAULTS.prefills,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(callback=one_of(DTYPES), help=f"The dtype of the weights: {', '.join(DTYPES)}.")
    ] = "float32",
    attn_implementation: Annotated[str, typer.Option(help="The attention kernel.")] = "sdpa",
    static_cache: Annotated[bool, typer.Option(help="Give the KV cache its full size from the start.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile decoding; on CUDA, into graphs.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides the embeddings.")] = DEFAULTS.seed,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Where to write every time measured.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=new_file, help="Where to draw the ratios by length, as PNG.")
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Measure nothing: print, or plot, what an earlier --json holds."
        ),
    ] = None,
) -> None:
    """Measure prefill, decoding, memory and loading of the base and of each method, taking turns in one process."""
    if plot is not None:
        require("lab", "matplotlib")
    if show is not None:
        refuse_beside(context, "--show", ("plot",), "It measures nothing")
        result = read_json(show)
        with holding(show, "what bench --json writes"):
            if plot is not None:
                write_file(plot, as_png(draw(result)))
            print_tables(result, Terminal())
        return
    check_device(device)
    if model is not None and (given(context, "preset") or layers is not None):
        raise typer.BadParameter(
            "A model has its own shape, so --preset and --layers cannot be given.", param_hint=["--model"]
        )
    settings = Settings(
        methods=tuple(separated("--method", method, name_among(tuple(METHODS)), f"some of {', '.join(METHODS)}")),
        contexts=tuple(separated("--context", lengths, whole_number(1), "whole numbers above 0")),
        visual_tokens=visual_tokens,
        batch=batch,
        new_tokens=new_tokens,
        rounds=rounds,
        prefills=prefills,
        static_cache=static_cache,
        compile=compile,
        seed=seed,
    )
    if model is None:
        measured_model = build_random(preset, layers, DTYPES[dtype], device)
        set_kernel(measured_model, attn_implementation)
    else:
        find_vlm(without_weights(model, attn_implementation))
        with reading("a model that reads images", model):
            measured_model = load(model, DTYPES[dtype], device, attn_implementation)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        result = measure(measured_model, settings, lambda text: progress.update(task, description=text))
    if json_file is not None:
        write_json(json_file, result)
    if plot is not None:
        write_file(plot, as_png(draw(result)))
    print_tables(result, Terminal())


def scale(
    preset: Annotated[
        str, typer.Option(callback=one_of(PRESETS), help=f"A shape: {', '.join(PRESETS)}.")
    ] = "8b-random",
    context: Annotated[str, typer.Option(help="Lengths, visual tokens included, separated by commas.")] = "4096,32768",
    visual_tokens: Annotated[str, typer.Option(help="How many of them are visual.")] = "256,1024,4095",
    batch: Annotated[str, typer.Option(help="Conversations decoded in one step.")] = "1,64",
    sequences: Annotated[str, typer.Option(help="Conversations kept at once.")] = "1,1000,1000000",
    branches: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Decoder layers with PVM; by default the paper's.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of memory, in GB a second, to tell times as well.")] = None,
) -> None:
    """Work out, from the shapes alone, what PVM keeps of a conversation and reads in a step, beside the base."""
    options = {"--context": context, "--visual-tokens": visual_tokens, "--batch": batch, "--sequences": sequences}
    contexts, visual, batches, kept = (
        separated(name, text, whole_number(1), "whole numbers above 0") for name, text in options.items()
    )
    show_scale(preset, contexts, visual, batches, kept, branches, bandwidth)

"""`peft-pvm bench`: what each method costs on a model, here and now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bench.methods import METHODS
from ..bench.models import PRESETS, build_random, load
from ..bench.report import draw, print_tables
from ..bench.run import Settings, measure
from ..bench.scale import show_scale
from ..plotting import as_png
from ..replacing import write_file
from .lists import separated
from .refusals import refusals


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = Settings()


def bench(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a vision-language model.")] = None,
    preset: Annotated[
        str, typer.Option(help=f"Instead of a model, random weights of a shape: {', '.join(PRESETS)}.")
    ] = "tiny",
    layers: Annotated[
        int | None, typer.Option(help="Of a preset: so many decoder layers, and that share of the vocabulary.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(METHODS)}.")] = ",".join(
        DEFAULTS.methods
    ),
    context: Annotated[
        str, typer.Option(help="Lengths of the prompt, visual tokens included, separated by commas.")
    ] = ",".join(map(str, DEFAULTS.contexts)),
    visual_tokens: Annotated[int, typer.Option(help="Of the one image in each row.")] = DEFAULTS.visual_tokens,
    batch: Annotated[int, typer.Option(help="Rows.")] = DEFAULTS.batch,
    new_tokens: Annotated[int, typer.Option(help="Decoded in a round.")] = DEFAULTS.new_tokens,
    rounds: Annotated[int, typer.Option(help="Of decoding.")] = DEFAULTS.rounds,
    prefills: Annotated[int, typer.Option(help="Rounds of prefilling.")] = DEFAULTS.prefills,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
    attn_implementation: Annotated[str, typer.Option(help="The attention kernel.")] = "sdpa",
    static_cache: Annotated[bool, typer.Option(help="Give the KV cache its full size from the start.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile decoding; on CUDA, into graphs.")] = False,
    seed: Annotated[int, typer.Option(help="Decides the embeddings.")] = DEFAULTS.seed,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write every time measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the ratios by length, as PNG.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing: print what an earlier --json holds.")] = None,
) -> None:
    """Measure prefill, decoding, memory and loading of the base and of each method, taking turns in one process."""
    if show is not None:
        with refusals():
            print_tables(json.loads(show.read_text()), Console())
        return
    with refusals():
        if dtype not in DTYPES:
            raise ValueError(f"--dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
        settings = Settings(
            methods=tuple(separated("--method", method, str, f"some of {', '.join(METHODS)}")),
            contexts=tuple(separated("--context", context, int, "whole numbers")),
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
            measured_model.set_attn_implementation(attn_implementation)  # type: ignore[operator]
        else:
            measured_model = load(model, DTYPES[dtype], device, attn_implementation)
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        result = measure(measured_model, settings, lambda text: progress.update(task, description=text))
    print_tables(result, Console())
    if json_file is not None:
        write_file(json_file, json.dumps(result, indent=1) + "\n")
    if plot is not None:
        write_file(plot, as_png(draw(result)))


def scale(
    preset: Annotated[str, typer.Option(help=f"A shape: {', '.join(PRESETS)}.")] = "8b-random",
    context: Annotated[str, typer.Option(help="Lengths, visual tokens included, separated by commas.")] = "4096,32768",
    visual_tokens: Annotated[str, typer.Option(help="How many of them are visual.")] = "256,1024,4095",
    batch: Annotated[str, typer.Option(help="Conversations decoded in one step.")] = "1,64",
    sequences: Annotated[str, typer.Option(help="Conversations kept at once.")] = "1,1000,1000000",
    branches: Annotated[int | None, typer.Option(help="Decoder layers with PVM; by default the paper's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of memory, in GB a second, to tell times as well.")] = None,
) -> None:
    """Work out, from the shapes alone, what PVM keeps of a conversation and reads in a step, beside the base."""
    with refusals():
        given = {"--context": context, "--visual-tokens": visual_tokens, "--batch": batch, "--sequences": sequences}
        contexts, visual, batches, kept = (separated(name, text, int, "whole numbers") for name, text in given.items())
        show_scale(preset, contexts, visual, batches, kept, branches, bandwidth)

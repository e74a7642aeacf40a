"""`peft-pvm bench` and `scale`: what each method costs on a model, here and now or on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.extras import require
from . import choices
from .options import (
    LARGEST_SEED,
    AsJSON,
    counted,
    counts,
    given,
    name_among,
    new_file,
    refuse_beside,
    separated,
    there,
)


# What matters where operations are counted.
COUNTED = (
    *("model", "preset", "layers", "method", "lengths", "visual_tokens", "batch", "device", "dtype"),
    *("attn_implementation", "static_cache", "compile", "seed", "as_json"),
)
BESIDE_DEVICE = {"method": "--method", "as_json": "--json"}  # options of `scale`
Preset = Annotated[choices.Preset, typer.Option(help="Use random weights of this shape instead of a model.")]
Layers = Annotated[
    int | None, counted("Build only this many decoder layers of the preset, with the same share of its vocabulary.")
]
Lengths = Annotated[
    str,
    typer.Option("--context", help="Lengths of the prompt, visual tokens included, separated by commas."),
]
DType = Annotated[choices.DType, typer.Option(help="The dtype of the weights.")]
Plot = Annotated[Path | None, typer.Option(callback=new_file, help="Draw the ratios by length into this PNG file.")]
Show = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Measure nothing: print or plot the output of an earlier run with --json, from this file.",
    ),
]

Launches = Annotated[
    bool,
    typer.Option(
        help="Count operations instead of measuring times, with the first length of the prompt; with --compile, also "
        "the kernels of a compiled step, except for methods that act only in generate."
    ),
]


Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of a vision-language model.", callback=there("a model that reads images")),
]


def bench(
    context: typer.Context,
    model: Model = None,
    preset: Preset = "tiny",
    layers: Layers = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"Separated by commas: {', '.join(choices.BENCHED)}. Or all: every method by itself, not naive."
        ),
    ] = ",".join(choices.BENCHED_BY_DEFAULT),
    lengths: Lengths = "2048",
    visual_tokens: Annotated[int, counted("Visual tokens of the one image in each row.")] = 1024,
    batch: Annotated[int, counted("Rows of the batch.")] = 1,
    new_tokens: Annotated[int, counted("Tokens to decode in a round.")] = 8,
    rounds: Annotated[int, counted("Rounds of decoding.")] = 5,
    prefills: Annotated[int, counted("Rounds of prefilling.")] = 3,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: DType = "float32",
    attn_implementation: Annotated[str, typer.Option(help="The attention kernel.")] = "sdpa",
    static_cache: Annotated[bool, typer.Option(help="Give the KV cache its full size from the start.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile decoding; on CUDA, into graphs.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the embeddings.")] = 0,
    launches: Launches = False,
    as_json: AsJSON = False,
    plot: Plot = None,
    show: Show = None,
) -> None:
    """Measure prefill, decoding, memory and loading of the base and of each method, taking turns in one process."""
    if plot is not None:
        require("lab", "matplotlib")
    if show is not None:
        refuse_beside(context, "--show", ("plot",), "It measures nothing")
        from .work import bench as work

        return work.show(show, plot)
    if launches:
        refuse_beside(context, "--launches", COUNTED, "It times nothing")
    if model is not None and (given(context, "preset") or layers is not None):
        raise typer.BadParameter(
            "A model has its own shape, so --preset and --layers cannot be given.", param_hint=["--model"]
        )
    names = _methods(method)
    contexts = counts("--context", lengths)
    from .work import bench as work

    settings = work.Settings(
        methods=names,
        contexts=tuple(contexts),
        visual_tokens=visual_tokens,
        batch=batch,
        new_tokens=new_tokens,
        rounds=rounds,
        prefills=prefills,
        static_cache=static_cache,
        compile=compile,
        seed=seed,
    )
    measured = work.Measured(model, preset, layers, device, dtype, attn_implementation)
    work.bench(measured, settings, launches, as_json, plot)


def _methods(text: str) -> tuple[str, ...]:
    """The names in `--method`, each once. `all` stands for every method by itself, not naive."""
    accepted = f"some of {', '.join(choices.BENCHED)}, or all"
    names = separated("--method", text, name_among((*choices.BENCHED, "all")), accepted)
    return tuple(dict.fromkeys(each for name in names for each in (choices.ALL if name == "all" else (name,))))


def scale(
    typer_context: typer.Context,
    preset: Annotated[choices.Preset, typer.Option(help="The shape of the model.")] = "8b-random",
    context: Annotated[
        str, typer.Option(help="Lengths of the context, visual tokens included, separated by commas.")
    ] = "4096,32768",
    visual_tokens: Annotated[
        str, typer.Option(help="How many tokens of the context are visual, separated by commas.")
    ] = "256,1024,4095",
    batch: Annotated[str, typer.Option(help="Conversations decoded in one step.")] = "1,64",
    sequences: Annotated[str, typer.Option(help="Conversations kept at once.")] = "1,1000,1000000",
    branches: Annotated[int | None, counted("Decoder layers with PVM; by default the paper's.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in GB per second. If given, times are shown as well.")
    ] = None,
    device: Annotated[
        choices.GPU | None,
        typer.Option(help="Predict a decoding step on this GPU, for the first --context and --visual-tokens."),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"What --device and --check are about: some of {', '.join(choices.PREDICTED[1:])}.")
    ] = ",".join(choices.PREDICTED[1:]),
    check: Annotated[
        bool, typer.Option("--check", help="Measure steps on this CPU instead, and show them beside the prediction.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Compute, only from shapes, the memory that PVM takes and reads, or predict decoding latency on a GPU."""
    names = separated("--method", method, name_among(choices.PREDICTED), f"some of {', '.join(choices.PREDICTED)}")
    if check:
        refuse_beside(typer_context, "--check", ("method", "as_json"), "It has a prompt and shapes of its own")
        from .work import bench as work

        return work.check(names, as_json)
    options = {"--context": context, "--visual-tokens": visual_tokens, "--batch": batch, "--sequences": sequences}
    contexts, visual, batches, kept = (counts(name, text) for name, text in options.items())
    if device is None:
        refused = [option for name, option in BESIDE_DEVICE.items() if given(typer_context, name)]
        if refused:
            raise typer.BadParameter("It has an effect only with --device or --check.", param_hint=refused)
        from .work import bench as work

        return work.show_scale(preset, contexts, visual, batches, kept, branches, bandwidth)
    allowed = "preset", "context", "visual_tokens", "batch", "method", "as_json"
    refuse_beside(typer_context, "--device", allowed, "It predicts times")
    if visual[0] >= contexts[0]:
        raise typer.BadParameter(
            f"{visual[0]} visual tokens are no part of {contexts[0]}.", param_hint="--visual-tokens"
        )
    from .work import bench as work

    work.predict(device, preset, contexts[0], visual[0], batches, names, as_json)

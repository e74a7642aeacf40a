"""`peft-pvm probe`, `app`, `eval-lengths`, `curves`: how a model does on one image, on benchmarks, and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.extras import require
from .options import (
    LARGEST_SEED,
    MANY,
    REAL,
    REAL_BASE,
    TINY,
    Device,
    DType,
    Kernel,
    Model,
    ModelOptions,
    counted,
    new_file,
    new_folder,
    separated,
    there,
    whole_number,
)


LOCAL = "127.0.0.1"


def probe(
    model: Model,
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The image file.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it.")],
    out: Annotated[
        Path, typer.Option(callback=new_folder, help="Folder for report.html, probe.json and the pictures.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id of an adapter. Repeatable; all adapters act together.", callback=there("an adapter")
        ),
    ] = None,
    max_new_tokens: Annotated[int, counted("The most tokens that the answer may have.")] = 64,
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    sink_factor: Annotated[
        float,
        typer.Option(
            min=0,
            max=MANY,
            help="A visual token that gets more than this many times the mean attention of visual tokens is a sink.",
        ),
    ] = 10.0,
    retrieval_token: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=MANY,
            help="Number of a generated token, from 0, for which to show what PVM retrieves. Repeatable; by default, "
            "the six with the largest updates.",
        ),
    ] = None,
) -> None:
    """Measure how much a model looks at its image while it answers, and what adapters change."""
    require("lab", "jinja2", "matplotlib", "PIL")
    if not sink_factor > 0:
        raise typer.BadParameter(f"{sink_factor} must be above 0.", param_hint=["--sink-factor"])
    from .work import evaluation as work

    of_model = ModelOptions(model, device, dtype, attn_implementation)
    work.probe(
        of_model, adapter or [], image, prompt, out,
        max_new_tokens=max_new_tokens, sink_factor=sink_factor, retrieval_tokens=retrieval_token or None,
    )  # fmt: skip


def serve_app(
    model: Annotated[
        str,
        typer.Option(
            help=f"The model to start with: `{TINY}` or `{REAL}`, the lab's, the latter in {REAL_BASE}; or the folder "
            "or Hub id of another."
        ),
    ] = TINY,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for other machines as well.")] = LOCAL,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    device: Device = "cpu",
    dtype: DType = "auto",
) -> None:
    """Serve a page for the browser: ask a model about an image, with adapters on and off, and see where it looks."""
    require("app", "gradio")
    require("lab", "jinja2", "matplotlib", "PIL", "sklearn")
    from .work import app as work

    work.serve(ModelOptions(model, device, dtype, None), host, port)


def eval_lengths(
    model: Annotated[str, typer.Option(help="A model of lmms-eval: qwen3_vl, qwen2_5_vl or llava_hf.")],
    model_args: Annotated[
        str, typer.Option(help="Arguments of that model, such as pretrained=Qwen/Qwen3-VL-8B-Instruct.")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lmms-eval, separated by commas.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for by_length.json and by_length.png.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of text between image and question, separated by commas.")
    ] = "0,1024,4096,8192,16384,32768",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id of an adapter, or several joined by +, which act together. Repeatable.",
            callback=there("an adapter"),
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of sampling, separated by commas. There is one run for each.")
    ] = "0",
    include_path: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of further tasks; by default those of this package, such as pvm_paper.",
        ),
    ] = None,
    limit: Annotated[int | None, counted("Evaluate only this many documents of each task, as a trial.")] = None,
    batch_size: Annotated[int, counted("Documents at a time.")] = 1,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Changes to the tasks' generation settings.")] = None,
) -> None:
    """Evaluate a model with lmms-eval, alone and with adapters, after longer and longer texts."""
    names = separated("--tasks", tasks, str, "names of tasks or groups")
    tokens = separated("--lengths", lengths, whole_number(0), "whole numbers of tokens, such as 0,1024")
    draws = separated("--seeds", seeds, whole_number(0, LARGEST_SEED), "whole numbers from 0 on")
    require("eval", "lmms_eval")
    require("lab", "matplotlib")  # for the picture, at the end
    from .work import evaluation as work

    work.eval_lengths(
        out,
        model=model,
        model_args=model_args,
        tasks=names,
        lengths=tokens,
        adapters=adapter or [],
        seeds=draws,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        device=device,
        gen_kwargs=gen_kwargs,
    )


def curves(
    folder: Annotated[Path, typer.Argument(help="Output folder or checkpoint of a training.")],
    out: Annotated[Path, typer.Option(callback=new_file, help="The picture, a PNG file.")] = Path("curves.png"),
) -> None:
    """Draw the curves of a PVM training: loss or reward, gates, updates."""
    require("lab", "matplotlib")
    from .work import evaluation as work

    work.curves(folder, out)

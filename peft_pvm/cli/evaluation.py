"""`peft-pvm probe`, `eval-lengths`, `curves`: how a model does, on one image, on benchmarks, and while it trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..attention.dispatch import steerable_attentions
from ..folders.data_file import read_image, write_json
from ..folders.replacing import write_file
from ..integrations.lmms_eval import report, tasks_folder
from ..integrations.trl import draw_curves, read_log
from ..methods.pvm import PVMConfig
from ..probe import build_inputs, picture_of, verdict
from ..probe import probe as probe_model
from ..probe.run import check_retrieval
from ..tokens.families import find_vlm
from ..utils.packages import require
from ..utils.plotting import as_png
from ..utils.terminal import Terminal, say
from .loading import LOADED_AS, load_model, load_processor, moved, progress_bars
from .options import (
    LARGEST_SEED,
    MANY,
    check_adapter,
    check_device,
    counted,
    new_file,
    new_folder,
    one_of,
    separated,
    whole_number,
    without_weights,
)
from .refusals import reading


if TYPE_CHECKING:
    from PIL.Image import Image


BY_LENGTH = "by_length"  # what eval-lengths writes, without extensions


def probe(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a vision-language model.")],
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The image file.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it.")],
    out: Annotated[
        Path, typer.Option(callback=new_folder, help="Folder for report.html, probe.json and the pictures.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folder or Hub id of an adapter. May be given several times; all act.")
    ] = None,
    max_new_tokens: Annotated[int, counted("Length of the answer at most.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(callback=one_of(LOADED_AS), help=f"One of {', '.join(LOADED_AS)}.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="The attention kernel, such as sdpa.")] = None,
    sink_factor: Annotated[
        float,
        typer.Option(min=0, max=MANY, help="A visual sink draws more than so many times the mean of visual tokens."),
    ] = 10.0,
    retrieval_token: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=MANY,
            help="A generated token, from 0, whose retrieval by PVM is shown; by default six. Repeatable.",
        ),
    ] = None,
) -> None:
    """Measure how much a model stops looking at its image, and what adapters change about that."""
    require("lab", "jinja2", "matplotlib", "PIL")
    check_device(device)
    if not sink_factor > 0:
        raise typer.BadParameter(f"{sink_factor} must be above 0.", param_hint=["--sink-factor"])
    check_retrieval(retrieval_token, max_new_tokens)
    picture = _open_image(image)
    _check_without_weights(model, adapter or [], attn_implementation, bool(retrieval_token))
    processor = load_processor(model)
    with reading(f"input of a {type(processor).__name__}", image):
        inputs = build_inputs(processor, picture, prompt)
    loaded = load_model(model, adapter or [], device, dtype, attn_implementation)
    with progress_bars() as show:
        result = probe_model(
            loaded,
            {name: moved(tensor, device, loaded.dtype) for name, tensor in inputs.items()},
            prompt=prompt,
            decode=processor.tokenizer.decode,
            images=[picture_of(processor, picture)],
            max_new_tokens=max_new_tokens,
            sink_factor=sink_factor,
            retrieval_tokens=retrieval_token or None,
            progress=show,
        )
    path = result.save(out)
    say(f"Answer: {''.join(result.tokens)}")
    for sentence in verdict(result):
        say(sentence)
    say(f"Report: {path}")


def _check_without_weights(
    model: str, adapters: list[str], attn_implementation: str | None, wants_retrieval: bool
) -> None:
    """Find what is wrong with a model and adapters as far as their configurations tell."""
    steerable_attentions(find_vlm(without_weights(model, attn_implementation)), "The probe")
    configs = [check_adapter(source, model) for source in adapters]
    if tuned := [source for source, config in zip(adapters, configs) if config.is_prompt_learning]:
        raise typer.BadParameter(
            f"{tuned} put tokens of their own before the prompt, which the probe cannot follow.",
            param_hint=["--adapter"],
        )
    if wants_retrieval and not any(isinstance(config, PVMConfig) for config in configs):
        raise typer.BadParameter("No --adapter is of PVM, so there is no retrieval.", param_hint=["--retrieval-token"])


def _open_image(path: Path) -> Image:
    try:
        return read_image(path)
    except ValueError as error:
        raise typer.BadParameter(f"'{path}' {error}", param_hint=["--image"]) from error


def eval_lengths(
    model: Annotated[str, typer.Option(help="Of lmms-eval: qwen3_vl, qwen2_5_vl or llava_hf.")],
    model_args: Annotated[str, typer.Option(help="Of that model, such as pretrained=Qwen/Qwen3-VL-8B-Instruct.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lmms-eval, separated by commas.")],
    out: Annotated[Path, typer.Option(callback=new_folder, help=f"Folder for {BY_LENGTH}.json and {BY_LENGTH}.png.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of text between image and question, separated by commas.")
    ] = "0,1024,4096,8192,16384,32768",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Folder or Hub id, or several with + between, which act together. Repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of sampling, separated by commas; each is a run.")] = "0",
    include_path: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of further tasks; by default those of this package, such as pvm_paper.",
        ),
    ] = None,
    limit: Annotated[int | None, counted("Documents of each task, for a try.")] = None,
    batch_size: Annotated[int, counted("Documents at a time.")] = 1,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="Changes to the tasks' generation settings.")] = None,
) -> None:
    """Evaluate a model with lmms-eval, alone and with adapters, after ever more text between image and question."""
    names = separated("--tasks", tasks, str, "names of tasks or groups")
    tokens = separated("--lengths", lengths, whole_number(0), "whole numbers of tokens, such as 0,1024")
    draws = separated("--seeds", seeds, whole_number(0, LARGEST_SEED), "whole numbers from 0 on")
    if device is not None:
        check_device(device)
    require("lab", "matplotlib")  # for the picture, at the end
    from ..integrations.lmms_eval.lengths import Settings, evaluate_lengths  # here: it needs the extra `eval`

    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        model=model,
        model_args=model_args,
        tasks=names,
        lengths=tokens,
        adapters=adapter or [],
        seeds=draws,
        include_path=tasks_folder() if include_path is None else os.fspath(include_path),
        limit=limit,
        batch_size=batch_size,
        device=device,
        gen_kwargs=gen_kwargs,
    )
    result = evaluate_lengths(
        settings,
        progress=lambda text: say(text, err=True),
        keep=lambda result: write_json(out / f"{BY_LENGTH}.json", result),
    )
    if not result["scores"]:  # another process than the first writes nothing
        return
    write_file(out / f"{BY_LENGTH}.png", as_png(report.draw(result)))
    for table in report.tables(result):
        Terminal().print(table)


def curves(
    folder: Annotated[Path, typer.Argument(help="Output folder or checkpoint of a training.")],
    out: Annotated[Path, typer.Option(callback=new_file, help="The picture, a PNG file.")] = Path("curves.png"),
) -> None:
    """Draw what a training of PVM logged: loss or reward, gates, updates."""
    write_file(out, draw_curves(read_log(folder)))
    say(out)

"""`peft-pvm probe`: a model, an image, a prompt; a report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import PIL.Image
import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..families import find_vlm
from ..loading import load_adapters
from ..probe import ProbeResult, build_inputs, picture_of
from ..probe import probe as probe_model
from ..steering import steerable_attentions


DTYPES = ("auto", "float32", "bfloat16", "float16")


def probe(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a vision-language model.")],
    image: Annotated[Path, typer.Option(help="The image file.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, probe.json and the pictures.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Folder or Hub id of an adapter. May be given several times; all act.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="The attention kernel, such as sdpa.")] = None,
    sink_factor: Annotated[
        float, typer.Option(help="A visual sink draws more than so many times the mean of visual tokens.")
    ] = 10.0,
    retrieval_token: Annotated[
        list[int] | None,
        typer.Option(help="A generated token, from 0, whose retrieval by PVM is shown; by default six. Repeatable."),
    ] = None,
) -> None:
    """Measure how much a model stops looking at its image, and what adapters change about that."""
    picture = _open_image(image)
    if dtype not in DTYPES:
        _fail(f"--dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    loaded, processor = _load(model, dtype, device, attn_implementation)
    try:
        load_adapters(loaded, adapter or [])
        inputs = {name: tensor.to(device) for name, tensor in build_inputs(processor, picture, prompt).items()}
        with _progress() as show:
            result = probe_model(
                loaded,
                _in_dtype(inputs, loaded.dtype),
                prompt=prompt,
                decode=processor.tokenizer.decode,
                images=[picture_of(processor, picture)],
                max_new_tokens=max_new_tokens,
                sink_factor=sink_factor,
                retrieval_tokens=retrieval_token or None,
                progress=show,
            )
    except (ValueError, NotImplementedError) as error:
        _fail(str(error))
    report = result.save(out)
    typer.echo(f"Answer: {''.join(result.tokens)}")
    typer.echo(_sentence(result))
    typer.echo(f"Report: {report}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def _open_image(path: Path) -> PIL.Image.Image:
    if not path.is_file():
        _fail(f"There is no image {path}.")
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (PIL.UnidentifiedImageError, OSError) as error:
        _fail(f"{path} cannot be read as an image: {error}")


def _load(source: str, dtype: str, device: str, attn_implementation: str | None) -> tuple[Any, Any]:
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **kernel)
    except (OSError, ValueError, ImportError) as error:
        _fail(f"{source} cannot be loaded as a model that reads images: {_first_line(error)}")
    try:  # before the processor and the adapters, whose errors would hide this one
        steerable_attentions(find_vlm(model), "The probe")
    except ValueError as error:
        _fail(str(error))
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        _fail(f"The processor of {source} cannot be loaded: {_first_line(error)}")
    if not hasattr(processor, "image_processor"):
        _fail(f"The processor of {source} is a {type(processor).__name__}, which takes no images.")
    try:
        return model.to(torch.device(device)).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        _fail(f"--device {device} cannot be used: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _in_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@contextmanager
def _progress() -> Iterator[Any]:
    """Progress bars on standard error, where they do not mix with what the command prints."""
    with Progress(console=Console(file=sys.stderr), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done)

        yield show


def _sentence(result: ProbeResult) -> str:
    parts = []
    for forward in result.forwards[:2]:
        law = forward.mean_decay
        exponent = "" if law is None else f", decay exponent {law.exponent:.2f} ± {law.standard_error:.2f}"
        parts.append(f"{forward.name}: {forward.mean_mass[0]:.3f} to {forward.mean_mass[-1]:.3f}{exponent}")
    return f"Attention on the image, first to last token: {'; '.join(parts)}."

"""`peft-pvm probe`: a model, an image, a prompt; a report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import Progress, TaskID
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..attention.dispatch import steerable_attentions
from ..extras import require
from ..families import find_vlm
from ..loading import load_adapters
from ..probe import ProbeResult, build_inputs, picture_of
from ..probe import probe as probe_model
from ..probe.run import check_retrieval
from ..pvm import PVMConfig
from ..terminal import Terminal, say
from .models import check_adapter, reading, without_weights
from .options import MANY, check_device, new_folder, one_of


if TYPE_CHECKING:
    from PIL.Image import Image


DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MANY, help="Length of the answer at most.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(callback=one_of(DTYPES), help=f"One of {', '.join(DTYPES)}.")] = "auto",
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
    require("lab", "matplotlib", "PIL")
    check_device(device)
    if not sink_factor > 0:
        raise typer.BadParameter(f"{sink_factor} must be above 0.", param_hint=["--sink-factor"])
    check_retrieval(retrieval_token, max_new_tokens)
    picture = _open_image(image)
    # All that can be found wrong without the weights, which can take minutes to load.
    steerable_attentions(find_vlm(without_weights(model, attn_implementation)), "The probe")
    configs = [check_adapter(source, model) for source in adapter or []]
    if tuned := [source for source, config in zip(adapter or [], configs) if config.is_prompt_learning]:
        raise typer.BadParameter(
            f"{tuned} put tokens of their own before the prompt, which the probe cannot follow.",
            param_hint=["--adapter"],
        )
    if retrieval_token and not any(isinstance(config, PVMConfig) for config in configs):
        raise typer.BadParameter("No --adapter is of PVM, so there is no retrieval.", param_hint=["--retrieval-token"])
    processor = _load_processor(model)
    with reading(f"input of a {type(processor).__name__}", image):
        inputs = build_inputs(processor, picture, prompt)
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with reading("a model that reads images", model):
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, **kernel)
    loaded = loaded.to(torch.device(device)).eval()
    load_adapters(loaded, adapter or [])
    with _progress() as show:
        result = probe_model(
            loaded,
            {name: _moved(tensor, device, loaded.dtype) for name, tensor in inputs.items()},
            prompt=prompt,
            decode=processor.tokenizer.decode,
            images=[picture_of(processor, picture)],
            max_new_tokens=max_new_tokens,
            sink_factor=sink_factor,
            retrieval_tokens=retrieval_token or None,
            progress=show,
        )
    report = result.save(out)
    say(f"Answer: {''.join(result.tokens)}")
    say(_sentence(result))
    say(f"Report: {report}")


def _open_image(path: Path) -> Image:
    import PIL.Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # twice as large, it is an error
        try:
            with PIL.Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # of a damaged file, whatever PIL's readers trip over
            raise typer.BadParameter(
                f"'{path}' cannot be read as an image: {error}", param_hint=["--image"]
            ) from error


def _load_processor(source: str) -> Any:
    with reading("a processor", source):
        processor = AutoProcessor.from_pretrained(source)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"The processor of {source} is a {type(processor).__name__}, which takes no images.")
    return processor


def _moved(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)


@contextmanager
def _progress() -> Iterator[Any]:
    """Progress bars on standard error, where they do not mix with what the command prints."""
    with Progress(console=Terminal(stderr=True), transient=True) as bars:
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

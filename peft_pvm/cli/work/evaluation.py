"""The work of `peft-pvm probe`, `eval-lengths` and `curves`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...attention.dispatch import steerable_attentions
from ...folders.data_file import read_image, write_json
from ...folders.replacing import write_file
from ...integrations.lmms_eval import report, tasks_folder
from ...integrations.trl import draw_curves, read_log
from ...methods.pvm import PVMConfig
from ...probe import build_inputs, picture_of, verdict
from ...probe import probe as probe_model
from ...probe.run import check_retrieval
from ...tokens.families import find_vlm
from ...utils.plotting import as_png
from ...utils.terminal import Terminal, say
from ..options import ModelOptions
from ..refusals import reading
from .loading import (
    check_adapter,
    check_device,
    load_model,
    load_processor,
    moved,
    progress_bars,
    without_weights,
)


if TYPE_CHECKING:
    from PIL.Image import Image


BY_LENGTH = "by_length"  # what eval-lengths writes, without extensions


def probe(
    of_model: ModelOptions,
    adapters: list[str],
    image: Path,
    prompt: str,
    out: Path,
    *,
    max_new_tokens: int,
    sink_factor: float,
    retrieval_tokens: list[int] | None,
) -> None:
    """Measure how much a model looks at an image, alone and with adapters."""
    check_retrieval(retrieval_tokens, max_new_tokens)
    picture = _open_image(image)
    check_device(of_model.device)
    _check_without_weights(of_model, adapters, bool(retrieval_tokens))
    processor = load_processor(of_model.model)
    with reading(f"input of a {type(processor).__name__}", image):
        inputs = build_inputs(processor, picture, prompt)
    loaded = load_model(of_model, adapters)
    with progress_bars() as show:
        result = probe_model(
            loaded,
            {name: moved(tensor, of_model.device, loaded.dtype) for name, tensor in inputs.items()},
            prompt=prompt,
            decode=processor.tokenizer.decode,
            images=[picture_of(processor, picture)],
            max_new_tokens=max_new_tokens,
            sink_factor=sink_factor,
            retrieval_tokens=retrieval_tokens,
            progress=show,
        )
    path = result.save(out)
    say(f"Answer: {''.join(result.tokens)}")
    for sentence in verdict(result):
        say(sentence)
    say(f"Report: {path}")


def _check_without_weights(of_model: ModelOptions, adapters: list[str], wants_retrieval: bool) -> None:
    """Find what is wrong with a model and adapters as far as their configurations tell."""
    steerable_attentions(find_vlm(without_weights(of_model.model, of_model.attn_implementation)), "The probe")
    configs = [check_adapter(source, of_model.model) for source in adapters]
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


def eval_lengths(out: Path, *, include_path: Path | None, device: str | None, **settings: Any) -> None:
    """Evaluate with lmms-eval after ever more text, with the other settings of `evaluate_lengths`."""
    if device is not None:
        check_device(device)
    from ...integrations.lmms_eval.lengths import Settings, evaluate_lengths  # here: it needs the extra `eval`

    out.mkdir(parents=True, exist_ok=True)
    folder = tasks_folder() if include_path is None else os.fspath(include_path)
    result = evaluate_lengths(
        Settings(include_path=folder, device=device, **settings),
        progress=lambda text: say(text, err=True),
        keep=lambda result: write_json(out / f"{BY_LENGTH}.json", result),
    )
    if not result["scores"]:  # another process than the first writes nothing
        return
    write_file(out / f"{BY_LENGTH}.png", as_png(report.draw(result)))
    for table in report.tables(result):
        Terminal().print(table)


def curves(folder: Path, out: Path) -> None:
    """Draw what a training logged."""
    write_file(out, draw_curves(read_log(folder)))
    say(out)

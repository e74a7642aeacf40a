"""The work of `peft-pvm bench` and `scale`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

from ...bench import prediction
from ...bench.launches import measure_launches
from ...bench.models import build_random, load
from ...bench.report import draw, print_check, print_launches, print_prediction, print_tables, show_scale
from ...bench.run import measure
from ...bench.runners import Settings
from ...folders.data_file import holding, read_json
from ...folders.replacing import write_file
from ...tokens.families import find_vlm
from ...utils.plotting import as_png
from ...utils.terminal import Bars, Terminal, say
from ..choices import DType, Preset
from ..refusals import reading
from .loading import check_device, set_kernel, without_weights


__all__ = ["Measured", "Settings", "bench", "check", "predict", "show", "show_scale"]


@dataclass(frozen=True)
class Measured:
    """The model to measure.

    Attributes:
        model: Folder or Hub id; `None`: random weights.
        preset: Their shape.
        layers: How many decoder layers of the preset are built; `None`: all.
        device: Where it is to run.
        dtype: Of its weights.
        attn_implementation: The attention kernel.
    """

    model: str | None
    preset: Preset
    layers: int | None
    device: str
    dtype: DType
    attn_implementation: str

    def check(self, methods: tuple[str, ...]) -> None:
        """Find what is wrong with it, as far as its configuration tells."""
        check_device(self.device)
        if self.model is not None:
            vlm = find_vlm(without_weights(self.model, self.attn_implementation))
            if all("pvm" in name for name in methods if name != "base"):  # else the others are measured
                _ = vlm.block  # raises where PVM could not be attached

    def built(self) -> nn.Module:
        """The model with its weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.model is None:
            built = build_random(self.preset, self.layers, dtype, self.device)
            set_kernel(built, self.attn_implementation)
            return built
        with reading("a model that reads images", self.model):
            return load(self.model, dtype, self.device, self.attn_implementation)


def bench(measured: Measured, settings: Settings, launches: bool, as_json: bool, plot: Path | None) -> None:
    """Measure times, or count operations."""
    measured.check(settings.methods)
    model = measured.built()
    if launches:
        _report(measure_launches(model, settings), as_json, print_result=print_launches)
    else:
        _report(_with_progress(lambda progress: measure(model, settings, progress)), as_json, plot)


def show(file: Path, plot: Path | None) -> None:
    """Print, and draw, what was measured, or print what was counted, earlier."""
    result = read_json(file)
    is_counted = isinstance(result, dict) and "methods" in result
    if is_counted and plot is not None:
        raise typer.BadParameter(f"{file} holds counts of operations, of which there is no plot.", param_hint="--plot")
    with holding(file, "what bench --json prints"):
        _report(result, False, plot, print_launches if is_counted else print_tables)


def check(methods: list[str], as_json: bool) -> None:
    """Measure steps of decoding on this CPU, beside what is predicted of them."""
    settings = Settings(methods=(), contexts=(512,), visual_tokens=256)
    found = _with_progress(lambda progress: prediction.check_predictions(methods, settings, progress))
    _report(found, as_json, print_result=print_check)


def predict(
    device: str, preset: Preset, context: int, visual_tokens: int, batches: list[int], methods: list[str],
    as_json: bool,
) -> None:  # fmt: skip
    """Predict what a step of decoding takes on a GPU."""
    found = prediction.predict(device, preset, context, visual_tokens, batches, methods)
    _report(found, as_json, print_result=print_prediction)


def _with_progress(run: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    """Call `run` with a function that shows what it does next, and return its result."""
    with Bars() as bars:
        task = bars.add_task("", total=None)
        return run(lambda text: bars.update(task, description=text))


def _report(
    result: dict[str, Any],
    as_json: bool,
    plot: Path | None = None,
    print_result: Callable[[dict[str, Any], Console], None] = print_tables,
) -> None:
    if plot is not None:
        write_file(plot, as_png(draw(result)))
    if as_json:
        say(json.dumps(result, indent=1))
    else:
        print_result(result, Terminal())

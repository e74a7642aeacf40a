"""The sub-commands of `peft-pvm`, registered."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from ..utils.terminal import say
from .adapters import card, convert, export_reference, export_vllm, inspect, merge, methods, models, push
from .bench import bench, scale
from .comparing import compare
from .evaluation import curves, eval_lengths, probe, serve_app
from .lab import app as lab
from .proposals import calibrate, layers, sinks
from .refusals import Commands


VERSIONS = ("peft-pvm", "peft", "transformers", "torch")

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(", ".join(f"{package} {version(package)}" for package in VERSIONS))
        raise typer.Exit


@app.callback()
def describe(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Adapters that keep vision-language models looking at the image."""
    # PEFT asks transformers for something by its old name; nobody who runs a command can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


COMMANDS = (
    probe,
    layers,
    calibrate,
    compare,
    sinks,
    bench,
    scale,
    eval_lengths,
    methods,
    models,
    inspect,
    merge,
    convert,
    export_reference,
    export_vllm,
    card,
    push,
    curves,
)
for command in COMMANDS:
    app.command()(command)
app.command("app")(serve_app)
app.add_typer(lab, name="lab")

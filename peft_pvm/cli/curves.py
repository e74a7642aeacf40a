"""`peft-pvm curves`: what a training logged, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..curves import draw_curves, read_log
from ..replacing import write_file
from ..terminal import say
from .options import new_file


def curves(
    folder: Annotated[Path, typer.Argument(help="Output folder or checkpoint of a training.")],
    out: Annotated[Path, typer.Option(callback=new_file, help="The picture, a PNG file.")] = Path("curves.png"),
) -> None:
    """Draw what a training of PVM logged: loss or reward, gates, updates."""
    write_file(out, draw_curves(read_log(folder)))
    say(out)

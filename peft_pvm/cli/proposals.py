"""`peft-pvm layers`, `calibrate`, `sinks`: settings of adapters, proposed from a model and rows of the user's own."""

from __future__ import annotations

from typing import Annotated

import typer

from ..utils.extras import require
from .choices import FARTHEST, LENGTHS, MAX_DISTANCES, TAU
from .options import (
    LARGEST_SEED,
    AsJSON,
    Device,
    DType,
    Kernel,
    Model,
    ModelOptions,
    counted,
    separated,
    whole_number,
)


Data = Annotated[
    str,
    typer.Option(
        help="Folder or Hub id of a data set of chats, as for training: `images`, and `messages` or `prompt` and "
        "`completion`. The first rows with images are read."
    ),
]
Split = Annotated[str, typer.Option(help="The split of the data set.")]


def layers(
    model: Model,
    data: Data,
    rows: Annotated[int, counted("Rows to read.")] = 8,
    count: Annotated[int, counted("Layers to propose.")] = 3,
    split: Split = "train",
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    as_json: AsJSON = False,
) -> None:
    """Propose decoder layers for PVM, from where a model looks at the image before it answers."""
    require("train", "datasets", "PIL")
    from .work import proposals as work

    of_model = ModelOptions(model, device, dtype, attn_implementation)
    work.layers(of_model, work.Rows(data, split, rows), count, as_json)


def calibrate(
    model: Model,
    data: Data,
    rows: Annotated[int, counted("Rows to read, at least two.")] = 16,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of text between image and question, separated by commas; by default those of "
            f"{','.join(map(str, LENGTHS))} for which the model has positions."
        ),
    ] = None,
    max_distances: Annotated[str, typer.Option(help="Limits to try, separated by commas.")] = ",".join(
        map(str, MAX_DISTANCES)
    ),
    split: Split = "train",
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the text.")] = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    as_json: AsJSON = False,
) -> None:
    """Propose `max_distance` for DIPE, from how well a model answers after longer and longer texts."""
    require("train", "datasets", "PIL")
    tokens = None
    if lengths is not None:
        tokens = separated("--lengths", lengths, whole_number(0), "whole numbers of tokens, such as 0,1024")
    limits = separated("--max-distances", max_distances, whole_number(0, FARTHEST), "whole numbers from 0 on")
    from .work import proposals as work

    of_model = ModelOptions(model, device, dtype, attn_implementation)
    work.calibrate(of_model, work.Rows(data, split, rows), tokens, limits, seed, as_json)


def sinks(
    model: Model,
    data: Data,
    rows: Annotated[int, counted("Rows to read.")] = 8,
    tau: Annotated[float, typer.Option(help="The least size of a channel in a sink, as in VARConfig.")] = TAU,
    split: Split = "train",
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    as_json: AsJSON = False,
) -> None:
    """Propose `sink_channels` for VAR, from the channels of the hidden state that are large at the first token."""
    require("train", "datasets", "PIL")
    from .work import proposals as work

    of_model = ModelOptions(model, device, dtype, attn_implementation)
    work.sinks(of_model, work.Rows(data, split, rows), tau, as_json)

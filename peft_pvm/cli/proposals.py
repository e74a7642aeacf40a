"""`peft-pvm layers`, `calibrate`, `sinks`: settings of adapters, proposed from a model and rows of the user's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..attention.dispatch import steerable_attentions
from ..folders.data_file import write_json
from ..methods.dipe.method import FARTHEST, DIPEConfig
from ..methods.var import VARConfig
from ..probe.calibrate import LENGTHS, MAX_DISTANCES, Calibration
from ..probe.calibrate import calibrate as calibrate_model
from ..probe.layers import LayerProposal, propose_layers
from ..probe.sinks import SinkProposal, propose_sinks
from ..tokens.families import VisionLanguageModel, find_vlm
from ..utils.packages import require
from ..utils.terminal import Terminal, say
from .loading import LOADED_AS, load_chats, load_model, load_processor, progress_bars
from .options import LARGEST_SEED, check_device, counted, new_file, one_of, separated, whole_number, without_weights


Model = Annotated[str, typer.Option(help="Folder or Hub id of a vision-language model.")]
Data = Annotated[
    str,
    typer.Option(
        help="Folder or Hub id of a data set of chats, as for training: `images`, and `messages` or `prompt` and "
        "`completion`. The first rows with images are read."
    ),
]
Split = Annotated[str, typer.Option(help="The split of the data set.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
DType = Annotated[str, typer.Option(callback=one_of(LOADED_AS), help=f"One of {', '.join(LOADED_AS)}.")]
Kernel = Annotated[str | None, typer.Option(help="The attention kernel, such as sdpa.")]


def layers(
    model: Model,
    data: Data,
    rows: Annotated[int, counted("Rows to read.")] = 8,
    count: Annotated[int, counted("Layers to propose.")] = 3,
    split: Split = "train",
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Propose decoder layers for PVM, from where a model looks at the image before it answers."""
    require("train", "datasets", "PIL")
    check_device(device)
    vlm = _without_weights(model, attn_implementation)
    _ = vlm.block  # raises where PVM could not be attached
    if count > len(vlm.layers):
        raise typer.BadParameter(
            f"{count} is more than the {len(vlm.layers)} layers of {model}.", param_hint="--count"
        )
    processor = load_processor(model)
    chats = load_chats(data, split, rows)
    loaded = load_model(model, [], device, dtype, attn_implementation)
    with progress_bars() as show:
        proposal = propose_layers(loaded, processor, chats, count, show)
    if as_json:
        say(json.dumps(asdict(proposal), indent=2))
        return
    Terminal().print(_layer_table(proposal, len(vlm.layers)))
    say(proposal.reason)
    say(f"PVMConfig(layers_to_transform={proposal.layers})")


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
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides the text.")] = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    out: Annotated[Path | None, typer.Option(callback=new_file, help="Where to write every loss, as JSON.")] = None,
) -> None:
    """Propose `max_distance` for DIPE, from how a model answers after ever more text behind the image."""
    require("train", "datasets", "PIL")
    tokens = None
    if lengths is not None:
        tokens = separated("--lengths", lengths, whole_number(0), "whole numbers of tokens, such as 0,1024")
    limits = separated("--max-distances", max_distances, whole_number(0, FARTHEST), "whole numbers from 0 on")
    check_device(device)
    DIPEConfig.layers_on(_without_weights(model, attn_implementation))
    processor = load_processor(model)
    chats = load_chats(data, split, rows)
    loaded = load_model(model, [], device, dtype, attn_implementation)
    with progress_bars() as show:
        found = calibrate_model(loaded, processor, chats, tokens, limits, seed, show)
    if out is not None:
        write_json(out, {"model": model, "data": data, "seed": seed, **found.to_dict()})
    Terminal().print(_loss_table(found))
    say(found.reason)


def sinks(
    model: Model,
    data: Data,
    rows: Annotated[int, counted("Rows to read.")] = 8,
    tau: Annotated[float, typer.Option(help="How large a channel is in a sink, as in VARConfig.")] = 20.0,
    split: Split = "train",
    device: Device = "cpu",
    dtype: DType = "auto",
    attn_implementation: Kernel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Propose `sink_channels` for VAR, from which channels of the hidden state stand out at the first token."""
    require("train", "datasets", "PIL")
    VARConfig(tau=tau)  # raises where it is out of range
    check_device(device)
    _without_weights(model, attn_implementation)
    processor = load_processor(model)
    chats = load_chats(data, split, rows)
    loaded = load_model(model, [], device, dtype, attn_implementation)
    with progress_bars() as show:
        proposal = propose_sinks(loaded, processor, chats, tau, show)
    if as_json:
        say(json.dumps(asdict(proposal), indent=2))
        return
    Terminal().print(_channel_table(proposal))
    say(proposal.reason)
    if proposal.channels:
        say(f"VARConfig(sink_channels={proposal.channels}{'' if tau == VARConfig.tau else f', tau={tau:g}'})")


def _without_weights(model: str, attn_implementation: str | None) -> VisionLanguageModel:
    """The parts of a model, of which only the configuration is read; refused where its attention is out of reach."""
    vlm = find_vlm(without_weights(model, attn_implementation))
    steerable_attentions(vlm, "This command")
    return vlm


def _layer_table(proposal: LayerProposal, depth: int) -> Table:
    table = Table("layer", "attention on the image", "chosen")
    for layer_idx in range(depth):
        share = proposal.shares.get(layer_idx)
        chosen = "*" if layer_idx in proposal.layers else ""
        table.add_row(str(layer_idx), "no softmax" if share is None else f"{share:.4f}", chosen)
    return table


def _channel_table(proposal: SinkProposal) -> Table:
    table = Table("channel", "size at the first token", "chosen")
    for channel, size in proposal.sizes.items():
        table.add_row(str(channel), f"{size:.1f}", "*" if channel in proposal.channels else "")
    return table


def _loss_table(found: Calibration) -> Table:
    lengths = list(found.answers[None])
    table = Table("max_distance", *(f"{length:,}" for length in lengths), "mean loss")
    table.title = "Loss of an answer in nats (share of rows right), by tokens of text behind the image; *: proposed"
    for limit, answers in found.answers.items():
        cells = (f"{answers[length].loss:.2f} ({answers[length].accuracy:.2f})" for length in lengths)
        name = "no DIPE" if limit is None else str(limit)
        mark = " *" if limit == found.max_distance else ""
        table.add_row(name + mark, *cells, f"{found.loss(limit):.3f}")
    return table

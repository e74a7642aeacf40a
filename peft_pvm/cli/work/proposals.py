"""The work of `peft-pvm layers`, `calibrate` and `sinks`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import typer
from rich.table import Table

from ...attention.dispatch import steerable_attentions
from ...methods.dipe.method import DIPEConfig
from ...methods.var import VARConfig
from ...probe.calibrate import Calibration
from ...probe.calibrate import calibrate as calibrate_model
from ...probe.layers import LayerProposal, propose_layers
from ...probe.rows import Chat
from ...probe.sinks import SinkProposal, propose_sinks
from ...tokens.families import VisionLanguageModel, find_vlm
from ...utils.terminal import Terminal, say
from ..options import ModelOptions
from .loading import check_device, load_chats, load_model, load_processor, progress_bars, without_weights


@dataclass(frozen=True)
class Rows:
    """Which rows of which data set are read.

    Attributes:
        data: Folder or Hub id.
        split: The split.
        rows: How many rows with images, from the first on.
    """

    data: str
    split: str
    rows: int

    def beside(self, of_model: ModelOptions) -> tuple[Any, Any, list[Chat]]:
        """The model, its processor and the chats. The model, which takes longest, is loaded last."""
        processor = load_processor(of_model.model)
        chats = load_chats(self.data, self.split, self.rows)
        return load_model(of_model), processor, chats


def layers(of_model: ModelOptions, rows: Rows, count: int, as_json: bool) -> None:
    """Propose decoder layers for PVM."""
    vlm = _without_weights(of_model)
    _ = vlm.block  # raises where PVM could not be attached
    if count > len(vlm.layers):
        raise typer.BadParameter(
            f"{count} is more than the {len(vlm.layers)} layers of {of_model.model}.", param_hint="--count"
        )
    given = rows.beside(of_model)
    with progress_bars() as show:
        proposal = propose_layers(*given, count, show)
    if as_json:
        say(json.dumps(asdict(proposal), indent=2))
        return
    Terminal().print(_layer_table(proposal, len(vlm.layers)))
    say(proposal.reason)
    say(f"PVMConfig(layers_to_transform={proposal.layers})")


def calibrate(
    of_model: ModelOptions, rows: Rows, tokens: list[int] | None, limits: list[int], seed: int, as_json: bool
) -> None:
    """Propose `max_distance` for DIPE."""
    DIPEConfig.layers_on(_without_weights(of_model))
    given = rows.beside(of_model)
    with progress_bars() as show:
        found = calibrate_model(*given, tokens, limits, seed, show)
    if as_json:
        say(json.dumps({"model": of_model.model, "data": rows.data, "seed": seed, **found.to_dict()}, indent=2))
        return
    Terminal().print(_loss_table(found))
    say(found.reason)


def sinks(of_model: ModelOptions, rows: Rows, tau: float, as_json: bool) -> None:
    """Propose `sink_channels` for VAR."""
    VARConfig(tau=tau)  # raises where it is out of range
    _without_weights(of_model)
    given = rows.beside(of_model)
    with progress_bars() as show:
        proposal = propose_sinks(*given, tau, show)
    if as_json:
        say(json.dumps(asdict(proposal), indent=2))
        return
    Terminal().print(_channel_table(proposal))
    say(proposal.reason)
    if proposal.channels:
        say(f"VARConfig(sink_channels={proposal.channels}{'' if tau == VARConfig.tau else f', tau={tau:g}'})")


def _without_weights(of_model: ModelOptions) -> VisionLanguageModel:
    """The parts of a model, of which only the configuration is read. Raises if its attention cannot be observed."""
    check_device(of_model.device)
    vlm = find_vlm(without_weights(of_model.model, of_model.attn_implementation))
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
    table.title = "Loss of an answer in nats (share of rows right), by tokens of text after the image; *: proposed"
    for limit, answers in found.answers.items():
        cells = (f"{answers[length].loss:.2f} ({answers[length].accuracy:.2f})" for length in lengths)
        name = "no DIPE" if limit is None else str(limit)
        mark = " *" if limit == found.max_distance else ""
        table.add_row(name + mark, *cells, f"{found.loss(limit):.3f}")
    return table

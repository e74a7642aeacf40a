"""Which channels of the hidden state are large in attention sinks: those that stand out at the first token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..attention.dispatch import steerable_attentions
from ..methods.var import VARConfig, sizes
from ..tokens.blocks import layer_input
from ..tokens.families import VisionLanguageModel, find_vlm
from ..tuners.active import base_of, only
from .observers import undisturbed, visual_mask
from .rows import Chat, Lesson, teach


SHOWN = 10  # channels, in a proposal

Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


@dataclass(frozen=True, eq=False)
class Outliers:
    """What stands out in the hidden states of one row where one layer begins, in units of their root mean square.

    Attributes:
        first: The size of each channel at the row's first token, `(hidden_size,)`, fp32.
        beyond: Visual tokens and channels whose size is above tau, `(number, 2)`, int64.
        num_visual: How many visual tokens there are.
    """

    first: torch.Tensor
    beyond: torch.Tensor
    num_visual: int


@dataclass(frozen=True)
class SinkProposal:
    """Channels by which VAR is to recognize sinks.

    Attributes:
        channels: Ascending, for `VARConfig(sink_channels=...)`; may be empty.
        sizes: The largest channels at the first token, largest first, and their size in units of the root mean
            square, median over rows and layers.
        visual_share: The share of visual tokens that are sinks by the proposed channels, mean over rows and layers.
        reason: Why these channels, in a sentence or two.
    """

    channels: list[int]
    sizes: dict[int, float]
    visual_share: float
    reason: str


def propose_sinks(
    model: nn.Module, processor: Any, chats: Sequence[Chat], tau: float = 20.0, progress: Progress | None = None
) -> SinkProposal:
    """Propose the channels by which VAR is to recognize sinks: those above `tau` at the first token of a text.

    The first token is a sink in language models, whatever it is, and sinks among visual tokens stand out in the same
    channels (arXiv 2503.03321, section 3). The model reads each chat with its answer, one forward each, with all
    adapters off, and is left as it was. Its hidden states are taken at the input of each layer on which VAR acts by
    default.

    Args:
        model: A vision-language model, with adapters or without.
        processor: Its processor, with a chat template.
        chats: What `read_chats` returns. A few suffice.
        tau: As in `VARConfig`.
        progress: Called with what is being done, how many steps of it are done and how many there are.

    Raises:
        ValueError: VAR cannot act on the model.
        NotImplementedError: Its layers have several residual streams.

    Example:
        chats = read_chats(dataset, 8)
        config = VARConfig(sink_channels=propose_sinks(model, processor, chats).channels)
    """
    lessons = (teach(processor, chat) for chat in chats)
    return proposed(outliers(model, lessons, len(chats), tau, progress), tau)


@torch.no_grad()
def outliers(
    model: nn.Module, lessons: Iterable[Lesson], num_lessons: int, tau: float, progress: Progress | None = None
) -> list[Outliers]:
    """What stands out in a model's hidden states, by row and layer.

    Args:
        model: A vision-language model; its adapters are off.
        lessons: Prompts with their answers.
        num_lessons: How many there are.
        tau: As in `VARConfig`.
        progress: As in `propose_sinks`.
    """
    vlm = find_vlm(base_of(model))
    layers = VARConfig(tau=tau).default_layers(list(steerable_attentions(vlm, "VAR")))
    found: list[Outliers] = []
    with undisturbed(vlm), only(vlm.model, []):
        for number, lesson in enumerate(lessons):
            if progress is not None:
                progress("reading rows", number, num_lessons)
            inputs = lesson.on(vlm.model)
            with _read_where_layers_begin(vlm, layers, visual_mask(vlm, inputs)[0], tau, found):
                vlm.model(**inputs, use_cache=False, logits_to_keep=1)
    return found


@contextlib.contextmanager
def _read_where_layers_begin(
    vlm: VisionLanguageModel, layers: Sequence[int], is_visual: torch.Tensor, tau: float, found: list[Outliers]
) -> Iterator[None]:
    def read(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = layer_input(args, kwargs, 1, vlm.text_config.hidden_size)[0]
        if len(states) != len(is_visual):  # a layer of only the last tokens, on which VAR cannot act
            return
        of_tokens = sizes(states).abs()
        beyond = (of_tokens[is_visual.to(of_tokens.device)] > tau).nonzero()
        found.append(Outliers(of_tokens[0].float().cpu(), beyond.cpu(), int(is_visual.sum())))

    with contextlib.ExitStack() as stack:
        for layer_idx in layers:
            stack.callback(vlm.layers[layer_idx].register_forward_pre_hook(read, with_kwargs=True).remove)
        yield


def proposed(found: Sequence[Outliers], tau: float) -> SinkProposal:
    """The channels that follow from outliers.

    Args:
        found: What `outliers` returns.
        tau: As there.
    """
    sizes = torch.stack([each.first for each in found]).median(0).values
    largest = sizes.argsort(descending=True)[:SHOWN].tolist()
    channels = (sizes > tau).nonzero().flatten()
    shares = [
        len(each.beyond[torch.isin(each.beyond[:, 1], channels), 0].unique()) / max(each.num_visual, 1)
        for each in found
    ]
    share = fmean(shares)
    if not len(channels):
        reason = (
            f"No channel is above {tau:g} at the first token, where the largest is {float(sizes[largest[0]]):.1f}, in "
            "units of the root mean square: there are no sinks that VAR could know by a channel. Leave it off, or "
            "try a lower tau."
        )
    else:
        reason = (
            f"At the first token, these channels are above {tau:g} in units of the root mean square, and by them "
            f"{share:.1%} of the visual tokens are sinks."
        )
        if not share:
            reason += " VAR then does nothing."
    return SinkProposal(channels.tolist(), {channel: float(sizes[channel]) for channel in largest}, share, reason)

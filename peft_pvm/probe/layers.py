"""Which decoder layers PVM should sit in: those around the layer that looks at the image most before an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..tokens.families import find_vlm
from ..tuners.active import base_of, only
from .observers import AttentionObserver, observed, undisturbed
from .rows import Chat, Lesson, teach


# In the first layers attention is spread over all tokens, so that an image of many tokens gets most of it whatever is
# asked (arXiv 2403.06764, section 3). The peak is sought after this part of the depth.
FIRST_LAYERS = 1 / 3
STEP = 1 / 10  # of the depth, from one proposed layer to the next
FLAT = 1.5  # a peak that is not so many times the mean is none

Progress = Callable[[str, int, int], None]  # what is done, how many steps of it are done, how many there are


@dataclass(frozen=True)
class LayerProposal:
    """Decoder layers for PVM.

    Attributes:
        layers: Their indices, ascending: for `PVMConfig(layers_to_transform=...)`.
        peak: The layer, after the first third of the depth, in which most attention reaches the image.
        shares: For each layer with softmax attention, the share of it that reaches visual tokens.
        reason: Why these layers, in a sentence or two.
    """

    layers: list[int]
    peak: int
    shares: dict[int, float]
    reason: str


def propose_layers(
    model: nn.Module, processor: Any, chats: Sequence[Chat], count: int = 3, progress: Progress | None = None
) -> LayerProposal:
    """Propose decoder layers for PVM from where a model looks at the image when it is about to answer.

    The model reads each chat with its answer, one forward each, with all adapters off, and is left as it was.

    Args:
        model: A vision-language model, with adapters or without.
        processor: Its processor, with a chat template.
        chats: What `read_chats` returns. A few suffice.
        count: The number of layers.
        progress: Called with what is being done, how many steps of it are done and how many there are.

    Raises:
        ValueError: The model has fewer layers, its attention cannot be observed, or none of it reaches an image.

    Example:
        chats = read_chats(dataset, 8)
        config = PVMConfig(layers_to_transform=propose_layers(model, processor, chats).layers)
    """
    depth = len(find_vlm(base_of(model)).layers)
    if not 1 <= count <= depth:
        raise ValueError(f"count is {count}, but the text model has {depth} layers to choose from.")
    lessons = (teach(processor, chat) for chat in chats)
    return proposed(visual_shares(model, lessons, len(chats), progress), depth, count)


@torch.no_grad()
def visual_shares(
    model: nn.Module, lessons: Iterable[Lesson], num_lessons: int, progress: Progress | None = None
) -> dict[int, float]:
    """The share of attention that reaches visual tokens from the tokens that predict an answer, by layer.

    Args:
        model: A vision-language model; its adapters are off.
        lessons: Prompts with their answers.
        num_lessons: How many there are.
        progress: As in `propose_layers`.

    Returns:
        For each layer with softmax attention, the mean over lessons of the mean over tokens and heads.
    """
    vlm = find_vlm(base_of(model))
    shares: dict[int, list[float]] = {}
    with undisturbed(vlm), only(vlm.model, []):
        for number, lesson in enumerate(lessons):
            if progress is not None:
                progress("reading rows", number, num_lessons)
            observer = AttentionObserver(lesson.num_answer_tokens + 1)
            with observed(vlm, observer):
                vlm.model(**lesson.on(vlm.model), use_cache=False, logits_to_keep=1)
            for layer_idx, mass in observer.masses.items():
                # The answer's last token predicts what comes after it.
                shares.setdefault(layer_idx, []).append(mass.visual[:-1].mean().item())
    return {layer_idx: fmean(shares[layer_idx]) for layer_idx in sorted(shares)}


def proposed(shares: Mapping[int, float], depth: int, count: int = 3) -> LayerProposal:
    """The layers that follow from shares of attention: one before the peak, one at it, the others after it.

    They are a tenth of the depth apart. If the depth ends before that, all of them move towards its beginning.

    Args:
        shares: What `visual_shares` returns.
        depth: The number of decoder layers.
        count: The number of layers to propose, at most `depth`.

    Raises:
        ValueError: No attention reaches an image.

    Example:
        >>> shares = {layer_idx: 0.4 if layer_idx == 23 else 0.1 for layer_idx in range(30)}
        >>> proposed(shares, depth=30).layers
        [20, 23, 26]
    """
    late = {layer_idx: share for layer_idx, share in shares.items() if layer_idx >= depth * FIRST_LAYERS}
    late = late or dict(shares)
    peak = max(late, key=late.__getitem__, default=0)
    if not late or not late[peak] > 0:
        raise ValueError("No attention reaches the image in these rows, so there is nothing to place PVM by.")
    step = max(1, round(depth * STEP))
    step = min(step, (depth - 1) // max(count - 1, 1))
    start = peak - step if count > 1 else peak
    start = max(0, min(start, depth - 1 - step * (count - 1)))
    layers = [start + number * step for number in range(count)]
    mean = fmean(late.values())
    reason = (
        f"Before an answer, attention on the image is highest in layer {peak}: {late[peak]:.3f}, where the mean of "
        f"layers {min(late)} to {max(late)} is {mean:.3f}."
    )
    if late[peak] < FLAT * mean:
        reason += " This is nearly flat, so it says little about where PVM should sit; 'strided' may do as well."
    return LayerProposal(layers, peak, dict(shares), reason)

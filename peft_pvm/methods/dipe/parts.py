"""Attention in parts: queries meet keys of their own modality unchanged, and those of the other modality anchored."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from ...attention.call import AttentionCall, records_gradients
from ...tokens.memory import Runs
from ...tokens.positions import VISUAL
from ...utils.packages import block_mask, flex_attention_with_sums


GIVES_SUMS = ("cuda",)  # devices where compiled flex attention gives the sums of its rows


@dataclass(frozen=True)
class Run:
    """Tokens of one modality in a row.

    Attributes:
        start: The first of them.
        stop: The first after them.
        is_visual: Their modality.
        image: The image that they belong to, if they are visual.
    """

    start: int
    stop: int
    is_visual: bool
    image: int = 0


def runs_to_join(call: AttentionCall, by_image: tuple[int, int] | None) -> list[Run] | None:
    """The runs of a prefill that `attend_by_modality` can do; `None` if it is padded, continued, trained, ..."""
    query, key, value = call.query, call.key, call.value
    is_fused = call.kernel == "sdpa" and query.device.type == "cpu" and value.shape[-1] == key.shape[-1]
    is_whole = call.visibility.is_plain_causal and query.shape[2] == key.shape[2]
    if call.context.visual_mask is None or records_gradients(query, key, value) or call.kwargs.get("dropout"):
        return None
    if not is_fused or not is_whole:
        return None
    known = call.context.memory.runs
    if known is None:
        return None
    return call.context.derived(("runs", by_image), lambda: runs_of(known, query.shape[2], by_image))


def runs_of(runs: Runs, seq_len: int, by_image: tuple[int, int] | None = None) -> list[Run] | None:
    """The runs of a batch in which all rows have the same; `None` if they have not. Waits for the device.

    Args:
        runs: Of rows that start with this forward and have no padding.
        seq_len: Their length.
        by_image: What is an image, as `Runs.images` takes it. `None`: all visual runs are one.
    """
    images = runs.images(*by_image) if by_image else ()
    if any(not bool((table == table[:1]).all()) for table in (runs.starts, runs.modalities, *images[:1])):
        return None
    starts, modalities = runs.starts[0].tolist(), runs.modalities[0].tolist()
    first_of_images = images[0][0, 1:].tolist() if images else []
    found = []
    for start, stop, modality in zip(starts, [*starts[1:], seq_len], modalities):
        is_visual = modality == VISUAL
        found.append(Run(start, stop, is_visual, bisect_right(first_of_images, start) if is_visual else 0))
    return found


def attend_by_modality(
    query: torch.Tensor,
    anchored: Sequence[torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    runs: list[Run],
    scaling: float,
) -> torch.Tensor:
    """Causal attention in which tokens of different modality meet by anchored queries.

    The tokens of one modality, put together, attend to each other as in plain causal attention. Each run then attends
    to the tokens of the other modality before it, all of which it sees: a visual run to the text, a run of text to
    each image. The sums of the softmaxes tell how to put their outputs together. So every pair is computed once, on a
    fused kernel.

    Args:
        query: Rotated by their positions, `(batch, heads, seq_len, head_dim)`, on a CPU.
        anchored: Rotated by their anchors for each image, as `query`. The first are visual tokens' for text.
        key: `(batch, kv_heads, seq_len, head_dim)`.
        value: As `key`.
        runs: As `runs_of` gives them.
        scaling: What products are multiplied by.

    Returns:
        `(batch, heads, seq_len, head_dim)`, without gradients.
    """
    own: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    keys: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    for is_visual in {run.is_visual for run in runs}:
        own_query, own_key, own_value = (
            torch.cat([tensor[:, :, run.start : run.stop] for run in runs if run.is_visual == is_visual], 2)
            for tensor in (query, key, value)
        )
        own[is_visual] = _fused(own_query, own_key, own_value, is_causal=True, scaling=scaling)
        keys[is_visual] = own_key, own_value
    outputs = []
    seen: dict[bool, dict[int, slice]] = {False: {}, True: {}}  # by modality and image, among the tokens of one kind
    for run in runs:
        images = seen[run.is_visual]
        start = max((known.stop for known in images.values()), default=0)
        here = slice(start, start + run.stop - run.start)
        images[run.image] = slice(images.get(run.image, here).start, here.stop)
        output, log_sum = own[run.is_visual]
        parts = [(output[:, :, here], log_sum[:, :, here])]
        for image, others in seen[not run.is_visual].items():
            other_key, other_value = (tensor[:, :, others] for tensor in keys[not run.is_visual])
            rows = anchored[image][:, :, run.start : run.stop]
            parts.append(_fused(rows, other_key, other_value, is_causal=False, scaling=scaling))
        outputs.append(joined(parts))
    return torch.cat(outputs, 2)


def sums_are_given(call: AttentionCall) -> bool:
    """Whether `attend_by_masks` can do a call: flex attention on a GPU. On a CPU, transformers compiles it without."""
    mask, dropout = call.attention_mask, call.kwargs.get("dropout")
    is_flex = call.kernel == "flex_attention" and isinstance(mask, BlockMask) and call.query.device.type in GIVES_SUMS
    return (
        is_flex and not dropout and call.kwargs.get("softcap") is None and not records_gradients(call.query, call.key)
    )


def attend_by_masks(
    call: AttentionCall, anchored: Sequence[torch.Tensor], members: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Attention by flex attention, once for pairs of one modality and once for each image, every pair in one of them.

    Blocks of pairs that are not of a part are skipped, so that all parts together cost about as much as one attention.

    Args:
        call: What `sums_are_given` accepts.
        anchored: Queries rotated by their anchors for each image. The first are visual tokens' for text.
        members: Which keys are of each image, `(batch, num_keys)`, bool.

    Returns:
        `(batch, heads, num_queries, value_dim)`, without gradients.
    """
    visual_queries, visual_keys, visible = call.visual_queries, call.visual_keys, call.attention_mask.mask_mod

    def own(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return visible(batch, head, query, key) & (visual_queries[batch, query] == visual_keys[batch, key])

    def of_image(keys: torch.Tensor, is_first: bool) -> Callable[..., torch.Tensor]:
        met_by_text = torch.stack([keys, ~visual_keys & is_first], 1)  # (batch, is the query visual, num_keys)

        def other(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return visible(batch, head, query, key) & met_by_text[batch, visual_queries[batch, query].long(), key]

        return other

    def blocks() -> list[BlockMask]:
        rules = [own, *(of_image(keys, number == 0) for number, keys in enumerate(members))]
        return [block_mask(rule, len(call.query), call.query.shape[2], call.key) for rule in rules]

    masks = call.context.derived((id(call.attention_mask), "blocks", len(members)), blocks)
    return joined(
        [
            flex_attention_with_sums(query, call.key, call.value, mask, call.scaling)
            for query, mask in zip([call.query, *anchored], masks)
        ]
    )


def joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The output of attention to all keys, from that to a part of the keys each.

    Args:
        parts: Outputs, `(batch, heads, num_queries, value_dim)`, and the logarithms of the sums of their rows of
            weights before they were divided by them, `(batch, heads, num_queries)`, -inf for a row without a key.
    """
    (output, log_sum), *others = parts
    dtype = output.dtype
    least = torch.finfo(log_sum.dtype).min / 4  # two rows without a key have a difference
    log_sum = log_sum.clamp(min=least)
    for other, other_log_sum in others:
        other_log_sum = other_log_sum.clamp(min=least)
        share = torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1)
        output = output.to(share.dtype).lerp(other.to(share.dtype), share)
        log_sum = torch.logaddexp(log_sum, other_log_sum)
    return output.to(dtype)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_dot_product_attention` runs on a CPU, which also knows the logarithm of each row's sum."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Autocast knows the function that runs this kernel, but not the kernel.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    return kernel(query.to(dtype), key.to(dtype), value.to(dtype), 0.0, is_causal, scale=scaling)

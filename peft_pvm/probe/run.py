"""`probe`: generate with a model as it is, then look at what it did, with its adapters and without."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.dispatch import steerable_attentions
from ..env import environment
from ..tokens.families import VisionLanguageModel, find_vlm
from ..tuners.active import acting_adapters, base_of, only
from ..utils.packages import attn_implementation
from .findings import AdapterRecord, BranchRecord, ForwardRecord, LayerAttention, most_text_tokens
from .inputs import Progress, extended, generate, visual_grids
from .measures import (
    find_sinks,
    fit_dilution,
    fit_power_law,
    kl_divergence,
    logit_lens,
    mean_over_layers,
    numbers,
    rounded,
)
from .observers import (
    AttentionMass,
    AttentionObserver,
    BranchTrace,
    branches_observed,
    layers_observed,
    observed,
    undisturbed,
    visual_mask,
)
from .report import ProbeResult


BASE, TOGETHER = "base", "adapters"  # names of forwards
RETRIEVALS_KEPT = 6
MAPS_KEPT = 12  # a map has a number for each visual token, of which there may be thousands


@dataclass(frozen=True)
class _Settings:
    """What `probe` was asked for; it explains the fields."""

    max_new_tokens: int
    sink_factor: float
    sink_share: float
    retrieval_tokens: Sequence[int] | None
    generate_kwargs: Mapping[str, Any]
    decode: Callable[[int], str]


@torch.no_grad()
def probe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    prompt: str = "",
    decode: Callable[[int], str] = str,
    images: Sequence[bytes] = (),
    max_new_tokens: int = 64,
    sink_factor: float = 10.0,
    sink_share: float = 0.9,
    retrieval_tokens: Sequence[int] | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Measure how much a model looks at its image while it answers, and what its adapters change.

    The probe generates twice: with the active adapters, and with every adapter off. Then it reads the prompt and the
    first of the two answers in one forward with every adapter off, one with the active adapters, and one with each
    active adapter by itself. The model is left as it was, also after an exception.

    Args:
        model: A vision-language model from transformers, or a PeftModel of one. It may have adapters of any of PEFT's
            layer-based types.
        inputs: What its processor gives for one prompt with an image or a video, on the model's device.
        prompt: The prompt as text, for the report.
        decode: Turns a token id into text.
        images: PNG files of the images in the prompt, for the report.
        max_new_tokens: The most tokens that the answer may have.
        sink_factor: A visual token is a sink in a layer if its attention, averaged over heads, is more than this many
            times the mean over the visual tokens, for a large enough share of the generated tokens.
        sink_share: That share.
        retrieval_tokens: The generated tokens, counted from 0, for which PVM's cross-attention is kept. `None`: the
            six with the largest updates relative to the residual stream.
        generate_kwargs: More arguments for `generate`, which by default is greedy.
        progress: Called with what is being done, how many steps of it are done and how many there are.

    Returns:
        The result. `save(folder)` writes a report.

    Raises:
        ValueError: The inputs are not one prompt with visual tokens, an argument is out of range, an adapter is
            merged, or the model cannot be probed; the message says why.
        NotImplementedError: The model or an adapter works in a way that the probe cannot follow.
    """
    vlm = find_vlm(base_of(model))
    settings = _Settings(max_new_tokens, sink_factor, sink_share, retrieval_tokens, generate_kwargs or {}, decode)
    acting = acting_adapters(vlm.model)
    _check(vlm, model, inputs, settings)
    check_retrieval(retrieval_tokens, max_new_tokens)
    progress = progress or (lambda description, done, total: None)
    observed = _observe(vlm, inputs, acting, settings, progress)
    return ProbeResult(**_describe(vlm, inputs, settings), **observed, prompt=prompt, images=list(images))


def _observe(
    vlm: VisionLanguageModel, inputs: Mapping[str, Any], acting: list[str], settings: _Settings, progress: Progress
) -> dict[str, Any]:
    """The part of a result that is found by generating and by looking at the answer."""
    forwards: list[ForwardRecord] = []
    traces: dict[tuple[str, int], BranchTrace] = {}
    with undisturbed(vlm):
        arguments = settings.max_new_tokens, settings.generate_kwargs, progress
        token_ids = generate(vlm.model, inputs, *arguments)
        check_retrieval(settings.retrieval_tokens, len(token_ids))
        with only(vlm.model, []):
            base_token_ids = generate(vlm.model, inputs, *arguments) if acting else token_ids
        whole = extended(vlm.model, inputs, token_ids[:-1])
        planned = _planned(acting)
        base_logits: torch.Tensor | None = None
        for done, (name, names) in enumerate(planned.items()):
            progress("looking at the answer", done, len(planned))
            with only(vlm.model, names):
                seen = _look(vlm, whole, len(token_ids))
            base_logits = seen.logits if base_logits is None else base_logits
            forwards.append(_record(name, names, seen, base_logits, token_ids, settings))
            traces = seen.branches if name == TOGETHER else traces
        progress("looking at the answer", len(planned), len(planned))
    _warn_of_signs(vlm.model, acting, forwards[0])
    return dict(
        token_ids=token_ids,
        tokens=[settings.decode(token_id) for token_id in token_ids],
        base_token_ids=base_token_ids,
        base_tokens=[settings.decode(token_id) for token_id in base_token_ids],
        forwards=forwards,
        adapters=_adapters(vlm.model, acting, forwards),
        branches=_branches(traces, settings.retrieval_tokens),
    )


def _planned(names: list[str]) -> dict[str, list[str]]:
    """The forwards by name, the base first, and which of the acting adapters act in each."""
    planned: dict[str, list[str]] = {BASE: []}
    if names:
        planned[TOGETHER] = names
    if len(names) > 1:
        planned.update({_alone(name): [name] for name in names})
    return planned


def _alone(name: str) -> str:
    return f"only {name}"


def _describe(vlm: VisionLanguageModel, inputs: Mapping[str, Any], settings: _Settings) -> dict[str, Any]:
    """The part of a result that is known before anything is run."""
    num_visual = int(visual_mask(vlm, inputs).sum())
    return dict(
        model_name=getattr(vlm.model.config, "_name_or_path", "") or type(vlm.model).__name__,
        environment=environment(),
        settings={
            "max_new_tokens": settings.max_new_tokens,
            "sink_factor": settings.sink_factor,
            "sink_share": settings.sink_share,
            "generate_kwargs": {name: str(value) for name, value in settings.generate_kwargs.items()},
            "attn_implementation": attn_implementation(vlm.text_config),
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "device": str(vlm.model.device),
        },
        num_prompt_tokens=inputs["input_ids"].shape[1],
        num_visual_tokens=num_visual,
        grids=visual_grids(vlm, inputs, num_visual),
        unobserved_layers=[index for index in range(len(vlm.layers)) if index not in vlm.self_attentions],
    )


def _adapters(model: nn.Module, acting: list[str], forwards: list[ForwardRecord]) -> list[AdapterRecord]:
    alone = {forward.adapters[0]: forward for forward in forwards if len(forward.adapters) == 1}
    return [
        AdapterRecord(
            name=name,
            method=str(getattr(config.peft_type, "value", config.peft_type)),
            active=name in acting,
            kl_alone=alone[name].kl_to_base if name in acting else None,
        )
        for name, config in getattr(model, "peft_config", {}).items()
    ]


def _warn_of_signs(model: Any, acting: list[str], base: ForwardRecord) -> None:
    """Say how far adapters that multiply scores take attention from the image, which they do at scores below 0."""
    below = {layer.layer_idx: layer.share_below_zero for layer in base.attention}
    for name in acting:
        config = model.peft_config[name]
        if not getattr(config, "multiplies_scores", False):
            continue
        chosen = config.layers_to_transform
        layers = config.default_layers(list(below)) if chosen is None else [each for each in chosen if each in below]
        shares = ", ".join(f"layer {layer_idx} {below[layer_idx]:.0%}" for layer_idx in layers)
        warnings.warn(
            f"{name} ({config.title}) multiplies scores. A score below 0 is pushed further down by a factor above 1. "
            f"Of the base's scores of visual keys, so many are below 0: {shares}.",
            stacklevel=4,
        )


def _check(vlm: VisionLanguageModel, model: nn.Module, inputs: Mapping[str, Any], settings: _Settings) -> None:
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.shape[0] != 1:
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"probe takes one prompt, input_ids of shape (1, seq_len); got {shape}.")
    if not bool(visual_mask(vlm, inputs).any()):
        raise ValueError(
            "There is no image in these inputs (no visual token in input_ids, or no pixel values for it): give the "
            "processor an image and a prompt that names it."
        )
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {settings.max_new_tokens}.")
    if not (math.isfinite(settings.sink_factor) and settings.sink_factor > 0):
        raise ValueError(f"sink_factor must be a positive number, got {settings.sink_factor}.")
    if not 0 < settings.sink_share <= 1:
        raise ValueError(f"sink_share must lie in (0, 1], got {settings.sink_share}.")
    steerable_attentions(vlm, "The probe")
    for name, config in {**getattr(model, "peft_config", {}), **getattr(vlm.model, "peft_config", {})}.items():
        if getattr(config, "is_prompt_learning", False):
            raise NotImplementedError(
                f"Adapter {name!r} ({config.peft_type}) puts tokens of its own before the prompt, among which the "
                "probe would lose count. Take it off."
            )
    merged = sorted({name for module in vlm.model.modules() for name in getattr(module, "merged_adapters", [])})
    if merged:
        raise ValueError(f"Adapters {merged} are merged into the base, which hides it. Unmerge them first.")


def check_retrieval(retrieval_tokens: Sequence[int] | None, num_tokens: int) -> None:
    """Refuse tokens that are not among so many, counted from 0."""
    wrong = [token for token in retrieval_tokens or () if not 0 <= token < num_tokens]
    if wrong:
        raise ValueError(
            f"retrieval_tokens names {wrong}, but the answer has no more than the tokens 0 to {num_tokens - 1}."
        )


@dataclass(eq=False)
class _Seen:
    """What one forward showed of the last tokens: logits `(num_tokens, vocab_size)`, and what was observed."""

    logits: torch.Tensor
    masses: dict[int, AttentionMass]
    branches: dict[tuple[str, int], BranchTrace]
    lens: list[torch.Tensor] | None


def _look(vlm: VisionLanguageModel, inputs: dict[str, Any], num_tokens: int) -> _Seen:
    observer = AttentionObserver(num_tokens)
    with (
        branches_observed(vlm.model, num_tokens) as branches,
        layers_observed(vlm, num_tokens) as hidden_states,
        observed(vlm, observer),
    ):
        logits = vlm.model(**{**inputs, "use_cache": False, "logits_to_keep": num_tokens}).logits[0]
    model: Any = vlm.model
    norm, head = getattr(vlm.text_model, "norm", None), model.get_output_embeddings()
    lens = None if norm is None or head is None else logit_lens(hidden_states, norm, head)
    return _Seen(logits, observer.masses, branches, lens)


def _record(
    name: str,
    adapters: list[str],
    seen: _Seen,
    base_logits: torch.Tensor,
    token_ids: list[int],
    settings: _Settings,
) -> ForwardRecord:
    attention = [_attention(layer_idx, masses, settings) for layer_idx, masses in sorted(seen.masses.items())]
    text_tokens = most_text_tokens(attention)
    mean_mass = mean_over_layers([layer.visual_mass for layer in attention])
    choice_ids = seen.logits.argmax(-1).tolist()
    by_token = torch.stack([masses.per_token.cpu() for masses in seen.masses.values()]).mean(0)
    return ForwardRecord(
        name=name,
        adapters=adapters,
        attention=attention,
        mean_decay=fit_power_law(text_tokens, mean_mass),
        mean_dilution=fit_dilution(text_tokens, mean_mass),
        lens=None if seen.lens is None else [numbers(layer) for layer in seen.lens],
        kl_to_base=numbers(kl_divergence(seen.logits, base_logits)),
        agreement=rounded(sum(map(operator.eq, choice_ids, token_ids)) / len(token_ids)),
        choice_ids=choice_ids,
        choices=[settings.decode(token_id) for token_id in choice_ids],
        mean_map=numbers(by_token.mean(0)),
        maps={token: numbers(by_token[token]) for token in _spread(len(token_ids), MAPS_KEPT)},
    )


def _spread(num_tokens: int, most: int) -> list[int]:
    """Some tokens, evenly spread from the first to the last, or all if there are no more.

    Example:
        >>> _spread(9, 3), _spread(2, 3)
        ([0, 4, 8], [0, 1])
    """
    steps = min(num_tokens, most) - 1
    return [round(step * (num_tokens - 1) / max(steps, 1)) for step in range(steps + 1)]


def _attention(layer_idx: int, masses: AttentionMass, settings: _Settings) -> LayerAttention:
    visual_mass: list[float] = numbers(masses.visual.mean(1))
    text_mass: list[float] = numbers(masses.text.mean(1))
    text_tokens: list[int] = masses.text_tokens.tolist()
    sinks = find_sinks(masses.per_token, settings.sink_factor, settings.sink_share)
    return LayerAttention(
        layer_idx=layer_idx,
        visual_mass=visual_mass,
        lowest_head=numbers(masses.visual.amin(1)),
        highest_head=numbers(masses.visual.amax(1)),
        text_to_visual=[
            rounded(text / visual) if visual > 0 else None for text, visual in zip(text_mass, visual_mass)
        ],
        text_tokens=text_tokens,
        sinks=sinks,
        sink_mass=numbers(masses.per_token[:, sinks].sum(1)),
        decay=fit_power_law(text_tokens, visual_mass),
        dilution=fit_dilution(text_tokens, visual_mass),
        scores_below_zero=numbers(masses.below_zero),
    )


def _branches(
    traces: dict[tuple[str, int], BranchTrace], retrieval_tokens: Sequence[int] | None
) -> list[BranchRecord]:
    if not traces:
        return []
    if retrieval_tokens is None:
        size = torch.stack([trace.relative_update for trace in traces.values()]).mean(0)
        retrieval_tokens = sorted(size.topk(min(RETRIEVALS_KEPT, len(size))).indices.tolist())
    return [
        BranchRecord(
            adapter=adapter,
            layer_idx=layer_idx,
            gate=rounded(trace.gate),
            relative_update=numbers(trace.relative_update),
            retrieval={token: numbers(trace.retrieval[token]) for token in retrieval_tokens},
        )
        for (adapter, layer_idx), trace in sorted(traces.items())
    ]

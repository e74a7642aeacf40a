"""What is watched while a forward runs: attention, hidden states, PVM branches. Nothing here changes the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attention.call import AttentionCall
from ..attention.dispatch import SteeringHandle, steerable_attentions
from ..methods.pvm.layer import PVMLayer
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import VisionLanguageModel
from ..tokens.positions import placeholder_mask
from ..tokens.tap import Tap
from ..utils.packages import modalities_in
from .measures import numbers


@dataclass(frozen=True, eq=False)
class AttentionMass:
    """Where the last queries of one layer look.

    Attributes:
        visual: Attention that reaches the visual tokens, `(num_queries, heads)`, fp32.
        text: Attention that reaches the others, as `visual`.
        per_token: Attention that reaches each visual token, averaged over heads, `(num_queries, num_visual)`, fp32.
        text_tokens: How many tokens that are not visual each query sees, `(num_queries,)`, int64.
        below_zero: Share of the scores of visual keys, over heads and the keys that each query sees, that are below 0
            before any adapter changes them, `(num_queries,)`, fp32.
    """

    visual: torch.Tensor
    text: torch.Tensor
    per_token: torch.Tensor
    text_tokens: torch.Tensor
    below_zero: torch.Tensor


class AttentionObserver:
    """Attention weights without a kernel that returns them: the layer attends once more, to indicators of keys.

    With values that are 1 at some keys and 0 at others, the output of attention is the weight that reaches these keys.
    The weights are those that the layer's own kernel and adapters make, whatever they are.

    Args:
        num_queries: The last so many queries are recorded.

    Attributes:
        masses: What was recorded, by layer index.
    """

    def __init__(self, num_queries: int):
        self.num_queries = num_queries
        self.masses: dict[int, AttentionMass] = {}

    def __call__(self, call: AttentionCall) -> None:
        visual_keys = call.visual_keys[0]
        each = nn.functional.one_hot(visual_keys.nonzero().squeeze(1), len(visual_keys)).bool()
        groups = torch.cat([torch.stack([visual_keys, ~visual_keys]), each])
        reached = torch.cat([self._reached(call, part) for part in groups.split(call.value.shape[-1])], -1)
        self.masses[call.module.layer_idx] = AttentionMass(
            reached[..., 0],
            reached[..., 1],
            reached[..., 2:].mean(1),
            self._text_tokens(call, visual_keys),
            self._below_zero(call, visual_keys),
        )

    def _reached(self, call: AttentionCall, groups: torch.Tensor) -> torch.Tensor:
        """The attention that reaches groups of keys, `(num_groups, num_keys)`: `(queries, heads, num_groups)`."""
        indicators = torch.zeros_like(call.value)
        indicators[..., : len(groups)] = groups.T.to(indicators.dtype)
        return call.attend_to(indicators)[0, -self.num_queries :, :, : len(groups)].float()

    def _visible(self, call: AttentionCall, keys: torch.Tensor) -> torch.Tensor:
        """Which of some keys the recorded queries see, `(queries, num_keys)`, bool."""
        num_queries = min(self.num_queries, call.query.shape[2])
        mask = call.visibility.mask(slice(call.query.shape[2] - num_queries, None))
        return (keys if mask is None else mask[0, 0] & keys).expand(num_queries, -1)

    def _text_tokens(self, call: AttentionCall, visual_keys: torch.Tensor) -> torch.Tensor:
        return self._visible(call, ~visual_keys).sum(-1)

    def _below_zero(self, call: AttentionCall, visual_keys: torch.Tensor) -> torch.Tensor:
        key, visible = call.key[0, :, visual_keys], self._visible(call, visual_keys)[:, visual_keys]
        query = call.query[0, :, -self.num_queries :].unflatten(0, (len(key), -1))
        is_below = (query @ key.unsqueeze(1).transpose(2, 3) < 0) & visible
        return is_below.flatten(0, 1).float().mean(0).sum(-1) / visible.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Glance:
    """Where a model looked when it chose a token.

    Attributes:
        share: Of its attention, what reached the visual tokens, averaged over heads and layers.
        weights: What reached each of them, the same average.
    """

    share: float
    weights: list[float]


class Watcher(AttentionObserver):
    """Watches the steps of `generate` in which a single token is read, the first of them after each `glance`.

    What reads the prompt is left out, because to watch it would take as long as to read it. So are forwards that a
    method runs beside a step.
    """

    def __init__(self) -> None:
        super().__init__(num_queries=1)

    def __call__(self, call: AttentionCall) -> None:
        if call.query.shape[2] == 1 and call.module.layer_idx not in self.masses:
            super().__call__(call)

    def glance(self) -> Glance | None:
        """Where the model looked in the last step; `None` if it read the prompt."""
        masses = list(self.masses.values())
        self.masses.clear()
        if not masses:
            return None
        most = max(mass.per_token.shape[1] for mass in masses)
        # A layer with a sliding window has dropped the first visual tokens.
        padded = [torch.nn.functional.pad(mass.per_token[0], (most - mass.per_token.shape[1], 0)) for mass in masses]
        weights = torch.stack(padded).mean(0)
        return Glance(float(weights.sum()), numbers(weights))


@contextlib.contextmanager
def observed(vlm: VisionLanguageModel, observer: AttentionObserver) -> Iterator[None]:
    """Let an observer see a forward, for the length of a block.

    Args:
        vlm: The model's parts; adapters may be attached.
        observer: It is given each `AttentionCall`.

    Raises:
        ValueError: The model's attention cannot be reached.
        NotImplementedError: At the end of the block: a layer kept the context from its attention.
    """
    with calling(vlm, observer) as layers:
        yield
    missing = sorted(layers - observer.masses.keys())
    if missing:
        raise NotImplementedError(
            f"The decoder layers of {type(vlm.model).__name__} do not pass keyword arguments on to their attention "
            f"(layers {missing}), so that the probe cannot see where it looks."
        )


@contextlib.contextmanager
def calling(vlm: VisionLanguageModel, observer: AttentionObserver) -> Iterator[set[int]]:
    """Let every softmax attention of the text model call an observer, for the length of a block.

    Args:
        vlm: The model's parts; adapters may be attached.
        observer: It is given each `AttentionCall` of each forward.

    Yields:
        The layers that have such an attention.

    Raises:
        ValueError: The model's attention cannot be reached.
    """
    attentions = steerable_attentions(vlm, "The probe")

    def start_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context: VisualContext = kwargs[CONTEXT]
        context.check_keys()
        context.observers.append(observer)

    with contextlib.ExitStack() as stack:
        stack.enter_context(Tap.lent_to(vlm))  # first: our hook reads what its hook sends along
        stack.callback(vlm.text_model.register_forward_pre_hook(start_forward, with_kwargs=True).remove)
        for attention in attentions.values():
            stack.callback(SteeringHandle(attention).remove)
        yield set(attentions)


@contextlib.contextmanager
def watched(vlm: VisionLanguageModel) -> Iterator[Watcher]:
    """Watch a model, for the length of a block. Nothing of it changes.

    Args:
        vlm: The model's parts; adapters may be attached.

    Raises:
        ValueError: The model's attention cannot be reached.
    """
    watcher = Watcher()
    with calling(vlm, watcher):
        yield watcher


@dataclass(frozen=True, eq=False)
class BranchTrace:
    """What one PVM branch did in one layer.

    Attributes:
        gate: The learned scalar.
        relative_update: Norm of the update over that of the residual stream, `(num_queries,)`, fp32.
        retrieval: Weights over the visual tokens, averaged over heads, `(num_queries, num_visual)`, fp32.
    """

    gate: float
    relative_update: torch.Tensor
    retrieval: torch.Tensor


@contextlib.contextmanager
def branches_observed(model: nn.Module, num_queries: int) -> Iterator[dict[tuple[str, int], BranchTrace]]:
    """Record what the active PVM adapters do to the last tokens, for the length of a block.

    Args:
        model: The model they are attached to.
        num_queries: How many tokens that are.

    Yields:
        By adapter and layer index; it fills up.
    """
    traces: dict[tuple[str, int], BranchTrace] = {}

    def record(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden_states, whole = args
        context: VisualContext = whole.tail(hidden_states.shape[1])
        residual = hidden_states[0, -num_queries:].float().norm(dim=-1)
        for adapter in layer.active_adapters:
            if adapter not in layer.configs:
                continue
            branches = layer.pvm_branches[adapter]
            for number, branch in enumerate(branches):
                update = branch.update(hidden_states, context)
                retrieval = branch.retrieval(hidden_states, context)
                if update is None or retrieval is None:
                    continue
                name = adapter if len(branches) == 1 else f"{adapter}[{number}]"
                traces[name, layer.layer_idx] = BranchTrace(
                    float(branch.gate.weight),
                    (update[0, -num_queries:].float().norm(dim=-1) / residual).cpu(),
                    retrieval[0, :, -num_queries:].mean(0).cpu(),
                )

    layers = [module for module in model.modules() if isinstance(module, PVMLayer) and not module.disable_adapters]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record).remove)
        yield traces


@contextlib.contextmanager
def layers_observed(vlm: VisionLanguageModel, num_queries: int) -> Iterator[list[torch.Tensor]]:
    """Keep what each decoder layer gives for the last tokens, for the length of a block.

    Args:
        vlm: The model's parts.
        num_queries: How many tokens that are.

    Yields:
        One tensor for each layer, `(1, num_queries, hidden_size)`; it fills up.
    """
    outputs: list[torch.Tensor] = []

    def keep(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden_states[:, -num_queries:].clone())

    with contextlib.ExitStack() as stack:
        for layer in vlm.layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        yield outputs


@contextlib.contextmanager
def undisturbed(vlm: VisionLanguageModel) -> Iterator[None]:
    """Put the model into eval mode for a block. Afterwards its mode is restored, and other conversations can go on."""
    training = [module for module in vlm.model.modules() if module.training]
    # Qwen's models keep from a prompt by how much the positions of its answer are shifted.
    rope_deltas = {module: module.rope_deltas for module in vlm.model.modules() if "rope_deltas" in vars(module)}
    vlm.model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, deltas in rope_deltas.items():
            module.rope_deltas = deltas


def visual_mask(vlm: VisionLanguageModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens of the prompt stand for an image or a video that comes with it, `(1, seq_len)`, bool."""
    token_ids = [token_id for modality in modalities_in(inputs) for token_id in vlm.placeholder_ids[modality]]
    return placeholder_mask(inputs["input_ids"], token_ids)

"""VAR: attention that sinks would take goes to the other visual tokens, in heads that look at the image."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..attention.call import AttentionCall
from ..attention.stages import GroupWeights, Stage
from ..tokens.context import VisualContext
from ..tokens.families import VisionLanguageModel
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import is_int, is_number, setting
from ..utils.text import quoted


EPSILON = 1e-6  # in the norm, as the authors have it
MOST_CHANNELS = 1_000


def root_mean_square(hidden_states: torch.Tensor) -> torch.Tensor:
    """Of the channels of hidden states, `(..., hidden_size)` to `(..., 1)`, in fp32 at least."""
    states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return (states.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]


@dataclass
class VARConfig(AttentionMethod):
    """Gives a part of the attention that sinks take to the other visual tokens, in heads that look at the image
    (arXiv 2503.03321, "Visual Attention Redistribution").

    With `h_j` the hidden state of token `j` where the layer begins, `j` is a sink if::

        max over sink_channels c of |h_jc| / RMS(h_j) > tau

    With `w_ij` the attention weight of key `j` in row `i` of a head, `S` the sum of a row's weights over all sinks,
    `Sv` over visual sinks and `V` over all visual tokens, in rows of text behind an image with::

        0 < Sv <= rho * V      and      V >= least_visual

        w_ij = w_ij * p                               for sinks, of text and image
        w_ij = w_ij * (1 + (1 - p) * S / (V - Sv))    for other visual tokens

    Other rows and heads stay as they are, and so does the sum of each row. The sinks of a layer take four times the
    channels of values in a forward with an image; a step of decoding makes its row of weights by hand. It has no
    parameters.

    Args:
        sink_channels: Channels of the hidden state by which sinks are known, which differ from model to model:
            `peft-pvm sinks` finds them. They must be given to attach it.
        tau: How large one of them is in a sink, in units of the hidden state's root mean square, above 0.
        rho: The largest share of its visual weight that a head may give to visual sinks, 0 to 1.
        least_visual: The least weight that a head must give to visual tokens, 0 to 1.
        p: What part of their weight sinks keep, 0 to 1.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the paper's, all but the first
            two and the last of 32 layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "var"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (2, 30, 32)
    reads_layer_inputs: ClassVar[bool] = True
    reads_while_off: ClassVar[bool] = True

    sink_channels: list[int] | None = setting(
        None,
        "Channels of the hidden state by which sinks are known: peft-pvm sinks finds them.",
        valid=lambda value: (
            value is None
            or (
                isinstance(value, (list, tuple))
                and 0 < len(value) <= MOST_CHANNELS
                and all(is_int(channel) and 0 <= channel < 2**31 for channel in value)
            )
        ),
        accepted="None or a non-empty list of channels from 0 on",
    )
    tau: float = setting(20.0, "How large a channel is in a sink, in units of the root mean square.", above=0)
    rho: float = setting(
        0.5,
        "The largest share of its visual weight that a head may give to visual sinks.",
        valid=_is_share,
        accepted="a number from 0 to 1",
    )
    least_visual: float = setting(
        0.2,
        "The least weight that a head must give to visual tokens.",
        valid=_is_share,
        accepted="a number from 0 to 1",
    )
    p: float = setting(0.6, "What part of their weight sinks keep.", valid=_is_share, accepted="a number from 0 to 1")

    def fitted_to(self, vlm: VisionLanguageModel) -> VARConfig:
        """Itself, if there are channels and the model has them."""
        model = type(vlm.model).__name__
        if self.sink_channels is None:
            raise ValueError(
                f"VARConfig.sink_channels is None, but the channels by which sinks are known are those of {model} "
                "alone. Find them with `peft-pvm sinks --model MODEL --data DATA`, or with propose_sinks from "
                "peft_pvm.probe.sinks, and give them: VARConfig(sink_channels=[...])."
            )
        hidden_size = vlm.text_config.hidden_size
        if wrong := [channel for channel in self.sink_channels if channel >= hidden_size]:
            raise ValueError(
                f"VARConfig.sink_channels names channels {quoted(wrong)}, but the hidden states of {model} have "
                f"{hidden_size} (0 to {hidden_size - 1})."
            )
        return self

    def enter(
        self, vlm: VisionLanguageModel, layer_idx: int, context: VisualContext, hidden_states: torch.Tensor
    ) -> None:
        """Note on the KV cache which tokens are sinks."""
        context.mark(self._mark_name(layer_idx), self.are_sinks(hidden_states))

    def are_sinks(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Which tokens are sinks, by the hidden states with which a layer begins, `(batch, seq_len)`, bool."""
        chosen = torch.stack([hidden_states[..., channel] for channel in self._channels], -1)  # waits for no device
        return (chosen.abs() > self.tau * root_mean_square(hidden_states)).any(-1)

    def _mark_name(self, layer_idx: int) -> Hashable:
        """By what they are known as sinks, and in which layer."""
        return "sinks", layer_idx, self.tau, *self._channels

    @property
    def _channels(self) -> list[int]:
        return sorted(set(self.sink_channels or ()))

    def stages(self, layer: SteeredLayer) -> Stage:
        """Weights by group: sinks and others, of text and image."""
        return GroupWeights(lambda call: self.groups(call, layer.layer_idx), self.factors, rows="text")

    def groups(self, call: AttentionCall, layer_idx: int) -> torch.Tensor:
        """Other text, sinks of text, other visual tokens, visual sinks: `(batch, 4, num_keys)`, bool.

        Raises:
            RuntimeError: Nobody looked for sinks among some tokens.
        """
        visual = call.visual_keys
        sinks = call.context.marks_of_keys(self._mark_name(layer_idx), visual.shape[1])
        if sinks is None:
            raise RuntimeError(
                f"Nobody looked for sinks among all tokens of this KV cache at layer {layer_idx}: VAR must be "
                "attached from the first token on, in layers that compute the whole prompt. Start with a new cache."
            )
        return torch.stack([~visual & ~sinks, ~visual & sinks, visual & ~sinks, visual & sinks], 1)

    def factors(self, call: AttentionCall, masses: torch.Tensor) -> torch.Tensor:
        """What weights are multiplied by, from the weight of these groups: `(batch, num_queries, heads, 4)` both."""
        masses = masses.to(torch.promote_types(masses.dtype, torch.float32))
        _, text_sinks, others, visual_sinks = masses.unbind(-1)
        visual = others + visual_sinks
        chosen = (visual_sinks > 0) & (visual_sinks <= self.rho * visual) & (visual >= self.least_visual)
        chosen = chosen & (others > 0)  # which take what sinks give
        more = (1 - self.p) * (text_sinks + visual_sinks) / torch.where(chosen, others, 1)
        one = torch.ones_like(more)
        kept, raised = torch.where(chosen, self.p, one), torch.where(chosen, 1 + more, one)
        return torch.stack([one, kept, raised, kept], -1)


VARModel = attention_tuner(VARConfig)

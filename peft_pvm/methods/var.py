"""VAR: in heads that look at the image, part of the attention on sinks is moved to the other visual tokens."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..attention.call import AttentionCall
from ..attention.stages import GroupWeights, Stage
from ..tokens.context import VisualContext
from ..tokens.families import VisionLanguageModel
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import is_list_of_indices, setting
from ..utils.text import quoted


EPSILON = 1e-6  # in the norm, as the authors have it
MOST_CHANNELS = 1_000


def sizes(hidden_states: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states over the root mean square of their channels, `(..., hidden_size)` both, in fp32 at least.

    Args:
        hidden_states: The hidden states.
        weight: What channels are multiplied by then, `(hidden_size,)`. `None`: 1.
    """
    states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return F.rms_norm(states, states.shape[-1:], weight, EPSILON)


@dataclass
class VARConfig(AttentionMethod):
    """Moves a part of the attention on sinks to the other visual tokens, in heads that look at the image
    (arXiv 2503.03321, "Visual Attention Redistribution").

    With `h_j` the hidden state of token `j` where the layer begins, `j` is a sink if::

        max over sink_channels c of |h_jc| / RMS(h_j) > tau

    With `w_ij` the attention weight of query `i` and key `j` in a head, `S` the sum of a query's weights over all
    sinks, `Sv` over visual sinks and `V` over all visual tokens, for queries of text after an image with::

        0 < Sv <= rho * V,      Sv < V      and      V >= least_visual

        w_ij = w_ij * p                               for sinks, of text and image
        w_ij = w_ij * (1 + (1 - p) * S / (V - Sv))    for other visual tokens

    Other queries and heads stay as they are, and so does the sum of each query's weights. In a forward with an image,
    a layer attends to values three times as wide. A step of decoding computes its single row of weights itself. It has
    no parameters.

    Args:
        sink_channels: Channels of the hidden state that are large in sinks. They differ from model to model, and
            `peft-pvm sinks` finds them. Attaching needs them.
        tau: A token is a sink if one of these channels is larger than this, in units of the hidden state's root mean
            square, above 0.
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
        "Channels of the hidden state that are large in sinks: peft-pvm sinks finds them.",
        valid=lambda channels: channels is None or is_list_of_indices(channels, MOST_CHANNELS),
        accepted="None or a non-empty list of channels from 0 on",
    )
    tau: float = setting(20.0, "How large a channel is in a sink, in units of the root mean square.", above=0)
    rho: float = setting(
        0.5, "The largest share of its visual weight that a head may give to visual sinks.", least=0, most=1
    )
    least_visual: float = setting(0.2, "The least weight that a head must give to visual tokens.", least=0, most=1)
    p: float = setting(0.6, "What part of their weight sinks keep.", least=0, most=1)

    def fitted_to(self, vlm: VisionLanguageModel) -> VARConfig:
        """This configuration. Raises if it has no channels, or if the model does not have them."""
        model = type(vlm.model).__name__
        if self.sink_channels is None:
            raise ValueError(
                "VARConfig.sink_channels is None, but each model has channels of its own that are large in sinks. "
                f"Find those of {model} with `peft-pvm sinks --model MODEL --data DATA`, or with propose_sinks from "
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
        """Note on the KV cache how much each token belongs to the groups of keys, some of which are sinks."""
        sinks, visual = self.are_sinks(hidden_states, context), context.visual_mask
        if visual is None:
            others, text_sinks = context.derived((self._whose, "text", sinks.device), lambda: self._of_text(sinks))
            of_tokens = torch.where(sinks.unsqueeze(-1), text_sinks, others)
        else:
            of_tokens = self._groups(sinks, visual[:, -sinks.shape[1] :].to(sinks.device))
        context.mark((self._whose, layer_idx), of_tokens)

    def are_sinks(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor:
        """Which tokens are sinks, by the hidden states with which a layer begins, `(batch, seq_len)`, bool."""

        def find() -> torch.Tensor:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            channels = hidden_states.new_zeros(hidden_states.shape[-1], dtype=dtype)
            for channel in self.sink_channels or ():
                channels[channel] = 1
            return channels

        channels = context.derived((self._whose, "channels", hidden_states.dtype, hidden_states.device), find)
        return torch.linalg.vector_norm(sizes(hidden_states, channels), torch.inf, -1) > self.tau

    def _groups(self, sinks: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """How much tokens belong to each group of keys, `(batch, seq_len, 6)`, fp32.

        The weights of the first two groups are changed: what sinks lose, below 0, and other visual tokens, which get
        it. The third is what sinks lose, above 0. The last three are visual sinks, what these have less than their
        largest share of the image, and the image. `_least` says what a query must have of them.
        """
        lost, visual_sinks, image = (1 - self.p) * sinks.float(), (visual & sinks).float(), visual.float()
        groups = [-lost, image - visual_sinks, lost, visual_sinks, self.rho * image - visual_sinks, image]
        return torch.stack(groups, -1)

    def _of_text(self, sinks: torch.Tensor) -> torch.Tensor:
        """`_groups` of a token of text that is no sink, and of one that is: `(2, 6)`, on the device of `sinks`."""
        sinks = torch.arange(2, device=sinks.device) > 0
        return self._groups(sinks, torch.zeros_like(sinks))

    @property
    def _whose(self) -> Hashable:
        """The settings that decide what is noted."""
        return self.method, self.tau, self.rho, self.p, *sorted(set(self.sink_channels or ()))

    def stages(self, layer: SteeredLayer) -> Stage:
        """Weights by group: of sinks, and of other visual tokens."""
        return GroupWeights(lambda call: self.groups(call, layer.layer_idx), self.changes, rows="text", num_changed=2)

    def groups(self, call: AttentionCall, layer_idx: int) -> torch.Tensor:
        """How much keys belong to groups, `(batch, num_keys, 6)`: see `_groups`.

        Raises:
            RuntimeError: Nobody looked for sinks among some tokens.
        """
        of_keys = call.keys.marks((self._whose, layer_idx))
        if of_keys is None:
            raise RuntimeError(
                f"Nobody looked for sinks among all tokens of this KV cache at layer {layer_idx}: VAR must be "
                "attached from the first token on, in layers that compute the whole prompt. Start with a new cache."
            )
        return of_keys

    def changes(self, call: AttentionCall, found: torch.Tensor) -> torch.Tensor:
        """The changes of the weights of sinks and of other visual tokens, from the weights of groups.

        Args:
            call: Not used.
            found: `(batch, num_queries, heads, 6)`.

        Returns:
            `(batch, num_queries, heads, 2)`, fp32 at least.
        """
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        least = call.context.derived((self._whose, "least", found.device), lambda: self._least(found))
        stays = (found[..., 1:] < least).any(-1, keepdim=True)
        others_and_lost = found[..., 1:3]
        return others_and_lost / others_and_lost[..., :1].masked_fill(stays, torch.inf)

    def _least(self, found: torch.Tensor) -> torch.Tensor:
        """The least weight that a query must have of each group but the first, `(5,)`: of most groups, any above 0."""
        of_last = F.pad(found.new_full((1,), self.least_visual), (1, 0))
        return F.pad(of_last, (3, 0), value=torch.finfo(found.dtype).tiny)


VARModel = attention_tuner(VARConfig)

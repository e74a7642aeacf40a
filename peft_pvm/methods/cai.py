"""CAI: in layers where the model is still undecided, scores of visual keys that are like the token are raised."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..attention.call import AttentionCall
from ..attention.scores import Scores
from ..attention.stages import Stage
from ..tokens.context import VisualContext
from ..tokens.early_exit import EarlyExit
from ..tokens.families import VisionLanguageModel
from ..tokens.positions import causally_visible
from ..tokens.visibility import real_tokens
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..tuners.without_parameters import ROWS, Rows
from ..utils.checks import setting


@dataclass
class CAIConfig(AttentionMethod):
    """Raises the scores of visual keys that are like the token, in layers where the model is still undecided
    (arXiv 2606.29847, "Context-aware Attention Intervention").

    With `s_ij` the score of query `i` and visual key `j` after scaling, `x_i` the token's own input embedding and
    `z_j` the embedding that the vision tower wrote for `j`, in layers where `H_i > threshold`::

        s_ij = s_ij + |s_ij| * sigmoid(slope * (cos(x_i, z_j) - m_i))      m_i: the least cosine of those before i

    The softmax follows. `H` says how undecided the model is: `H = -sum p log p / log 10`, where `p` are the
    probabilities of the 10 likeliest tokens, normalised to sum to 1. The final norm and the head compute them from the
    residual stream that enters the layer. Every layer on which it acts runs the head once more, for every token of
    text after an image. The paper's second part, contrastive decoding, is left out. It has no parameters.

    Args:
        threshold: How undecided the model has to be, from 0 to 1.
        slope: How sharply keys like the token are separated from the key least like it, 0 or more.
        rows: "text": all text after an image. "generated": only the last token of each forward, as in the authors'
            code; in a forward of several tokens, `x` is then the mean over its text. Then a step of decoding does not
            give what a forward over the whole text gives.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the second half.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "cai"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (16, 31, 32)
    reads_layer_inputs: ClassVar[bool] = True
    reads_embeddings: ClassVar[bool] = True

    threshold: float = setting(0.5, "How undecided the model has to be, from 0 to 1.", least=0, most=1)
    slope: float = setting(100.0, "How sharply keys like the token are separated from others, 0 or more.", least=0)
    rows: Rows = setting("text", ROWS, among=("text", "generated"))

    @classmethod
    def layers_on(cls, vlm: VisionLanguageModel) -> list[int]:
        """The layers of any method that changes attention. Raises if nothing can be read off between them."""
        EarlyExit(vlm)
        return super().layers_on(vlm)

    def enter(
        self, vlm: VisionLanguageModel, layer_idx: int, context: VisualContext, hidden_states: torch.Tensor
    ) -> None:
        """Find out which tokens enter the layer undecided."""
        undecided = context.handed_on.setdefault(self._whose, {})
        if layer_idx in undecided or context.memory.is_empty:
            return
        among = context.text_after_images()
        if self.rows == "generated" and context.seq_len > 1:
            among = among & (torch.arange(among.shape[1], device=among.device) == among.shape[1] - 1)
        undecided[layer_idx] = EarlyExit(vlm).undecided(hidden_states, self.threshold, among.to(hidden_states.device))

    def stages(self, layer: SteeredLayer) -> Stage:
        """Raised scores of visual keys."""
        return Scores(functools.partial(self.added, layer.layer_idx), self.rows)

    def added(self, layer_idx: int, call: AttentionCall, scores: torch.Tensor, queries: slice) -> torch.Tensor:
        """What is added to the scores of visual keys, `(batch, heads, rows, num_visual)` both."""
        context = call.context
        undecided = context.handed_on[self._whose][layer_idx].to(scores.device)[:, -call.query.shape[2] :][:, queries]
        if context.seq_len == 1:  # the same in all layers, and not much to keep
            key = self._whose, "alike", scores.dtype, scores.device
            alike = context.derived(key, lambda: self._alike(call, scores.dtype, queries))
        else:
            alike = self._alike(call, scores.dtype, queries)
        return scores.abs() * (alike * undecided.unsqueeze(-1)).unsqueeze(1)

    def _alike(self, call: AttentionCall, dtype: torch.dtype, queries: slice) -> torch.Tensor:
        """How much the token of each query is like each visual token, from 0.5 to 1, `(batch, rows, num_visual)`."""
        return torch.sigmoid(self.slope * self._above_least(call, dtype, queries))

    def _above_least(self, call: AttentionCall, dtype: torch.dtype, queries: slice) -> torch.Tensor:
        """How far the cosine of each query's token and each visual token is above the query's least one, `(batch,
        rows, num_visual)`."""
        context, memory, num_queries = call.context, call.context.memory, call.query.shape[2]
        visual = context.derived(("directions", dtype), lambda: F.normalize(memory.embeddings.to(dtype), dim=-1))
        # Some models leave all but the last tokens out of their last layers.
        tokens = F.normalize(self._asking(context).to(visual)[:, -num_queries:][:, queries], dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):  # the slope makes much of small differences
            cosines = tokens @ visual.transpose(1, 2)
        first = context.past_length + context.seq_len - num_queries
        places = torch.arange(num_queries, device=cosines.device)[queries].expand(len(cosines), -1) + first
        sees = causally_visible(memory.slots, places)
        return cosines - cosines.masked_fill(~sees, torch.inf).amin(-1, keepdim=True).clamp(max=1)

    def _asking(self, context: VisualContext) -> torch.Tensor:
        """What each query compares visual tokens with, `(batch, seq_len, hidden_size)`."""
        embeddings = context.inputs_embeds
        if embeddings is None:
            raise NotImplementedError(
                "The text model of this model is given token ids, so that the input embeddings of text are not known, "
                "which CAI compares with those of visual tokens. Take it off with unload()."
            )
        if self.rows == "text" or context.seq_len == 1:
            return embeddings
        visual = context.visual_mask
        is_text = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        is_text = is_text if visual is None else ~visual
        real = real_tokens(context.attention_mask, is_text.shape, None if context.is_evicted else context.past_length)
        is_text = (is_text if real is None else is_text & real).unsqueeze(-1)
        mean = (embeddings * is_text).sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1)
        return mean.expand_as(embeddings)

    @property
    def _whose(self) -> Any:
        return self.method, self.threshold, self.rows


CAIModel = attention_tuner(CAIConfig)

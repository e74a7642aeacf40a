"""Scores with anchored positions between tokens of different modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...attention.call import AttentionCall, Output, records_gradients
from ...attention.reference import products
from ...attention.rotation import Tables, between, rotate, rotation_tables, unit
from ...attention.stages import Positions
from .by_modality import Run, attend_by_modality, runs_of


@dataclass(frozen=True)
class AnchoredPositions(Positions):
    """The positions by which one layer makes its scores (arXiv 2603.10863).

    With `R` the rotation by position, `p` the positions, and the anchor of a token the position of the first token of
    the contiguous run of one modality that holds it::

        score(i, j) = R(p_i) q_i . R(p_j) k_j * scaling          if i and j are of one modality
                      R(anchor_i) q_i . R(p_j) k_j * scaling     otherwise

    Args:
        rotary: The text model's rotary embedding.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
    """

    rotary: nn.Module
    layer_type: str | None

    def acts_on(self, call: AttentionCall) -> bool:
        return not call.context.memory.is_empty  # with text alone there is one modality

    def reference(self, call: AttentionCall) -> torch.Tensor:
        own, anchored = products(call.query, call.key), products(self.anchored_query(call), call.key)
        is_inter = call.visual_queries[:, None, :, None] != call.visual_keys[:, None, None]
        return torch.where(is_inter, anchored, own)

    def attend_alone(self, call: AttentionCall) -> Output:
        if call.query.shape[2] == 1:
            return self._attend_once(call)
        runs = self._mergeable_runs(call)
        if runs is None:
            return super().attend_alone(call)
        anchored = self.anchored_query(call)
        output = attend_by_modality(call.query, anchored, call.key, call.value, runs, call.scaling)
        return output.transpose(1, 2).contiguous(), None

    @staticmethod
    def _mergeable_runs(call: AttentionCall) -> list[Run] | None:
        """The runs of a prefill that `attend_by_modality` can do; `None` if it is padded, continued, trained, ..."""
        query, key, value = call.query, call.key, call.value
        is_fused = call.kernel == "sdpa" and query.device.type == "cpu" and value.shape[-1] == key.shape[-1]
        is_whole = call.visibility.is_plain_causal and query.shape[2] == key.shape[2]
        if call.context.visual_mask is None or records_gradients(query, key, value) or call.kwargs.get("dropout"):
            return None
        if not is_fused or not is_whole:
            return None
        known = call.context.memory.runs
        return None if known is None else call.context.derived("runs", lambda: runs_of(known, query.shape[2]))

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of twice the width, whose products are the scores: exact on any kernel.

        Keys are split by modality, `[text or 0, visual or 0]`; queries hold what each kind of key is to be met with.
        """
        query, anchored = call.query, self.anchored_query(call)
        visual_queries = call.visual_queries[:, None, :, None]
        visual_keys = call.visual_keys[:, None, :, None]
        to_text = torch.where(visual_queries, anchored, query)
        to_visual = torch.where(visual_queries, query, anchored)
        split = [call.key.masked_fill(visual_keys, 0), call.key.masked_fill(~visual_keys, 0)]
        return torch.cat([to_text, to_visual], -1), torch.cat(split, -1)

    def _attend_once(self, call: AttentionCall) -> Output:
        """A single query: two rows of scores and a choice between them, so that the cache is read and not copied."""
        key, value = call.key, call.value
        kv_heads, num_keys = key.shape[1:3]
        rows = torch.cat([_by_kv_head(call.query, kv_heads), _by_kv_head(self.anchored_query(call), kv_heads)], 2)
        same, cross = (rows @ key.transpose(2, 3) * call.scaling).chunk(2, 2)
        scores = torch.where(self._of_one_modality(call), same, cross).float()
        softcap = call.kwargs.get("softcap")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.reshape(scores.shape[0], -1, 1, num_keys)  # all heads, as masks have them
        visibility = call.visibility
        mask, bias = visibility.mask(), visibility.bias()
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, -1).to(value.dtype)
        if dropout := call.kwargs.get("dropout", 0.0):
            weights = F.dropout(weights, dropout, call.module.training)
        output = (_by_kv_head(weights, kv_heads) @ value).reshape(weights.shape[0], 1, -1, value.shape[-1])
        return output, weights if call.kernel == "eager" or call.wants_weights else None

    @staticmethod
    def _of_one_modality(call: AttentionCall) -> torch.Tensor:
        """Which keys are of a single query's modality, `(batch, 1, 1, num_keys)`, bool."""
        num_keys = call.key.shape[2]

        def compare() -> torch.Tensor:
            return (call.visual_keys == call.visual_queries)[:, None, None]

        return call.context.derived(("of one modality", num_keys), compare)

    def anchored_query(self, call: AttentionCall) -> torch.Tensor:
        """The rotated queries, turned on from their own position to their anchor."""

        def turn() -> Tables:
            position_ids, anchors = call.context.noted()
            return unit(rotation_tables(self.rotary, anchors.unsqueeze(-1) - position_ids, self.layer_type))

        tables = call.context.derived(("dipe", self.layer_type), turn)
        return rotate(call.module, call.query, between(tables, -call.query.shape[2], None))


def _by_kv_head(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`(batch, heads, 1, ...)` to `(batch, kv_heads, heads / kv_heads, ...)`."""
    return tensor.reshape(tensor.shape[0], kv_heads, -1, tensor.shape[-1])

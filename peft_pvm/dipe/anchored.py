"""Scores with anchored positions between tokens of different modality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import AttentionCall
from ..rotation import Tables, between, rotate, rotation_tables, unit
from .by_modality import Run, attend_by_modality, runs_of


WIDEST_FOR_FLASH = 128  # half of what its kernels take


class AnchoredScoring:
    """How the scores of one layer are made (arXiv 2603.10863).

    With `R` the rotation by position, `p` the positions, and the anchor of a token the position of the first token of
    the contiguous run of one modality that holds it::

        score(i, j) = R(p_i) q_i . R(p_j) k_j * scaling          if i and j are of one modality
                      R(anchor_i) q_i . R(p_j) k_j * scaling     otherwise

    Args:
        rotary: The text model's rotary embedding.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None):
        self.rotary = rotary
        self.layer_type = layer_type

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention function returns: `(batch, num_queries, heads, value_dim)`, and weights or `None`."""
        if call.query.shape[2] == 1:
            return self._attend_once(call)
        runs = self._mergeable_runs(call)
        if runs is not None:
            anchored = self.anchored_query(call)
            output = attend_by_modality(call.query, anchored, call.key, call.value, runs, call.scaling)
            return output.transpose(1, 2).contiguous(), None
        head_dim = call.query.shape[-1]
        if "flash" in call.kernel and head_dim > WIDEST_FOR_FLASH:
            raise NotImplementedError(
                f"DIPE doubles the width of heads for a prefill, and flash attention takes no {2 * head_dim} channels "
                "a head. Use attn_implementation='sdpa'."
            )
        query, key = self.widen(call)
        # Fused kernels want values as wide as keys.
        value_dim = call.value.shape[-1]
        output, weights = call.run_kernel(query, key, F.pad(call.value, (0, key.shape[-1] - value_dim)))
        return output[..., :value_dim], weights

    @staticmethod
    def _mergeable_runs(call: AttentionCall) -> list[Run] | None:
        """The runs of a prefill that `attend_by_modality` can do; `None` if it is padded, continued, trained, ..."""
        query, key, value, visual_mask = call.query, call.key, call.value, call.context.visual_mask
        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        is_fused = call.kernel == "sdpa" and query.device.type == "cpu" and value.shape[-1] == key.shape[-1]
        is_whole = call.visibility.is_plain_causal and query.shape[2] == key.shape[2]
        if visual_mask is None or records or not is_fused or not is_whole or call.kwargs.get("dropout"):
            return None
        known = call.context.memory.runs
        return None if known is None else call.context.derived("runs", lambda: runs_of(known, query.shape[2]))

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of twice the width, whose products are the scores: exact on any kernel.

        Keys are split by modality, `[text or 0, visual or 0]`; queries hold what each kind of key is to be met with.
        """
        query, anchored = call.query, self.anchored_query(call)
        visual_queries = call.visual_queries[:, None, :, None]
        visual_keys = call.context.visual_keys(call.key.shape[2])[:, None, :, None]
        to_text = torch.where(visual_queries, anchored, query)
        to_visual = torch.where(visual_queries, query, anchored)
        split = [call.key.masked_fill(visual_keys, 0), call.key.masked_fill(~visual_keys, 0)]
        return torch.cat([to_text, to_visual], -1), torch.cat(split, -1)

    def _attend_once(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
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
            return (call.context.visual_keys(num_keys) == call.visual_queries)[:, None, None]

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

"""`Scores`: a stage that changes scores by what they are themselves, for a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .call import AttentionCall, Output, records_gradients
from .stages import Later, Stage, Weights, text_rows


BLOCK_ELEMENTS = 2**22  # scores at once, of all rows and heads
Change = Callable[[AttentionCall, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scores(Stage):
    """Scores of some rows changed by what they are; the softmax follows.

    These rows are made by hand, a few at a time, so that memory grows with the length and not with its square. The
    kernel makes the others.

    Args:
        change: Gives the new scores from a call and scores after scaling, `(batch, heads, rows, num_keys)` both. What
            it says of keys that a row does not see is lost.
        rows: "text": rows of text with a visual token before them. "last": of these, only the last row of each
            forward, which the next token comes from.
    """

    order = Weights.order
    done_by_one = Weights.done_by_one

    change: Change
    rows: Literal["text", "last"] = "text"

    def attend(self, call: AttentionCall, later: Later) -> Output:
        if call.context.memory.is_empty:
            return later(call)
        rows, num_queries = self.changed_rows(call), call.query.shape[2]
        first = 0 if rows is None else self._first(call, rows)
        if first == num_queries:
            return later(call)
        output, weights = self._changed(call, slice(first, num_queries))
        if rows is None:
            return output, weights
        plain_output, plain_weights = later(call)
        chosen = rows[:, first:]
        ends = torch.where(chosen[:, :, None, None], output, plain_output[:, first:])
        output = torch.cat([plain_output[:, :first], ends], 1)
        if weights is None or plain_weights is None:
            return output, plain_weights
        ends = torch.where(chosen[:, None, :, None], weights, plain_weights[:, :, first:])
        return output, torch.cat([plain_weights[:, :, :first], ends], 2)

    def changed_rows(self, call: AttentionCall) -> torch.Tensor | None:
        """Which rows are changed, `(batch, num_queries)`, bool. `None`: all."""
        rows = text_rows(call)
        if self.rows == "text" or call.query.shape[2] == 1:
            return rows
        rows = call.visual_queries.logical_not() if rows is None else rows
        is_last = torch.arange(rows.shape[1], device=rows.device) == rows.shape[1] - 1
        return rows & is_last

    def reference(self, call: AttentionCall, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The weights in their plainest form: see `Weights`."""
        lowest, rows = torch.finfo(scores.dtype).min / 2, self.changed_rows(call)
        if call.context.memory.is_empty:
            return scores.masked_fill(hidden, lowest).softmax(-1)
        changed = self.change(call, scores)
        changed = changed if rows is None else torch.where(rows[:, None, :, None], changed, scores)
        return changed.masked_fill(hidden, lowest).softmax(-1)

    def _first(self, call: AttentionCall, rows: torch.Tensor) -> int:
        """The first of the rows that are changed, in any conversation. Waits for the device."""
        num_queries = rows.shape[1]
        if self.rows == "last" or num_queries == 1:
            return num_queries - 1
        if torch.compiler.is_compiling():
            return 0

        def find() -> int:
            found = rows.any(0)
            return int(torch.where(found.any(), found.int().argmax(), num_queries))

        return call.context.derived(("first changed row", num_queries), find)

    def _changed(self, call: AttentionCall, queries: slice) -> Output:
        """What the attention function returns for some rows, all of them changed."""
        batch, heads = call.query.shape[:2]
        at_once = max(BLOCK_ELEMENTS // (batch * heads * call.key.shape[2]), 1)
        wants_weights = call.kernel == "eager" or call.wants_weights
        records = records_gradients(*call.scored_by, call.value)
        outputs, all_weights = [], []
        for start in range(queries.start, queries.stop, at_once):
            block = slice(start, min(start + at_once, queries.stop))
            if records:
                output, weights = checkpoint(self._block, call, block, use_reentrant=False)
            else:
                output, weights = self._block(call, block)
            outputs.append(output)
            if wants_weights:
                all_weights.append(weights)
        output = torch.cat(outputs, 2).transpose(1, 2).contiguous()
        return output, torch.cat(all_weights, 2) if wants_weights else None

    def _block(self, call: AttentionCall, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(batch, heads, rows, value_dim)` and weights `(batch, heads, rows, num_keys)` of a few rows."""
        query, key = call.scored_by
        by_kv_head = query[:, :, queries].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        scores = (by_kv_head @ key.transpose(2, 3)).view(*query.shape[:2], -1, key.shape[2])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * call.scaling
        softcap = call.kwargs.get("softcap")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if call.position_bias is not None:
            scores = scores + call.position_bias[:, :, queries]
        visible, bias = call.visibility.mask(queries), call.visibility.bias(queries)
        if bias is not None and visible is not None:
            scores = scores + bias.masked_fill(~visible, 0)
        scores = self.change(call, scores)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min / 2)
        weights = scores.softmax(-1).to(call.value.dtype)
        if dropout := call.kwargs.get("dropout", 0.0):
            weights = F.dropout(weights, dropout, call.module.training)
        grouped = weights.unflatten(1, (call.value.shape[1], -1)).flatten(2, 3)
        return (grouped @ call.value).view(*weights.shape[:3], -1), weights

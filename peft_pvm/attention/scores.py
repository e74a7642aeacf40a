"""`Scores`: a stage that adds to the scores of visual keys what depends on these scores themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .call import AttentionCall, Output, records_gradients, scaled_products
from .stages import Later, Stage, Weights, text_rows


BLOCK_ELEMENTS = 2**20  # scores at once, of all rows and heads
Added = Callable[[AttentionCall, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Scores(Stage):
    """Adds something to the scores of visual keys, computed from these scores themselves. The softmax follows.

    A row holds the scores of one query. If there are many rows, the kernel attends as it is, and one more channel of
    the values gives the weight that reaches the visual keys. From this weight and the scores of visual keys follow the
    weight of each of them, and the output with changed scores. That takes a matrix of rows and visual keys, a few rows
    at a time. A single row is computed as a whole, without the kernel. So are rows for which weights, gradients or
    dropout are wanted.

    Args:
        added: Computes what is added from a call, the scores of visual keys after scaling, and the slice of queries
            that these belong to. Scores and result are `(batch, heads, rows, num_visual)`, or the result can be
            expanded to it, in the order of `Keys.visual_columns`. Its values for keys that a row does not see are
            ignored.
        rows: Which queries' rows change. "text": those of text with a visual token before it. "generated": of these,
            only the last row of each forward, from which the next token is predicted.
    """

    order = Weights.order
    done_by_one = Weights.done_by_one

    added: Added
    rows: Literal["text", "generated"] = "text"

    def attend(self, call: AttentionCall, later: Later) -> Output:
        if call.context.memory.is_empty:
            return later(call)
        rows, num_queries = self.changed_rows(call), call.query.shape[2]
        first = 0 if rows is None else self._first(call, rows)
        if first == num_queries:
            return later(call)
        if num_queries - first > 1 and not _wants_whole_rows(call):
            return self._corrected(call, slice(first, num_queries), rows), None
        output, weights = self._whole(call, slice(first, num_queries))
        if rows is None:
            return output, weights
        plain_output, plain_weights = later(call)
        return (
            _put(plain_output, output, rows[:, :, None, None], 1, first),
            None
            if weights is None or plain_weights is None
            else _put(plain_weights, weights, rows[:, None, :, None], 2, first),
        )

    def changed_rows(self, call: AttentionCall) -> torch.Tensor | None:
        """The queries whose rows are changed, `(batch, num_queries)`, bool. `None`: all."""
        rows = text_rows(call)
        if self.rows == "text" or call.query.shape[2] == 1:
            return rows
        rows = ~call.visual_queries if rows is None else rows
        return rows & (torch.arange(rows.shape[1], device=rows.device) == rows.shape[1] - 1)

    def reference(self, call: AttentionCall, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The weights in their plainest form: see `Weights`."""
        lowest, rows = torch.finfo(scores.dtype).min / 2, self.changed_rows(call)
        if not call.context.memory.is_empty:
            changed = self._raised(call, scores, slice(None))
            scores = changed if rows is None else torch.where(rows[:, None, :, None], changed, scores)
        return scores.masked_fill(hidden, lowest).softmax(-1)

    def _first(self, call: AttentionCall, rows: torch.Tensor) -> int:
        """The first query whose row is changed in any conversation of the batch. Waits for the device."""
        num_queries = rows.shape[1]
        if self.rows == "generated" or num_queries == 1:
            return num_queries - 1
        if torch.compiler.is_compiling():
            return 0

        def find() -> int:
            found = rows.any(0)
            return int(torch.where(found.any(), found.int().argmax(), num_queries))

        return call.context.derived(("first changed row", num_queries), find)

    def _raised(self, call: AttentionCall, scores: torch.Tensor, queries: slice) -> torch.Tensor:
        """Scores of all keys with those of visual keys changed, `(batch, heads, rows, num_keys)` both."""
        index, is_there = _visual(call, scores)
        added = self.added(call, scores.gather(-1, index), queries).to(scores.dtype)
        added = added if is_there is None else added.masked_fill(~is_there, 0)
        return scores.scatter_add(-1, index, added.expand(index.shape))

    # ---- many rows

    def _corrected(self, call: AttentionCall, queries: slice, rows: torch.Tensor | None) -> torch.Tensor:
        """The output of all rows, corrected where scores change, `(batch, num_queries, heads, value_dim)`."""
        output = _with_mass(call)
        keys, values = _visual_only(call, call.scored_by[1]), _visual_only(call, call.value)
        changed = []
        at_once = _at_once(call, call.context.memory.slots.shape[1])
        for start in range(queries.start, queries.stop, at_once):
            block = slice(start, min(start + at_once, queries.stop))
            changed.append(self._correct(call, block, output[:, block], keys, values))
        plain, whole = output[..., :-1], torch.cat(changed, 1).to(output.dtype)
        return whole if rows is None else _put(plain, whole, rows[:, :, None, None], 1, queries.start)

    def _correct(
        self, call: AttentionCall, queries: slice, output: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """The output of some rows with changed scores, from the kernel's output with the visual mass as last channel.

        With `m` the mass, `s` the scores of visual keys and `a` what is added to them, each of these keys has the
        weight w = m softmax(s) before the change. Afterwards it has w e^a, divided by the sum over all keys.
        """
        scores = _scores(call, call.scored_by[0][:, :, queries], keys)
        index, is_seen = _visual(call, scores)
        is_seen = torch.ones_like(index, dtype=torch.bool) if is_seen is None else is_seen
        if call.position_bias is not None:
            scores = scores + call.position_bias[:, :, queries].expand(*scores.shape[:3], -1).gather(-1, index)
        visible, bias = call.visibility.mask(queries), call.visibility.bias(queries)
        if visible is not None:
            whole = *scores.shape[:3], call.key.shape[2]
            is_seen = is_seen & visible.expand(whole).gather(-1, index)
            if bias is not None:
                scores = scores + bias.expand(whole).gather(-1, index).masked_fill(~is_seen, 0)
        added = self.added(call, scores, queries).to(scores.dtype)
        lowest = torch.finfo(scores.dtype).min / 2
        plain, mass = (part.transpose(1, 2).to(scores.dtype) for part in (output[..., :-1], output[..., -1:]))
        before = scores.masked_fill(~is_seen, lowest).log_softmax(-1) + mass.clamp(min=0).log()
        before = before.masked_fill(~is_seen, -torch.inf)
        after = before + added
        largest = after.amax(-1, keepdim=True).clamp(min=0)  # so that nothing overflows
        more = torch.exp(after - largest) - torch.exp(before - largest)
        grouped = more.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
        put = (grouped @ values.to(more.dtype)).view(*more.shape[:3], -1)
        shrink = torch.exp(-largest)
        return ((plain * shrink + put) / (shrink + more.sum(-1, keepdim=True))).transpose(1, 2)

    # ---- whole rows

    def _whole(self, call: AttentionCall, queries: slice) -> Output:
        """What the attention function returns for some rows, all of them changed."""
        at_once = _at_once(call, call.key.shape[2])
        wants_weights = call.kernel == "eager" or call.wants_weights
        records = _records(call)
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
        output = _joined(outputs).transpose(1, 2).contiguous()
        return output, _joined(all_weights) if wants_weights else None

    def _block(self, call: AttentionCall, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(batch, heads, rows, value_dim)` and weights `(batch, heads, rows, num_keys)` of a few rows."""
        query, key = call.scored_by
        scores = _scores(call, query[:, :, queries], key)
        if call.position_bias is not None:
            scores = scores + call.position_bias[:, :, queries]
        visible, bias = call.visibility.mask(queries), call.visibility.bias(queries)
        if bias is not None and visible is not None:
            scores = scores + bias.masked_fill(~visible, 0)
        scores = self._raised(call, scores, queries)
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min / 2)
        weights = scores.softmax(-1).to(call.value.dtype)
        if dropout := call.kwargs.get("dropout", 0.0):
            weights = F.dropout(weights, dropout, call.module.training)
        grouped = weights.reshape(len(weights) * call.value.shape[1], -1, weights.shape[-1])
        return torch.bmm(grouped, call.value.flatten(0, 1)).view(*weights.shape[:3], -1), weights


def _records(call: AttentionCall) -> bool:
    return records_gradients(*call.scored_by, call.value)


def _wants_whole_rows(call: AttentionCall) -> bool:
    return call.kernel == "eager" or call.wants_weights or bool(call.kwargs.get("dropout")) or _records(call)


def _at_once(call: AttentionCall, num_keys: int) -> int:
    """How many rows of scores are held at a time."""
    batch, heads = call.query.shape[:2]
    return max(BLOCK_ELEMENTS // (batch * heads * num_keys), 1)


def _scores(call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The scores of some queries and keys after scaling, `(batch, heads, queries, keys)`, in fp32 at least."""
    by_kv_head = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = scaled_products(by_kv_head, key, call.scaling).view(*query.shape[:3], key.shape[2])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    softcap = call.kwargs.get("softcap")
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _visual(call: AttentionCall, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The columns of visual keys in rows of scores, and which of these keys exist, shaped like their scores.

    `None`: all exist.
    """
    columns, is_there = call.context.derived(("visual scores", call.key.shape[2]), lambda: _make_visual(call))
    shape = *scores.shape[:3], -1
    return columns.expand(shape), None if is_there is None else is_there.expand(shape)


def _make_visual(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    keys = call.keys
    columns = keys.visual_columns[:, None, None]
    return (columns, None) if keys.has_all_visual else (columns.clamp(max=keys.number - 1), columns < keys.number)


def _visual_only(call: AttentionCall, tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values of only the visual tokens, `(batch, kv_heads, num_visual, width)`, in the order of columns."""
    columns = call.keys.visual_columns.clamp(max=call.keys.number - 1)
    return tensor.gather(2, columns[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _with_mass(call: AttentionCall) -> torch.Tensor:
    """The kernel's output, and in one more channel the weight that reaches the visual keys."""
    value, marks = call.value, call.visual_keys[:, None, :, None].to(call.value.dtype)
    value = torch.cat([value, marks.expand(*value.shape[:3], 1)], -1)
    return replace(call, value=value).run_kernel()[0]


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Rows of `(batch, heads, rows, ...)`, one after the other."""
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


def _put(plain: torch.Tensor, changed: torch.Tensor, rows: torch.Tensor, axis: int, first: int) -> torch.Tensor:
    """Put changed rows in the place of plain ones, from row `first` on, where `rows` is True."""
    before, ends = plain.tensor_split([first], axis)
    return torch.cat([before, torch.where(rows.tensor_split([first], axis)[1], changed, ends)], axis)

"""What adapters do to the attention of a layer: the kinds of stages, and how several of them work together.

With `q` and `k` rotated, a layer computes, for a query `i` and a key `j` that it sees::

    q, k, v                              Watch: read, and not changed
    s_ij = q_i . k_j                     Positions: rotated by other positions, for some pairs
    s_ij = s_ij * c_j                    KeyScale
    s_ij = s_ij * scaling + a_i * b_j    Bias
    s_ij = s_ij + f(s_i)_j               Scores (`scores.py`): visual keys, from their own scores
    w_i  = softmax(s_i)                  Weights: another function of the scores
    w_ij = w_ij * f(groups of j, i)      GroupWeights
    o_i  = sum_j w_ij * c_j * v_j        Values

Stages act in this order, whatever the order in which their adapters were attached. Several of `KeyScale`, `Bias` and
`Values` multiply or add up. `Positions`, weights (`Scores` or `Weights`) and `GroupWeights` are done by one adapter: a
second one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from .call import CHANNELS, AttentionCall, Output


Rows = Literal["all", "text"]


@dataclass(frozen=True)
class Later:
    """What comes after a stage: later stages, and at the end the kernel."""

    stages: tuple[Stage, ...] = ()

    def __call__(self, call: AttentionCall) -> Output:
        """What the attention function returns for a call."""
        if not self.stages:
            return call.run_kernel()
        return self.stages[0].attend(call, Later(self.stages[1:]))


class Stage:
    """One thing that an adapter does to the attention of a layer.

    Attributes:
        order: Kinds run in ascending order. Keys and values are scaled first, which commutes with what comes between.
        done_by_one: What only one adapter can do in a layer, for the message. `None`: several add up.
    """

    order: ClassVar[int]
    done_by_one: ClassVar[str | None] = None

    def attend(self, call: AttentionCall, later: Later) -> Output:
        """What the attention function returns.

        Args:
            call: As earlier stages have changed it.
            later: Runs later stages and the kernel, on the call or a changed one.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Watch(Stage):
    """Reads something of the attention and changes nothing.

    Args:
        read: Is given the call as the model made it.
    """

    order = -1

    read: Callable[[AttentionCall], None]

    def attend(self, call: AttentionCall, later: Later) -> Output:
        self.read(call)
        return later(call)


@dataclass(frozen=True)
class _ByKey(Stage):
    """A stage with a number for each key.

    Args:
        of_keys: Gives the numbers, `(batch or 1, num_keys)`, float.
        rows: The queries whose rows it changes: "all", or "text" for those of text with a visual token before it.
    """

    of_keys: Callable[[AttentionCall], torch.Tensor]
    rows: Rows = "all"

    def attend(self, call: AttentionCall, later: Later) -> Output:
        if self.rows == "text" and call.context.memory.is_empty:
            return later(call)
        return self.attend_rows(call, later, text_rows(call) if self.rows == "text" else None)

    def attend_rows(self, call: AttentionCall, later: Later, rows: torch.Tensor | None) -> Output:
        """What the attention function returns, changed for some queries, `(batch, num_queries)`; `None`: for all."""
        raise NotImplementedError


class _Scale(_ByKey):
    """Factors of keys or values. If only some queries change, both outputs are computed, and each row takes its own.

    The unchanged output is computed only up to the last row that takes it, if the kernel lets rows be cut off.
    """

    def scaled(self, call: AttentionCall, factors: torch.Tensor) -> AttentionCall:
        """The call with something multiplied by `(batch or 1, 1, num_keys, 1)`."""
        raise NotImplementedError

    def changed(self, call: AttentionCall, later: Later, factors: torch.Tensor) -> Output:
        """What the attention function returns with factors of `(batch or 1, num_keys)` for all queries."""
        return later(self.scaled(call, factors[:, None, :, None]))

    def attend_rows(self, call: AttentionCall, later: Later, rows: torch.Tensor | None) -> Output:
        factors = self.of_keys(call)
        if rows is not None and rows.shape[1] == 1:  # with a single query, a factor of 1 leaves a row as it is
            factors, rows = torch.where(rows, factors, 1), None
        output, weights = self.changed(call, later, factors)
        if rows is None:
            return output, weights
        length = None if later.stages else _num_to_last_plain(call, rows)
        if length == 0:
            return output, weights
        plain_output, plain_weights = later(call if length is None else call.first(length))
        if weights is not None and plain_weights is not None:
            weights = torch.where(rows[:, None, :, None], weights, plain_weights)
        acting, changed = rows[:, :length, None, None], output[:, :length]
        chosen = torch.where(acting, changed, plain_output)
        return chosen if length is None else torch.cat([chosen, output[:, length:]], 1), weights


def _num_to_last_plain(call: AttentionCall, rows: torch.Tensor) -> int | None:
    """How many queries there are up to the last one that is not among `rows`, `(batch, num_queries)`.

    `None`: the kernel cannot be given only the first queries. Waits for the device.
    """
    if not call.can_be_cut or torch.compiler.is_compiling():
        return None

    def find() -> int:
        plain = (~rows).any(0)
        return int((plain * torch.arange(1, len(plain) + 1, device=plain.device)).amax())

    return call.context.derived(("last plain row", rows.shape[1]), find)


class KeyScale(_Scale):
    """Scores of some keys multiplied by a factor: keys times that factor, on any kernel.

    A step of decoding multiplies its row of scores instead, so that it does not copy the cache's keys. Where another
    stage comes later, it does copy them.
    """

    order = 0

    def changed(self, call: AttentionCall, later: Later, factors: torch.Tensor) -> Output:
        if call.query.shape[2] > 1 or later.stages:
            return super().changed(call, later, factors)
        (scores,) = call.row_scores(call.query)
        return call.attend_row(scores * factors[:, None, None].to(scores.dtype))

    def scaled(self, call: AttentionCall, factors: torch.Tensor) -> AttentionCall:
        return replace(call, key=call.key * factors.to(call.key.dtype))


class Values(_Scale):
    """Values of some keys multiplied by a factor."""

    order = 1

    def scaled(self, call: AttentionCall, factors: torch.Tensor) -> AttentionCall:
        return replace(call, value=call.value * factors.to(call.value.dtype))


@dataclass(frozen=True)
class GroupWeights(Stage):
    """Changes weights by groups of keys, depending on how much of a query's weight each group has.

    Let `n_jg` be how much key `j` belongs to group `g`, and let `a_ig` be computed from the weights of all groups,
    `sum_j w_ij * n_jg`::

        w_ij = w_ij * (1 + sum over groups g of a_ig * n_jg)

    The layer also attends to values times `n`, and to `n` itself, whose output is the weight of each group. So it runs
    on any kernel, whatever makes the weights. The weights are not normalised again: the changes decide what they add
    up to. A step of decoding changes its row of weights instead, so that it does not copy the cache's values. Beside a
    stage that comes later, it does copy them.

    Args:
        of_keys: Gives how much keys belong to groups, `(batch, num_keys, num_groups)`, float.
        changes: Makes `a` from the call and the weights of groups, `(batch, num_queries, heads, num_groups)`. It may
            cover only the first groups; the others are read, but not changed.
        rows: The queries whose weights it changes: "all", or "text" for those of text with a visual token before it.
        num_changed: How many groups `a` has. `None`: all.
    """

    order = 2
    done_by_one = "weights by group"

    of_keys: Callable[[AttentionCall], torch.Tensor]
    changes: Callable[[AttentionCall, torch.Tensor], torch.Tensor]
    rows: Rows = "all"
    num_changed: int | None = None

    def attend(self, call: AttentionCall, later: Later) -> Output:
        if self.rows == "text" and call.context.memory.is_empty:
            return later(call)
        if call.query.shape[2] == 1 and call.widened is None and not later.stages:
            (scores,) = call.row_scores(call.query)
            return call.attend_row(scores, lambda weights: self.changed(call, weights, call.value.dtype))
        value, belongs = call.value, self.of_keys(call).to(call.value.dtype)
        changed = belongs[..., : self.num_changed]
        parts = (value.unsqueeze(3) * changed[:, None, :, :, None]).flatten(3)
        seen = belongs.unsqueeze(1).expand(*value.shape[:3], -1)
        output, weights = later(replace(call, value=torch.cat([value, parts, seen], -1)))
        plain, of_groups, found = output.tensor_split([value.shape[-1], value.shape[-1] + parts.shape[-1]], -1)
        changes = self._acting(call, found).to(output.dtype)
        output = plain + (of_groups.unflatten(-1, (changed.shape[-1], -1)) * changes.unsqueeze(-1)).sum(-2)
        return output, None if weights is None else _changed(weights, changes.transpose(1, 2), changed)

    def changed(self, call: AttentionCall, weights: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights with these changes, `(batch, heads, num_queries, num_keys)` both, maybe rounded to a dtype."""
        if self.rows == "text" and call.context.memory.is_empty:
            return weights
        belongs = self.of_keys(call).to(weights.dtype)
        found = torch.bmm(weights.flatten(1, 2), belongs).view(*weights.shape[:3], -1)
        changes = self._acting(call, found.transpose(1, 2)).transpose(1, 2)
        return _changed(weights, changes, belongs[..., : self.num_changed], dtype)

    def _acting(self, call: AttentionCall, found: torch.Tensor) -> torch.Tensor:
        """The changes for the queries that it acts on, and 0 for others."""
        changes = self.changes(call, found)
        rows = text_rows(call) if self.rows == "text" else None
        return changes if rows is None else torch.where(rows[:, :, None, None], changes, 0)


def _changed(
    weights: torch.Tensor, changes: torch.Tensor, belongs: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Weights, `(batch, heads, num_queries, num_keys)`, as `GroupWeights` has them, given `a` and `n`."""
    of_groups, of_keys = changes.flatten(1, 2).to(weights.dtype), belongs.transpose(1, 2).to(weights.dtype)
    by_key = torch.bmm(of_groups, of_keys).view_as(weights)
    if dtype is None or torch.is_grad_enabled():
        return torch.addcmul(weights, weights, by_key)
    return torch.addcmul(weights, weights, by_key, out=torch.empty_like(weights, dtype=dtype))  # rounded at once


class Positions(Stage):
    """Scores made with other positions. Two equal ones count as one."""

    order = 3
    done_by_one = "positions"

    def acts_on(self, call: AttentionCall) -> bool:
        """Whether the positions of any pair of tokens differ from the model's."""
        return True

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, wider than those given, whose products are the scores."""
        raise NotImplementedError

    def reference(self, call: AttentionCall) -> torch.Tensor:
        """The scores in their plainest form, before scaling, `(batch, heads, num_queries, num_keys)`."""
        raise NotImplementedError

    def attend_alone(self, call: AttentionCall) -> Output:
        """What the attention function returns if no stage comes later, possibly in a faster way."""
        return replace(call, widened=self.widen(call)).run_kernel()

    def attend(self, call: AttentionCall, later: Later) -> Output:
        if not self.acts_on(call):
            return later(call)
        if call.position_bias is not None:
            raise NotImplementedError(
                f"{type(call.module).__name__} adds a bias to scores that depends on positions, but an active adapter "
                "changes positions only in the rotation of queries and keys. Take it off with unload()."
            )
        return later(replace(call, widened=self.widen(call))) if later.stages else self.attend_alone(call)


@dataclass(frozen=True)
class Bias(_ByKey):
    """Something added to the scores of some keys, after scaling: a few more channels, on any kernel.

    A step of decoding adds to its row of scores instead, so that it does not copy the cache's keys. Beside another
    stage that changes scores, it does copy them.

    The layers of an adapter share it: neither function may look at anything in which layers differ.

    Args:
        of_queries: Gives what the number of a key is multiplied by in each row, `(batch or 1, num_queries)`, float.
            `None`: 1.
    """

    order = 4

    of_queries: Callable[[AttentionCall], torch.Tensor] | None = None

    def factors(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes up the bias: `(batch or 1, num_queries)` and `(batch or 1, num_keys)`, in fp32 at least."""
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        of_keys = self.of_keys(call).to(dtype)
        if self.of_queries is None:
            return of_keys.new_ones(1, call.query.shape[2]), of_keys
        return self.of_queries(call).to(dtype), of_keys

    def attend_rows(self, call: AttentionCall, later: Later, rows: torch.Tensor | None) -> Output:
        if call.kwargs.get("softcap") is not None:
            raise NotImplementedError(
                f"{type(call.module).__name__} caps its scores (softcap), so that nothing can be added to them here."
            )
        of_queries, of_keys = self.factors(call)
        of_queries = of_queries if rows is None else torch.where(rows, of_queries, 0)
        if call.query.shape[2] == 1 and call.widened is None and not later.stages:
            (scores,) = call.row_scores(call.query)
            shared = "bias", self.of_keys, self.of_queries, self.rows, call.key.shape[2], of_keys.dtype
            bias = call.context.derived(shared, lambda: of_queries * of_keys)  # by all layers of an adapter
            return call.attend_row(scores + bias[:, None, None])
        query, key = call.scored_by
        asks, answers = in_two(of_queries, query.dtype), in_two(of_keys / call.scaling, key.dtype)
        # Each part of one meets both parts of the other.
        widened = _widened(query, asks.repeat_interleave(2, -1)), _widened(key, answers.repeat(1, 1, 2))
        return later(replace(call, widened=widened))


def in_two(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in a dtype, `(..., 2)`: as they are rounded, and what rounding leaves."""
    high = numbers.to(dtype)
    return torch.stack([high, (numbers - high).to(dtype)], -1)


def _widened(tensor: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Queries or keys with more channels, `(batch or 1, length, number)`, the same in all heads."""
    wide = torch.cat([tensor, channels.unsqueeze(1).expand(*tensor.shape[:3], -1)], -1)
    return F.pad(wide, (0, -wide.shape[-1] % CHANNELS))


@dataclass(frozen=True)
class Weights(Stage):
    """Whole rows of weights, made from the scores in another way than by softmax.

    Args:
        run: What the attention function returns, for scores of `call.scored_by` and values of the call.
        reference: Its plainest form: the weights, given scores after scaling and which keys are hidden,
            `(batch, heads, num_queries, num_keys)` both.
    """

    order = 5
    done_by_one = "weights"

    run: Callable[[AttentionCall], Output]
    reference: Callable[[AttentionCall, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def attend(self, call: AttentionCall, later: Later) -> Output:
        return self.run(call)


@dataclass
class LayerStages:
    """What the active adapters do to the attention of one layer during one forward.

    Attributes:
        stages: In the order in which they run.
        adapters: The adapter of each.
    """

    stages: list[Stage] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    def add(self, stage: Stage, adapter_name: str, layer_idx: int) -> None:
        """Add a stage of an adapter.

        Args:
            stage: The stage.
            adapter_name: The adapter.
            layer_idx: The layer, for the message.

        Raises:
            ValueError: Another adapter does what only one can do.
        """
        for other, other_name in zip(self.stages, self.adapters):
            if stage.done_by_one is None or other.order != stage.order:
                continue
            if isinstance(stage, Positions) and stage == other:
                return
            raise ValueError(
                f"The adapters {other_name!r} and {adapter_name!r} are active and both decide the "
                f"{stage.done_by_one} of attention in decoder layer {layer_idx}, which one adapter can do. Choose one "
                "with set_adapter, or give them different layers_to_transform."
            )
        # By name within a kind, so that sums and products are rounded alike in whatever order adapters come.
        place = 0
        for other, other_name in zip(self.stages, self.adapters):
            same_kind = other.order == stage.order
            place += other.order < stage.order or (same_kind and other_name <= adapter_name)
        self.stages.insert(place, stage)
        self.adapters.insert(place, adapter_name)

    def attend(self, call: AttentionCall) -> Output:
        """What the attention function returns."""
        return Later(tuple(self.stages))(call)


def text_rows(call: AttentionCall) -> torch.Tensor | None:
    """Which queries are those of text with a visual token before it, `(batch, num_queries)`, bool. `None`: all are."""
    context = call.context
    return None if context.only_text_after_images else context.text_after_images()[:, -call.query.shape[2] :]

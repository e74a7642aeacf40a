"""DIPE: the distance between text and image does not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from ..attention.call import AttentionCall, Output, records_gradients
from ..attention.reference import products
from ..attention.rotation import Tables, between, rotate, rotation_tables, unit
from ..attention.stages import Positions, Stage
from ..tokens.context import VisualContext
from ..tokens.families import VisionLanguageModel
from ..tokens.memory import Runs
from ..tokens.positions import VISUAL
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import is_int, setting


FARTHEST = 2**24  # positions: no context is longer


@dataclass
class DIPEConfig(AttentionMethod):
    """Configuration of DIPE, arXiv 2603.10863. It has no parameters.

    Scores between tokens of different modality are computed as if the query stood where its contiguous run of text, or
    of visual tokens, begins. So the distance from generated text to the image stays as it was at its first token.
    Pairs of one modality, and keys, keep their positions.

    The paper trains with DIPE from pretraining on. On a model that was trained without, it is a zero-shot change of
    positions: measure it. With `max_distance`, which is not the paper's, the query moves on with its run for so many
    positions and stays there: up to that distance the model is the base's, and beyond it the image stays as far away
    as the model has learnt to read.

    Args:
        max_distance: How many positions a query moves on from where its run begins, 0 or more. 0 or `None`: not at
            all, as in the paper.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all that rotate queries and
            keys by position.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "dipe"
    title: ClassVar[str] = "DIPE: the distance between text and image does not grow"
    summary: ClassVar[str] = (
        "Scores between tokens of different modality are computed as if the query stood where its run of text began. "
        "The paper trains with it from pretraining on; on a model that was trained without, it is a zero-shot change "
        "of positions."
    )
    paper: ClassVar[str] = "2603.10863"
    rotates: ClassVar[bool] = True

    max_distance: int | None = setting(
        0,
        "How many positions a query moves on from where its run begins; 0 or None: not at all, as in the paper.",
        valid=lambda value: value is None or (is_int(value) and 0 <= value <= FARTHEST),
        accepted=f"None or an integer from 0 to {FARTHEST}",
    )

    @classmethod
    def layers_on(cls, vlm: VisionLanguageModel) -> list[int]:
        """The layers that rotate queries and keys: not those of linear attention, nor some of Llama 4 and Cohere 2."""
        attentions = vlm.self_attentions
        layers = [layer_idx for layer_idx in super().layers_on(vlm) if vlm.rotates(attentions[layer_idx])]
        if vlm.rotary is None or not layers:
            raise ValueError(
                f"{type(vlm.model).__name__} has no layer that rotates queries and keys by position (a text model "
                "with rotary_emb), so DIPE has no distance to hold."
            )
        return layers

    def stages(self, layer: SteeredLayer) -> Stage:
        """Anchored positions for pairs of different modality."""
        rotary = cast(nn.Module, layer.rotary)  # layers_on made sure of it
        return AnchoredPositions(rotary, layer.layer_type, self.max_distance or 0)


@dataclass(frozen=True)
class AnchoredPositions(Positions):
    """The positions by which one layer makes its scores (arXiv 2603.10863).

    With `R` the rotation by position, `p` the positions, and the anchor of a token the position of the first token of
    the contiguous run of one modality that holds it, or up to `max_distance` more on each axis::

        a_i = min(p_i, anchor_i + max_distance)
        score(i, j) = R(p_i) q_i . R(p_j) k_j * scaling     if i and j are of one modality
                      R(a_i) q_i . R(p_j) k_j * scaling     otherwise

    Args:
        rotary: The text model's rotary embedding.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
        max_distance: How many positions a query moves on with its run.
    """

    rotary: nn.Module
    layer_type: str | None
    max_distance: int = 0

    def acts_on(self, call: AttentionCall) -> bool:
        context = call.context
        if context.memory.is_empty:  # with text alone there is one modality
            return False
        # A step of decoding does not wait for the device, and comes out as the base's to rounding alone.
        if not self.max_distance or context.seq_len == 1:
            return True
        return context.derived(("dipe reaches", self.max_distance), lambda: self._is_reached(context))

    def _is_reached(self, context: VisualContext) -> bool:
        """Whether a token of this forward is farther from its anchor. Waits for the device."""
        position_ids, anchors = context.noted()
        return bool((position_ids > anchors.unsqueeze(-1) + self.max_distance).any())

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
        """A single query: two rows of scores and a choice between them."""
        same, cross = call.row_scores(call.query, self.anchored_query(call))
        return call.attend_row(torch.where(self._of_one_modality(call), same, cross))

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
            reached = anchors.unsqueeze(-1) + self.max_distance
            if self.max_distance:
                reached = torch.minimum(position_ids, reached)
            return unit(rotation_tables(self.rotary, reached - position_ids, self.layer_type))

        tables = call.context.derived(("dipe", self.layer_type, self.max_distance), turn)
        return rotate(call.module, call.query, between(tables, -call.query.shape[2], None))


@dataclass(frozen=True)
class Run:
    """Tokens of one modality in a row.

    Attributes:
        start: The first of them.
        stop: The first behind them.
        is_visual: Their modality.
    """

    start: int
    stop: int
    is_visual: bool


def runs_of(runs: Runs, seq_len: int) -> list[Run] | None:
    """The runs of a batch in which all rows have the same; `None` if they have not. Waits for the device.

    Args:
        runs: Of rows that start with this forward and have no padding.
        seq_len: Their length.
    """
    if not bool(((runs.starts == runs.starts[:1]) & (runs.modalities == runs.modalities[:1])).all()):
        return None
    starts, modalities = runs.starts[0].tolist(), runs.modalities[0].tolist()
    stops = [*starts[1:], seq_len]
    return [Run(start, stop, modality == VISUAL) for start, stop, modality in zip(starts, stops, modalities)]


def attend_by_modality(
    query: torch.Tensor,
    anchored: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: list[Run],
    scaling: float,
) -> torch.Tensor:
    """Causal attention in which tokens of different modality meet by anchored queries.

    The tokens of one modality, put together, attend to each other as in plain causal attention. Each run then attends
    to the tokens of the other modality before it, all of which it sees. The sums of both softmaxes tell how to put
    their outputs together. So every pair is computed once, on a fused kernel.

    Args:
        query: Rotated by their positions, `(batch, heads, seq_len, head_dim)`, on a CPU.
        anchored: Rotated by their anchors, as `query`.
        key: `(batch, kv_heads, seq_len, head_dim)`.
        value: As `key`.
        runs: As `runs_of` gives them.
        scaling: What products are multiplied by.

    Returns:
        `(batch, heads, seq_len, head_dim)`, without gradients.
    """
    own: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    keys: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    for is_visual in {run.is_visual for run in runs}:
        own_query, own_key, own_value = (
            torch.cat([tensor[:, :, run.start : run.stop] for run in runs if run.is_visual == is_visual], 2)
            for tensor in (query, key, value)
        )
        own[is_visual] = _fused(own_query, own_key, own_value, is_causal=True, scaling=scaling)
        keys[is_visual] = own_key, own_value
    outputs = []
    seen = {False: 0, True: 0}  # tokens of each modality before the run
    for run in runs:
        here = slice(seen[run.is_visual], seen[run.is_visual] + run.stop - run.start)
        output, log_sum = (tensor[:, :, here] for tensor in own[run.is_visual])
        if others := seen[not run.is_visual]:
            other_key, other_value = (tensor[:, :, :others] for tensor in keys[not run.is_visual])
            rows = anchored[:, :, run.start : run.stop]
            other, other_log_sum = _fused(rows, other_key, other_value, is_causal=False, scaling=scaling)
            share = torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1)
            output = output.to(share.dtype).lerp(other.to(share.dtype), share).to(output.dtype)
        outputs.append(output)
        seen[run.is_visual] = here.stop
    return torch.cat(outputs, 2)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_dot_product_attention` runs on a CPU, which also knows the logarithm of each row's sum."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, scale=scaling)


DIPEModel = attention_tuner(DIPEConfig)

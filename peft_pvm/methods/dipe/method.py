"""DIPE: the distance between text and image does not grow."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...attention.call import AttentionCall, Output
from ...attention.reference import products
from ...attention.rotation import Tables, may_scale, rotate, rotation_tables, turned_by_matrix, unit
from ...attention.stages import Positions, Stage
from ...tokens.context import VisualContext
from ...tokens.families import VisionLanguageModel
from ...tuners.attention_method import AttentionMethod, SteeredLayer
from ...utils.checks import setting
from .parts import attend_by_masks, attend_by_modality, runs_to_join, sums_are_given


FARTHEST = 2**24  # positions: no context is longer
MOST_IMAGES = 64  # told apart: each takes a row of scores, or the width of a head


@dataclass
class DIPEConfig(AttentionMethod):
    """Configuration of DIPE, arXiv 2603.10863. It has no parameters.

    Scores between tokens of different modality are computed as if the query were at most `max_distance` positions
    after the place where its contiguous run of text, or of visual tokens, begins. Up to that distance the model is the
    base's. Beyond it, the image stays as far away from generated text as the model has learned to read. Pairs of one
    modality, and keys, keep their positions.

    The limit is ours. In the paper, the query is where its run begins (`max_distance=0`), and models are trained
    this way from pretraining on. On a model that was trained without DIPE, this may ruin the answers.

    In a conversation of several turns, each run of text begins farther away from the images of earlier turns. With
    `anchor="image"`, which is not the paper's either, text is at most `max_distance` after each image.

    Args:
        max_distance: How many positions a query moves on from where its run begins, 0 or more. 0 or `None`: not at
            all, as in the paper. `peft-pvm calibrate` measures which limit suits a model.
        anchor: Where the distance of a text query counts from. "run": the beginning of its run, as in the paper.
            "image": for the keys of each image, the beginning of the text after that image.
        image_gap: With `anchor="image"`, visual runs with fewer positions of text between them count as one image,
            whose parts keep their distances: tiles, rows, frames of a video, images that are given together. 1: each
            run is an image.
        max_images: With `anchor="image"`, how many images are told apart. Later ones count as one with the last of
            them. Each costs one row of scores in a step of decoding.
        axes: Which axes of positions are anchored, in a model whose positions have time, height and width: "all", as
            in the paper, "time" or "space". The other axes stay. In models with one axis, this axis is the time.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all that rotate queries and
            keys by position.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "dipe"
    title: ClassVar[str] = "DIPE: the distance between text and image does not grow"
    summary: ClassVar[str] = (
        "Scores between text and image are computed as if the query were at most `max_distance` positions after "
        "where its run of tokens began. With `max_distance` 0, this is the paper's form. The paper trains with it "
        "from pretraining on; on a model that was trained without it, it is a zero-shot change of positions."
    )
    paper: ClassVar[str] = "2603.10863"
    rotates: ClassVar[bool] = True

    when_absent: ClassVar[dict[str, Any]] = {"max_distance": 0}

    max_distance: int | None = setting(
        128,
        "How many positions a query moves on from where its run begins; 0 or None: not at all, as in the paper.",
        least=0,
        most=FARTHEST,
        whole=True,
        or_none=True,
    )
    anchor: Literal["run", "image"] = setting(
        "run",
        "Where the distance of a text query counts from: 'run', the beginning of its run, as in the paper; 'image', "
        "for the keys of each image, the beginning of the text after that image.",
        among=("run", "image"),
    )
    image_gap: int = setting(
        16,
        "With anchor='image', visual runs with fewer positions of text between them count as one image.",
        least=1,
        most=FARTHEST,
        whole=True,
    )
    max_images: int = setting(
        8,
        "With anchor='image', how many images are told apart; later ones count as one with the last of them.",
        least=1,
        most=MOST_IMAGES,
        whole=True,
    )

    axes: Literal["all", "time", "space"] = setting(
        "all",
        "Which axes of positions are anchored: 'all', as in the paper, 'time', or 'space' (height and width).",
        among=("all", "time", "space"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_distance = self.max_distance or 0

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
        by_image = (self.image_gap, self.max_images) if self.anchor == "image" else None
        return AnchoredPositions(rotary, layer.layer_type, cast(int, self.max_distance), by_image, self.axes)


@dataclass(frozen=True)
class AnchoredPositions(Positions):
    """The positions by which one layer makes its scores (arXiv 2603.10863).

    `R` is the rotation by position, and `p` are the positions. A token's anchor is the position of the first token of
    its run, the contiguous stretch of tokens of one modality that holds it. A query meets keys of the other modality
    at its anchor, or up to `max_distance` beyond it on each axis::

        a_i = min(p_i, anchor_i + max_distance)
        score(i, j) = R(p_i) q_i . R(p_j) k_j * scaling     if i and j are of one modality
                      R(a_i) q_i . R(p_j) k_j * scaling     otherwise

    By image, let `end_j` be the position at which the text after the last run of the image of `j` begins. A text token
    `i` then meets a visual token `j` with::

        a_ij = min(p_i, min(anchor_i, end_j) + max_distance)

    Args:
        rotary: The rotary embedding of the layer.
        layer_type: The layer's type, for a rotary embedding that tells types apart.
        max_distance: How many positions a query moves on with its run.
        by_image: What is an image, as `VisualContext.images` takes it. `None`: a query has one anchor.
        axes: Which axes are anchored: "all", "time" (the first) or "space" (the others).
    """

    rotary: nn.Module
    layer_type: str | None
    max_distance: int = 0
    by_image: tuple[int, int] | None = None
    axes: str = "all"

    def acts_on(self, call: AttentionCall) -> bool:
        context = call.context
        if context.memory.is_empty:  # without an image there is one modality
            return False
        # A step of decoding does not wait for the device. Within the limit, it equals the base's only up to rounding.
        if not self.max_distance or context.seq_len == 1:
            return True
        key = ("dipe reaches", self.max_distance, self.by_image, self.axes)
        return context.derived(key, lambda: self._is_reached(context))

    def _is_reached(self, context: VisualContext) -> bool:
        """Whether any token of this forward is farther than the limit from an anchor. Waits for the device."""
        position_ids, _ = context.noted()
        return bool((position_ids.unsqueeze(1) > self.reached(context, context.seq_len)).any())

    def reached(self, context: VisualContext, num_queries: int) -> torch.Tensor:
        """The positions that the last tokens of a forward have for the other modality: text one for each image.

        Returns:
            `(batch, num_images, num_queries, axes or 1)`, int64.
        """
        position_ids, anchors = (tensor[:, -num_queries:].unsqueeze(1) for tensor in context.noted())
        if self.by_image:
            _, ends = context.images(*self.by_image)
            of_run, anchors = anchors, torch.minimum(anchors, ends.unsqueeze(-1))
            if context.visual_mask is not None:  # visual tokens meet text as they do by run
                anchors = torch.where(context.visual_mask[:, -num_queries:].unsqueeze(1), of_run, anchors)
        reached = anchors.unsqueeze(-1) + self.max_distance
        if self.max_distance:
            reached = torch.minimum(position_ids, reached)
        if self.axes == "all":
            return reached
        num_axes = position_ids.shape[-1]
        if num_axes == 1:
            if self.axes == "space":
                raise NotImplementedError(
                    "DIPEConfig.axes is 'space', but the positions of this model have only one axis, the time. Take "
                    "the adapter off with unload(), or attach one with axes='all'."
                )
            return reached
        is_time = torch.arange(num_axes, device=reached.device) == 0
        return torch.where(is_time == (self.axes == "time"), reached, position_ids)

    def anchored_queries(self, call: AttentionCall) -> list[torch.Tensor]:
        """The rotated queries, rotated further from their own position to the one that they have for each image."""
        num_queries = call.query.shape[2]
        if num_queries == 1:
            return list(self.own_and_anchored(call)[:, :, 1:].split(1, 2))
        tables, num_images, _ = self._moved(call)
        return list(rotate(call.module, call.query.repeat(1, 1, num_images, 1), tables).split(num_queries, 2))

    def own_and_anchored(self, call: AttentionCall) -> torch.Tensor:
        """The query of a step of decoding, as it is and rotated further for each image, by one product.

        Returns:
            `(batch, heads, 1 + num_images, head_dim)`.
        """
        tables, number, key = self._moved(call)
        return turned_by_matrix(call, tables, key).to(call.query.dtype).unflatten(-1, (number, -1)).squeeze(2)

    def _moved(self, call: AttentionCall) -> tuple[Tables, int, tuple[Hashable, ...]]:
        """The rotations of queries for each image, their number and their key. A single query also stays as it is."""
        context, num_queries = call.context, call.query.shape[2]

        def turn() -> tuple[Tables, int]:
            moves = self.reached(context, num_queries) - context.noted()[0][:, -num_queries:].unsqueeze(1)
            if num_queries == 1:
                moves = F.pad(moves, (0, 0, 0, 0, 1, 0))
            tables = rotation_tables(self.rotary, moves.flatten(1, 2), self.layer_type)
            return unit(tables, may_scale(self.rotary, self.layer_type)), moves.shape[1]

        key = ("dipe", self.rotary, self.layer_type, self.max_distance, self.by_image, self.axes, num_queries)
        return *context.derived(key, turn), key

    def members(self, call: AttentionCall) -> list[torch.Tensor]:
        """Which keys are of each image, `(batch, num_keys)`, bool. Those of text are of none."""
        context, num_keys = call.context, call.key.shape[2]

        def find() -> list[torch.Tensor]:
            if not self.by_image:
                return [call.visual_keys]
            starts, _ = context.images(*self.by_image)
            image = call.keys.images(*self.by_image)
            return [call.visual_keys & (image == number) for number in range(starts.shape[1])]

        return context.derived(("dipe members", self.by_image, num_keys), find)

    def meeting(self, call: AttentionCall) -> list[torch.Tensor]:
        """The queries that meet keys of text, and those that meet the keys of each image."""
        query, anchored = call.query, self.anchored_queries(call)
        if call.context.visual_mask is None:
            return [query, *anchored]
        is_visual = call.visual_queries[:, None, :, None]
        return [
            torch.where(is_visual, anchored[0], query),
            *(torch.where(is_visual, query, turned) for turned in anchored),
        ]

    def reference(self, call: AttentionCall) -> torch.Tensor:
        return self._chosen(call, [products(query, call.key) for query in self.meeting(call)])

    def _chosen(self, call: AttentionCall, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """For each key, the scores of the queries that meet it."""
        chosen, *of_images = scores
        for of_image, members in zip(of_images, self.members(call)):
            chosen = torch.where(members[:, None, None], of_image, chosen)
        return chosen

    def attend_alone(self, call: AttentionCall) -> Output:
        if call.query.shape[2] == 1:  # a step of decoding: rows of scores, and a choice between them
            is_text = call.context.visual_mask is None
            queries = self.own_and_anchored(call) if is_text else torch.cat(self.meeting(call), 2)
            return call.attend_row(self._chosen(call, call.row_scores(queries)))
        if sums_are_given(call):
            output = attend_by_masks(call, self.anchored_queries(call), self.members(call))
            return output.transpose(1, 2).contiguous(), None
        runs = runs_to_join(call, self.by_image)
        if runs is None:
            return super().attend_alone(call)
        output = attend_by_modality(call.query, self.anchored_queries(call), call.key, call.value, runs, call.scaling)
        return output.transpose(1, 2).contiguous(), None

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of several times the width, whose products are the scores: exact on any kernel.

        Keys are split by what they are of, `[text or 0, first image or 0, ...]`; queries hold what each is met with.
        """
        of_none = call.visual_keys[:, None, :, None]
        of_images = [call.key.masked_fill(~members[:, None, :, None], 0) for members in self.members(call)]
        return torch.cat(self.meeting(call), -1), torch.cat([call.key.masked_fill(of_none, 0), *of_images], -1)

"""The remedies as one would write them at first, straight from the maths: what ours is compared with.

They compute the same numbers. PVM projects its memory at every step, for visual tokens as well, in eager attention;
DIPE makes both kinds of scores for all pairs and chooses by a mask; T-DRS holds whole matrices of scores.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..attention import AttentionCall, Steering
from ..context import CONTEXT, VisualContext
from ..dipe.anchored import AnchoredScoring
from ..families import find_vlm
from ..positions import causally_visible
from ..pvm.branch import Branch
from ..pvm.layer import PVMLayer
from ..tdrs.reweighting import Reweighting
from ..tdrs.weights import Floor, distance_boost, semantic_position


LOWEST = torch.finfo(torch.float32).min / 2


def make_naive(model: nn.Module) -> None:
    """Have the adapters on a model work naively, for good."""
    vlm = find_vlm(model)
    for layer in model.modules():
        if isinstance(layer, PVMLayer):
            for name, branches in layer.pvm_branches.items():
                layer.pvm_branches[name] = [NaiveBranch(**vars(branch)) for branch in branches]

    def replace_steering(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        for layer_idx, steering in context.steering.items():
            context.steering[layer_idx] = Steering(
                steering.scoring and NaiveScoring(cast(AnchoredScoring, steering.scoring)),
                steering.weighing and NaiveReweighting(cast(Reweighting, steering.weighing)),
            )

    vlm.text_model.register_forward_pre_hook(replace_steering, with_kwargs=True)


class NaiveBranch(Branch):
    """A branch that keeps nothing from one step to the next."""

    def update(self, hidden_states: torch.Tensor, context: VisualContext) -> torch.Tensor | None:
        """See `Branch.update`."""
        bank, shape = context.memory.embeddings, self.shape
        if context.memory.is_empty:
            return None
        slots = torch.arange(hidden_states.shape[1], device=hidden_states.device) + context.past_length
        sees = causally_visible(context.memory.slots, slots.expand(len(hidden_states), -1))
        text = self.input_norm(self.text_reducer(hidden_states))
        memory = self.vision_reducer(bank)
        groups = shape.num_heads // shape.num_key_value_heads
        query = self.q_norm(self._heads(self.q_proj(text)))
        key = self.k_norm(self._heads(self.k_proj(memory))).repeat_interleave(groups, 1)
        value = self._heads(self.v_proj(memory)).repeat_interleave(groups, 1)
        scores = (query @ key.transpose(2, 3) * shape.head_dim**-0.5).float().masked_fill(~sees[:, None], LOWEST)
        attended = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        attended = self.o_proj(attended)
        normed = self.post_attn_norm(attended)
        latent = attended + self.down_proj(ACT2FN[shape.hidden_act](self.gate_proj(normed)) * self.up_proj(normed))
        expanded = self.output_expander(latent)
        update = self.gate(F.rms_norm(expanded, expanded.shape[-1:], eps=shape.eps))
        reads = sees.any(-1)
        if context.visual_mask is not None:
            reads = reads & ~context.visual_mask
        return update * reads.unsqueeze(-1)

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


class NaiveScoring:
    """DIPE with two whole matrices of scores.

    Args:
        scoring: Ours, for the anchored queries.
    """

    def __init__(self, scoring: AnchoredScoring):
        self.scoring = scoring

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        """See `AnchoredScoring.attend`."""
        own, anchored = self._scores(call, call.query), self._scores(call, self.scoring.anchored_query(call))
        visual_keys = call.context.visual_keys(call.key.shape[2])
        is_inter = call.visual_queries[:, None, :, None] != visual_keys[:, None, None, :]
        scores = torch.where(is_inter, anchored, own)
        return _weigh(call, _hidden(call, scores).softmax(-1)), None

    def widen(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AnchoredScoring.widen`."""
        return self.scoring.widen(call)

    @staticmethod
    def _scores(call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        return _products(query, call.key).float() * call.scaling


class NaiveReweighting:
    """T-DRS with whole matrices.

    Args:
        reweighting: Ours, for the settings, and queries and keys without rotation.
    """

    def __init__(self, reweighting: Reweighting):
        self.reweighting = reweighting

    def attend(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Reweighting.attend`, in the form "weights" on all pairs."""
        config = self.reweighting.config
        if config.form != "weights" or config.pairs != "all":
            raise NotImplementedError("The naive T-DRS knows form='weights' on all pairs alone.")
        scores = _products(query, key).float() * call.scaling
        content_query, content_key = self.reweighting.contents(call)
        semantic = semantic_position(_products(content_query, content_key(slice(None))).float())
        raised = _hidden(call, scores + config.sd_strength * semantic)
        log_weights = raised.log_softmax(-1)
        visible = raised > LOWEST
        log_least = log_weights.masked_fill(~visible, torch.inf).amin(-1, keepdim=True)
        key_ranks, query_ranks = call.visibility.ranks()
        distance = (query_ranks.unsqueeze(-1) - key_ranks.unsqueeze(-2)).float()
        farthest = distance.masked_fill(~visible, 0).amax(-1, keepdim=True)
        dc_exponent, re_exponent = (
            Floor.of(floor).exponent(log_least) for floor in (config.dc_floor, config.re_floor)
        )
        strengths = config.dc_strength, config.re_strength
        boost = distance_boost(semantic, distance, farthest, dc_exponent, re_exponent, *strengths)
        weights = log_weights.exp() * (1 + boost)
        return _weigh(call, weights / weights.sum(-1, keepdim=True)), None


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)


def _hidden(call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
    visible = call.visibility.mask()
    return scores if visible is None else scores.masked_fill(~visible, LOWEST)


def _weigh(call: AttentionCall, weights: torch.Tensor) -> torch.Tensor:
    value = call.value.repeat_interleave(weights.shape[1] // call.value.shape[1], 1)
    return (weights.to(value.dtype) @ value).transpose(1, 2)

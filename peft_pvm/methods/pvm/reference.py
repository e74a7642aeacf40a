"""A PVM branch in its plainest form, straight from the maths (arXiv 2605.00814, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from ...tokens.context import VisualContext
from ...tokens.positions import causally_visible
from .branch import Branch


LOWEST = torch.finfo(torch.float32).min / 2


class PlainBranch(Branch):
    """A branch that keeps nothing from one step to the next, in eager attention, for visual tokens as well.

    Its memory is of embeddings, and a token sees the visual tokens before it.
    """

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

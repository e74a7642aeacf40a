"""Notes about a forward's logits on the KV cache, for methods whose next step depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import VisionLanguageModel
from ..tokens.memory import attach_memory, coverage_of, memory_of
from ..tokens.positions import EMPTY_SLOT, gather_rows
from ..utils.packages import caches_in


MOST_LOGITS = 2**24  # at once, of visual tokens
DEVIATION = 0.05  # of a model's logits from ours, as a share of the largest: half precision stays below
LAST = "last logits"


class LastLogits:
    """Has each forward that ends on a KV cache note there what the next one may ask for, in `VisualContext.notes`.

    - `"entropy"`: that of the next token's distribution, over the logarithm of the vocabulary's size, `(batch,)`.
    - `"grounding"`: with which probability some visual token gives the likeliest next token, `(batch,)`. It is missing
      where that is not known: the logits of some visual tokens were not seen.
    - `"prompt_length"`: how many tokens there were after the last forward of several tokens, `(batch,)`, int64.

    The logits at visual tokens are computed from the final hidden states, a few tokens at a time, since `generate` has
    the model compute only the last ones. A forward in which no adapter acts notes nothing.

    Args:
        vlm: The model's parts.
        acting: The adapters that act.
    """

    def __init__(self, vlm: VisionLanguageModel, acting: Callable[[], list[str]]):
        self.vlm, self.acting = vlm, acting
        # Before the tap puts the memory on the cache; and when the logits are there.
        read = vlm.text_model.register_forward_hook(self._read_hidden_states, with_kwargs=True, prepend=True)
        self._handles = [read, *(model.register_forward_hook(self._read_logits) for model in vlm.generators)]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _read_hidden_states(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        if context.refusal is not None or not self.acting() or not caches_in(output):
            return
        length, hidden_states = context.past_length + context.seq_len, output[0]
        prompt_length = context.notes.get("prompt_length")
        if prompt_length is None or context.seq_len > 1:
            prompt_length = torch.zeros(context.batch_size, dtype=torch.long, device=context.device) + length
        memory = context.memory
        notes = {**memory.notes, "prompt_length": prompt_length}
        # Some models leave all but the last token out of their last layers.
        if context.visual_positions is not None and hidden_states.shape[1] == context.seq_len:
            notes[LAST] = self.vlm.logits(hidden_states[:, -1:])[:, 0]
            memory = self._grounded(memory, hidden_states, context.visual_positions)
        context.memory = replace(memory, notes=notes)

    def _grounded(self, memory: Any, hidden_states: torch.Tensor, positions: torch.Tensor) -> Any:
        """The memory with what new visual tokens say, unless earlier ones were not seen."""
        known, grounding = memory.grounding[-1] if memory.grounding else (EMPTY_SLOT, None)
        earlier = memory.slots[:, : memory.slots.shape[1] - positions.shape[1]]
        if earlier.shape[1] and int(earlier.max()) != known:
            return memory
        at_once = max(MOST_LOGITS // (len(positions) * self.vlm.text_config.vocab_size), 1)
        for block in positions.to(hidden_states.device).split(at_once, 1):
            logits = self.vlm.logits(gather_rows(hidden_states, block))
            probabilities = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))
            found = torch.where(block.unsqueeze(-1) >= 0, probabilities, 0).amax(1)
            grounding = found if grounding is None else torch.maximum(grounding, found)
        return replace(memory, grounding=(*memory.grounding, (memory.last_slot, grounding)))

    @torch.no_grad()
    def _read_logits(self, module: nn.Module, args: tuple, output: Any) -> None:
        for cache in caches_in(output):
            memory = memory_of(cache)
            # No adapter acts, or an inner model has returned the same logits.
            if memory is None or "prompt_length" not in memory.notes or "entropy" in memory.notes:
                continue
            values = output.values() if isinstance(output, Mapping) else output
            logits = next(value for value in values if isinstance(value, torch.Tensor) and value.dim() == 3)[:, -1]
            notes = dict(memory.notes)
            _check(type(module).__name__, logits, notes.pop(LAST, None))
            probabilities = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))
            notes["entropy"] = torch.special.entr(probabilities).sum(-1) / math.log(logits.shape[-1])
            if memory.is_grounded and memory.grounding:
                likeliest = logits.argmax(-1, keepdim=True)
                notes["grounding"] = memory.grounding[-1][1].gather(1, likeliest).squeeze(1)
            attach_memory(cache, replace(memory, notes=notes), coverage_of(cache))


def _check(model: str, logits: torch.Tensor, ours: torch.Tensor | None) -> None:
    """Refuse a model whose logits are not what its head gives for the final hidden states."""
    if ours is not None and bool(((logits - ours).abs() > DEVIATION * ours.abs().max()).any()):
        raise NotImplementedError(
            f"{model} does more to the output of its head than peft_pvm knows, so that the logits at image tokens are "
            "not known, which the adapter needs. Take it off with unload(), or add a row for the model to LOGITS in "
            "peft_pvm/tokens/families.py."
        )

"""SAVAA: while an answer is written, scores of visual keys are raised, and more so after a risky token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..attention.call import AttentionCall
from ..attention.stages import KeyScale, Stage
from ..tokens.context import VisualContext
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import setting


@dataclass
class SAVAAConfig(AttentionMethod):
    """Raises the scores of visual keys while an answer is written, more so after a risky token, and lowers those of
    the prompt's text (arXiv 2602.13600, "Step-wise Adaptive Visual Attention Amplification").

    With `s_j` the score of key `j` for the query of a decoded token::

        s_j = s_j * (1 + (visual - 1) * r)      for visual keys
        s_j = s_j / text                        for keys of the prompt's text

        r = clip((alpha * H + (1 - alpha) * (1 - G)) / risk_scale, 0, 1)

    The softmax follows. `r` is the risk. `H` is the entropy of the last logits of the forward before, divided by the
    logarithm of the vocabulary's size. `G` is the largest probability that the logits at any
    visual token gave to the token that is the likeliest by these last logits. So it acts when a forward continues a KV
    cache by one token, as in `generate`. **A forward of several tokens is that of the base.** It has no parameters.

    Args:
        visual: What scores of visual keys are multiplied by at the highest risk, above 0.
        text: What scores of the prompt's text are divided by, above 0.
        alpha: The share of `H` in the risk, 0 to 1. The rest is the share of `1 - G`.
        risk_scale: The weighted sum of `H` and `1 - G` at which the risk reaches 1, above 0.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the authors' 4 to 14 of 36
            layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "savaa"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (4, 14, 36)
    multiplies_scores: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = True
    acts_in_forwards: ClassVar[bool] = False

    visual: float = setting(1.3, "What scores of visual keys are multiplied by at the highest risk, above 0.", above=0)
    text: float = setting(1.3, "What scores of the prompt's text are divided by, above 0.", above=0)
    alpha: float = setting(0.6, "The share of entropy in the risk, 0 to 1.", least=0, most=1)
    risk_scale: float = setting(0.6, "The weighted sum of H and 1 - G at which the risk reaches 1, above 0.", above=0)

    def acts_in(self, context: VisualContext) -> bool:
        """Whether this is a step of decoding after a forward that left its logits.

        Raises:
            NotImplementedError: The logits at visual tokens are not known.
        """
        if context.seq_len > 1 or context.memory.is_empty or "entropy" not in context.notes:
            return False
        if "grounding" not in context.notes:
            raise NotImplementedError(
                "SAVAA needs the logits at all image tokens of a conversation, but some of these were read before it "
                "was active, or the KV cache was cropped within an image, or the model computes its last layers "
                "only for the last token. Start with a new cache, or take the adapter off with unload()."
            )
        return True

    def stages(self, layer: SteeredLayer) -> Stage:
        """Scaled keys."""
        return KeyScale(self.of_keys, rows="text")

    def of_keys(self, call: AttentionCall) -> torch.Tensor:
        """What the scores of each key are multiplied by, `(batch, num_keys)`."""
        context, num_keys, dtype = call.context, call.key.shape[2], call.key.dtype

        def make() -> torch.Tensor:
            notes = context.notes
            risk = self.alpha * notes["entropy"] + (1 - self.alpha) * (1 - notes["grounding"])
            visual = 1 + (self.visual - 1) * (risk / self.risk_scale).clamp(0, 1)
            is_prompt = call.keys.slots < notes["prompt_length"].unsqueeze(1)
            factors = torch.where(is_prompt, 1 / self.text, 1.0).to(visual.dtype)
            return torch.where(call.visual_keys, visual.unsqueeze(1), factors).to(dtype)

        settings = self.visual, self.text, self.alpha, self.risk_scale
        return context.derived(("savaa", settings, num_keys, dtype), make)


SAVAAModel = attention_tuner(SAVAAConfig)

"""M3ID: tokens that the image makes likelier are raised, and raised more as the answer grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..tuners.in_generate import Prompt, text_alone
from ..tuners.logits_method import LogitsMethod, logits_tuner
from ..utils.checks import setting


STRONGEST = 50.0  # in the exponent: the contrast is then all that counts, and still far from the largest fp32


@dataclass
class M3IDConfig(LogitsMethod):
    """Raises tokens that the image makes likelier, and raises them more as the answer grows (arXiv 2403.14003,
    "Multi-Modal Hallucination Control by Visual Information Grounding").

    With `l_c` the log-probabilities of the `t`-th token of the answer, `l_u` those without the image, and `t` from 1::

        l = l_c + (exp(rate * t) - 1) * (l_c - l_u)      where the likeliest token has less than `threshold`
        l = l_c                                          elsewhere

    It acts only in `generate`, greedy or sampling: the model reads the text without its images as well, and runs
    twice for each token. A plain forward is that of the base. It has no parameters.

    Args:
        rate: How fast the contrast grows with each token, 0 or more.
        threshold: Nothing changes if the likeliest token has at least this probability. Above 0.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "m3id"

    rate: float = setting(0.02, "How fast the contrast grows with each token, 0 or more.", least=0)
    threshold: float = setting(
        0.3, "Nothing changes if the likeliest token has at least this probability. Above 0.", above=0
    )

    def second_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt without its images."""
        return text_alone(prompt, self.title)

    def scores(self, logits: torch.Tensor, other: torch.Tensor, num_generated: int) -> torch.Tensor:
        """The formula, but for a number that all tokens of a row have in common, which no softmax sees."""
        with_image, without = logits.log_softmax(-1), other.log_softmax(-1)
        strength = math.expm1(min(self.rate * (num_generated + 1), STRONGEST))
        acts = (with_image.amax(-1, keepdim=True) < math.log(self.threshold)) & logits.isfinite()
        return torch.where(acts, logits + strength * (with_image - without), logits)


M3IDModel = logits_tuner(M3IDConfig)

"""A method that changes the scores of `generate` is one class: its configuration, which says what a second run of the
model reads, and how scores are made from the logits of both runs.

While an adapter acts, `generate` runs the model twice for each token. A plain forward is that of the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import GenerationMode

from .branch import Branch
from .in_generate import GenerateHandle, InGenerate, Prompt, Run
from .without_parameters import (
    LayerWithoutParameters,
    TunerWithoutParameters,
    WithoutParameters,
    make_tuner,
    no_weights,
)


TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class LogitsMethod(InGenerate, WithoutParameters):
    """Base of the methods that contrast the logits of two runs in `generate`: a subclass is a whole method.

    A subclass has a name, `method`, fields made by `setting`, `second_prompt` and `scores`. Rows of the batch without
    an image do not change by a bit. See `WithoutParameters` for what its docstring says.

    Args:
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    init_weights: bool = no_weights()

    def second_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """What the second run reads: keyword arguments for `generate`, without settings and without a cache.

        Args:
            prompt: What the first run reads.

        Raises:
            NotImplementedError: It cannot be made.
        """
        raise NotImplementedError

    def scores(self, logits: torch.Tensor, other: torch.Tensor, num_generated: int) -> torch.Tensor:
        """The scores of the next token.

        Args:
            logits: Of the first run, `(batch, vocab_size)`, fp32.
            other: Of the second run, the same.
            num_generated: How many tokens this call of `generate` has added to the prompt.

        Returns:
            `(batch, vocab_size)`.
        """
        raise NotImplementedError

    def check_settings(self, settings: GenerationConfig, assistant: Any) -> None:
        """Check that `generate` goes token by token."""
        mode = settings.get_generation_mode(assistant)
        if mode not in TOKEN_BY_TOKEN:
            raise NotImplementedError(
                f"{self.title} changes the scores of one token after another, greedily or by sampling, which "
                f"{mode.value} does not do. Use num_beams=1, without assistant_model and prompt_lookup_num_tokens."
            )

    def begin(self, run: Run, prompt: Prompt, settings: GenerationConfig) -> list[LogitsProcessor]:
        """Have the second run read its prompt. Rows of the batch without an image are not changed."""
        branch = Branch(run.vlm.model, self.second_prompt(prompt), settings)
        has_image = prompt.visual.any(1).repeat_interleave(settings.num_return_sequences)
        return [SecondRunProcessor(self, branch, has_image, prompt.visual.shape[1])]

    @classmethod
    def tuner(cls) -> type[LogitsMethodTuner]:
        return logits_tuner(cls)


class LogitsMethodLayer(LayerWithoutParameters):
    """A child of the text model that has `generate` run the model a second time."""

    method_cls: ClassVar[type[LogitsMethod]]

    def new_hooks(self) -> list[Any]:
        return [GenerateHandle(self)]


class LogitsMethodTuner(TunerWithoutParameters):
    """Base of the tuners that `logits_tuner` makes."""

    method_cls: ClassVar[type[LogitsMethod]]

    def resolve(self, config: Any) -> Any:
        self.method_cls.check_generates(self.vlm, self.method_cls.tuner_name())
        return config


def logits_tuner(method_cls: type[LogitsMethod]) -> type[LogitsMethodTuner]:
    """The tuner of a method: the same class each time it is asked for."""
    return make_tuner(method_cls, LogitsMethodTuner, LogitsMethodLayer, "change the scores of generate")


class SecondRunProcessor(LogitsProcessor):
    """Changes the scores of each token by what a second run gives for it.

    Args:
        config: The method.
        branch: The second run, which has read its prompt.
        has_image: Which rows of the batch have an image, `(batch,)`, bool. The others are not changed.
        prompt_length: How many tokens the first run has read.
    """

    def __init__(self, config: LogitsMethod, branch: Branch, has_image: torch.Tensor, prompt_length: int):
        self.config, self.branch, self.has_image = config, branch, has_image
        self.prompt_length = self.expected = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        num_tokens = input_ids.shape[1]
        if num_tokens != self.expected:
            raise NotImplementedError(
                f"{self.config.title} follows generate one token at a time, but is asked about {num_tokens} tokens "
                f"where {self.expected} come next. Do not use assisted decoding or a decoding loop that goes back."
            )
        if num_tokens > self.prompt_length:
            self.branch.step(input_ids[:, -1:])
        self.expected += 1
        changed = self.config.scores(scores, self.branch.logits, num_tokens - self.prompt_length)
        return torch.where(self.has_image[:, None], changed, scores)

"""A second run of a model beside its `generate`: with another prompt, but the same new tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..utils.packages import next_inputs


class Branch:
    """The second run, on a cache of its own. Adapters act in it as in the first.

    `generate` prepares it, as it does any prompt, and is then given a decoding method that only reads the prompt. The
    steps are those of `generate`'s own loop.

    Args:
        model: A transformers model.
        prompt: Its keyword arguments for `generate`, without settings.
        settings: The settings of the first run, as `generate` has completed them.

    Attributes:
        logits: Of the next token, `(batch * num_return_sequences, vocab_size)`, fp32.
    """

    logits: torch.Tensor
    _input_ids: torch.Tensor
    _inputs: dict[str, Any]  # all others

    def __init__(self, model: Any, prompt: Mapping[str, Any], settings: GenerationConfig):
        self.model = model
        settings = copy.deepcopy(settings)
        settings.stop_strings = None  # which need a tokenizer
        if settings.max_new_tokens is not None:
            settings.max_length = None
        if settings.min_new_tokens is not None:
            settings.min_length = 0
        with undisturbed(model):
            type(model).generate(model, **prompt, generation_config=settings, custom_generate=self._read_prompt)

    def step(self, token_ids: torch.Tensor) -> None:
        """Read the token that the first run has chosen.

        Args:
            token_ids: `(batch * num_return_sequences, 1)`, int64.
        """
        self._input_ids = torch.cat([self._input_ids, token_ids], 1)
        self._forward(next_sequence_length=1 if self._inputs.get("use_cache", True) else None)

    def _read_prompt(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> torch.Tensor:
        self._input_ids, self._inputs = input_ids, inputs
        self._forward(is_first_iteration=True)
        return input_ids

    def _forward(self, **how: Any) -> None:
        inputs = self.model.prepare_inputs_for_generation(self._input_ids, **how, **self._inputs)
        output = self.model(**inputs, return_dict=True)
        self._inputs = next_inputs(self.model, self._inputs, output)
        self.logits = output.logits[:, -1].to(self._input_ids.device, torch.float32, copy=True)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back, at the end of a block, what prompts leave on a model's modules.

    Qwen's models keep by how much the positions of the answer are shifted. Steps are given positions, and leave it.
    """
    rope_deltas = {module: module.rope_deltas for module in model.modules() if "rope_deltas" in vars(module)}
    try:
        yield
    finally:
        for module, deltas in rope_deltas.items():
            module.rope_deltas = deltas

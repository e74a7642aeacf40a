"""What a row of the table of architectures says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as T
from tiny_vlms import TinyVLM

from peft_pvm.methods import METHODS
from peft_pvm.tuners.logits_method import LogitsMethod


NOTHING_ROTATES = {
    "dipe": "has no layer that rotates queries and keys by position",
    "log_bias": "The text model did not call its rotary_emb",  # which is how positions are known
}
WITHOUT_A_STATE = {"var": "have several residual streams"}  # where sinks could be found
# `generate` of the model hands embeddings to that of an inner one, or says where images are by a mask.
WITHOUT_TOKENS = {
    **dict.fromkeys(("logits", "vista"), "does not give its language model the tokens that images stand for"),
    "cai": "the input embeddings of text are not known",
}
SEVERAL_STREAMS = "its residual is several streams"
LOGITS = tuple(row.config.method for row in METHODS if issubclass(row.config, LogitsMethod))
FFN = tuple(row.config.method for row in METHODS if row.changes == "FFN")


class AnyVLM(TinyVLM):
    """A model that not every supported transformers has, and whose norms have weights as a trained model's have."""

    def build_anyway(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        if not self.is_there:
            pytest.skip(f"transformers {T.__version__} has no {self.model_class}")
        model = super().build_anyway(seed, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                    parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator, device="cpu"))
        return model


@dataclass(frozen=True)
class Architecture:
    """One type of model that takes images and text, or a form of it.

    Attributes:
        known_as: The models that people know it by, as `docs/models.md` lists them.
        tiny: A tiny model of it.
        refused: By method, the words of the refusal that say why. "pvm-hidden-states" is PVM with
            `memory_source="hidden_states"`; "FFN" stands for all at the FFN, "attention" for all that change
            attention, "logits" for all that act in `generate` alone, "all" for all.
        differs: What does not hold of the model itself, without any adapter, and why: "cached" (a cache changes
            nothing) or "padded" (rows of a batch are what they are alone).
        sum_reader: The submodule of a decoder layer that reads the residual stream after the FFN, where the layer
            returns something else.
        streams: Of a decoder layer with several residual streams, the module that reads their mixture for the FFN, and
            the one that returns what is spread over them.
    """

    known_as: str
    tiny: TinyVLM
    refused: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    sum_reader: str | None = None
    streams: tuple[str, str] | None = None

    def refusal(self, method: str) -> str | None:
        """Why a method does not work on it; `None`: it does."""
        method_itself = method.removesuffix("-hidden-states")
        group = "FFN" if method_itself in FFN else "logits" if method in LOGITS else "attention"
        return self.refused.get(method, self.refused.get(group, self.refused.get("all")))

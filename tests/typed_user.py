"""The package as a user's type checker sees it. `make quality` checks this by mypy's strict rules; it is never run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import assert_type

import torch
from peft import PeftConfig
from PIL import Image

import peft_pvm
from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig, attached
from peft_pvm.probe import ProbeResult, build_inputs, probe
from peft_pvm.training import TextBetween, hidden_image


def configurations() -> list[PeftConfig]:
    config = PVMConfig(r=512, layers_to_transform="strided")
    assert_type(config.r, int)
    assert_type(DIPEConfig(max_distance=24).max_distance, int | None)
    DIPEConfig(anchor="text")  # type: ignore[arg-type]
    return [config, DIPEConfig(), TDRSConfig()]


def adapters(model: torch.nn.Linear, folder: Path) -> None:
    assert_type(peft_pvm.load_adapters(model, [str(folder)]), list[str])
    assert_type(peft_pvm.save_adapter(model, "default", folder), Path)
    peft_pvm.add_adapters(model, {"pvm": PVMConfig()})
    with attached(model, DIPEConfig(), TDRSConfig()) as same:
        assert_type(same, torch.nn.Linear)
    attached(model, "dipe")  # type: ignore[arg-type]


def measuring(model: torch.nn.Module, processor: object, image: Image.Image) -> ProbeResult:
    inputs = build_inputs(processor, image, "What is on the sign?")
    assert_type(inputs, dict[str, torch.Tensor])
    result = probe(model, inputs, max_new_tokens=32)
    result.save("report")
    return result


def training(model: torch.nn.Module, tokenizer: object) -> AbstractContextManager[None]:
    TextBetween(tokenizer, max_tokens=64, lengths="long")  # type: ignore[arg-type]
    return hidden_image(model)

"""What is compared on the real base: each remedy, its controls and their combinations, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from peft_pvm.demo.mosaic import Batch
from peft_pvm.demo.questions import Questions, Turn
from peft_pvm.demo.train import step_generator
from peft_pvm.methods.cai import CAIConfig
from peft_pvm.methods.dipe import DIPEConfig
from peft_pvm.methods.hgai import HGAIConfig
from peft_pvm.methods.log_bias import LogBiasConfig
from peft_pvm.methods.memvr import MemVRConfig
from peft_pvm.methods.pai import PAIConfig
from peft_pvm.methods.pvm import PVMConfig
from peft_pvm.methods.tdrs import TDRSConfig
from peft_pvm.methods.vaf import VAFConfig

from ..controls import add_mlp_branches
from ..methods import Configs, Method
from .training import draw_turns


LAYERS = [20, 23, 26]  # what `peft-pvm layers` proposes
STRIDED = [7, 13, 20]  # what "strided" means for thirty layers
PVM_PARAMETERS = 2_176_515  # of PVMConfig(r=192) there; the controls come as near as they can
UNTRAINED = ("dipe", "t-drs", "vaf", "pai", "hgai", "cai", "memvr")  # as their papers have them
SHORT = 64  # tokens: the longest texts of a turn that the base was trained with
LONG = 1024


@dataclass(frozen=True)
class Training:
    """How a method is trained on the real base: steps of eight chats.

    Attributes:
        steps: Optimizer steps in all.
        hidden_steps: The first of them, in which the images are hidden, with texts of at most 64 tokens.
        max_text: The most tokens of text of a turn in the other steps. With one turn, every length is as likely.
        several: Chats are of all kinds, as the base's were: a third with one picture, a third with several, a third
            with several turns, every fourth text telling of other pictures. Otherwise one picture, one turn.
        on_text: Whether text and questions count like the answers, so that a method learns to leave them as they are.
        learning_rate: Its peak.
        faster_gates: The gates' learning rate over that of the rest.
        rows: Chats in a step.
    """

    steps: int
    hidden_steps: int = 0
    max_text: int = SHORT
    several: bool = False
    on_text: bool = False
    learning_rate: float = 2e-3
    faster_gates: float = 1.0
    rows: int = 8

    def draw(self, questions: Questions, seed: int, step: int) -> Batch:
        """The batch of a step."""
        generator = step_generator(seed, step)
        most = SHORT if step < self.hidden_steps else self.max_text
        text = int(torch.randint(most + 1, (), generator=generator))
        turns = draw_turns(most, generator) if self.several else [Turn(text_tokens=text)]
        return questions.draw("train", self.rows, turns, generator, augmented=True, on_text=self.on_text)


HIDDEN = Training(steps=400, hidden_steps=400)
PLAIN = Training(steps=100, max_text=LONG)  # about as many tokens as HIDDEN
LORA = Training(steps=100, max_text=LONG, learning_rate=1e-3)
SHORT_LORA = Training(steps=100, several=True, learning_rate=1e-3)  # with DIPE and without


@dataclass(frozen=True)
class RealMethod(Method):
    """One row of the results on the real base.

    Attributes:
        training: How it is trained, if it has parameters and no `weights_of`.
    """

    training: Training | None = None


def _pvm(**fields: Any) -> Callable[[], Configs]:
    return lambda: {"pvm": PVMConfig(**{"r": 192, "layers_to_transform": LAYERS, "init_gate": 1.0, **fields})}


def _dipe(max_distance: int, **fields: Any) -> Callable[[], Configs]:
    return lambda: {"dipe": DIPEConfig(max_distance=max_distance, **fields)}


def _lora() -> Configs:
    """A LoRA of PVM's size, on the attention of the language model."""
    target_modules = r".*language_model.*\.(q|k|v|o)_proj"
    return {"lora": LoraConfig(r=19, lora_alpha=38, target_modules=target_modules)}


def _tdrs(**fields: Any) -> Callable[[], Configs]:
    return lambda: {"t-drs": TDRSConfig(**fields)}


def _add_mlp_branches(model: nn.Module) -> None:
    add_mlp_branches(model, LAYERS, r=192, num_parameters=PVM_PARAMETERS)


METHODS: dict[str, RealMethod] = {
    "base": RealMethod("base"),
    "dipe": RealMethod("DIPE as published", _dipe(0)),
    **{f"dipe-{limit}": RealMethod(f"DIPE, limit {limit}", _dipe(limit)) for limit in (16, 32, 64, 128, 256, 512)},
    "dipe-128-image": RealMethod("DIPE, limit 128 from each image", _dipe(128, anchor="image")),
    "t-drs": RealMethod("T-DRS", _tdrs()),
    "t-drs-sd": RealMethod("T-DRS, SD alone", _tdrs(dc_strength=0.0, re_strength=0.0)),
    "t-drs-dc": RealMethod("T-DRS, DC alone", _tdrs(sd_strength=0.0, re_strength=0.0)),
    "t-drs-re": RealMethod("T-DRS, re alone", _tdrs(sd_strength=0.0, dc_strength=0.0)),
    "t-drs-literal": RealMethod("T-DRS, the sum read literally", _tdrs(form="literal")),
    "t-drs-inter": RealMethod("T-DRS, pairs of text and image alone", _tdrs(pairs="inter")),
    "vaf": RealMethod("VAF", lambda: {"vaf": VAFConfig()}),
    "pai": RealMethod("PAI", lambda: {"pai": PAIConfig()}),
    "hgai": RealMethod("HGAI", lambda: {"hgai": HGAIConfig()}),
    "cai": RealMethod("CAI", lambda: {"cai": CAIConfig()}),
    "memvr": RealMethod("MemVR", lambda: {"memvr": MemVRConfig()}),
    "log-bias": RealMethod("Log-bias", lambda: {"log-bias": LogBiasConfig()}),
    "lora": RealMethod("LoRA", _lora, training=LORA),
    "lora-short": RealMethod(
        "LoRA, short texts",
        _lora,
        training=SHORT_LORA,
    ),
    "lora-several": RealMethod(
        "LoRA, several pictures and turns",
        _lora,
        training=Training(steps=200, max_text=LONG, several=True, learning_rate=1e-3),
    ),
    "mlp": RealMethod(
        "MLP branch",
        add_branches=_add_mlp_branches,
        training=Training(steps=100, max_text=LONG, faster_gates=10.0),
    ),
    "pvm": RealMethod("PVM", _pvm(), training=HIDDEN),
    "pvm-on-text": RealMethod(
        "PVM, trained on text too", _pvm(), training=Training(steps=400, hidden_steps=400, on_text=True)
    ),
    "pvm-plain": RealMethod("PVM, image never hidden", _pvm(), training=PLAIN),
    "pvm-several": RealMethod(
        "PVM, several pictures and turns",
        _pvm(),
        training=Training(steps=400, hidden_steps=400, several=True),
    ),
    "pvm-several-long": RealMethod(
        "PVM, several pictures and turns, 800 steps",
        _pvm(),
        training=Training(steps=800, hidden_steps=800, several=True),
    ),
    "pvm-hidden-states": RealMethod(
        "PVM, memory of hidden states", _pvm(memory_source="hidden_states"), training=HIDDEN
    ),
    "pvm-strided": RealMethod("PVM, layers 7, 13, 20", _pvm(layers_to_transform=STRIDED), training=HIDDEN),
    "pvm+dipe-128": RealMethod("PVM + DIPE, limit 128", lambda: {**_pvm()(), **_dipe(128)()}, weights_of="pvm"),
    "pvm-several+dipe-128-image": RealMethod(
        "PVM, several pictures and turns + DIPE, limit 128 from each image",
        lambda: {**_pvm()(), **_dipe(128, anchor="image")()},
        weights_of="pvm-several",
    ),
    "dipe+lora": RealMethod(
        "DIPE as published + LoRA trained under it",
        lambda: {**_dipe(0)(), **_lora()},
        training=SHORT_LORA,
    ),
    "dipe-image+lora": RealMethod(
        "DIPE from each image, without limit + LoRA trained under it",
        lambda: {**_dipe(0, anchor="image")(), **_lora()},
        training=SHORT_LORA,
    ),
}

"""The base of all experiments: a fresh tiny model, its training, and the fingerprint by which results name it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from peft_pvm.demo.mosaic import Batch
from peft_pvm.demo.tiny_vlm import SHIPPED, TRAINED_DISTANCE, tiny_vlm_config
from peft_pvm.demo.train import draw_step, fit, step_generator


def new_tiny_vlm(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """An untrained tiny model.

    Args:
        seed: Decides the weights; torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(tiny_vlm_config()).eval()


def train_base(model: nn.Module, steps: int = 2000, learning_rate: float = 2e-3, seed: int = 0) -> None:
    """Teach all of a fresh tiny model the task, with at most 24 bytes of text between the mosaics and the dialogue.

    Args:
        model: The model; it is trained in place and left in eval mode.
        steps: Optimizer steps.
        learning_rate: Its peak.
        seed: Decides the questions.
    """

    def draw(step: int) -> Batch:
        generator = step_generator(seed, step)
        return draw_step(step, int(torch.randint(TRAINED_DISTANCE + 1, (), generator=generator)), generator)

    groups = [{"params": list(model.parameters()), "lr": learning_rate, "weight_decay": 0.05}]
    fit(model, groups, draw, steps, "Training the base")


def fingerprint(path: str | os.PathLike = SHIPPED) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a model's file: results say by it what they were made with."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]

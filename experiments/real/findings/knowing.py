"""What the real base knows: what a linear probe reads from its residual stream, and how well it predicts text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from peft_pvm.demo.mosaic import NUM_CELLS, Split, draw_pictures
from peft_pvm.demo.questions import START_OF_TURN, Turn
from peft_pvm.demo.train import step_generator
from peft_pvm.probe.observers import layers_observed
from peft_pvm.tokens.families import find_vlm
from peft_pvm.training.hidden import images_hidden
from peft_pvm.tuners.active import attached
from peft_pvm.tuners.loading import load_adapters
from peft_pvm.tuners.names import separate

from ...pvm_limits import probe_accuracy
from ..evaluation import hash_of_folder
from ..language_model import load_language_model
from ..methods import METHODS, UNTRAINED
from .study import Cell, Study


FITTED_ON = 4  # times as many rows as the probes are tested on
PROBED = (("in sight", 0), ("hidden", 0), ("in sight", 1024))  # the image, and tokens of text in between
WINDOW = 1024  # tokens of text
CONDITIONS = ALONE, BEHIND_IMAGE = "alone", "behind an image"
LANGUAGE_MODEL = "language model"  # the case of what the base was made from
READERS = ("base", "dipe-128", *UNTRAINED, "log-bias")  # methods


@dataclass(frozen=True)
class Streams:
    """The residual stream where the model is about to write a digit.

    Attributes:
        layers: What each decoder layer gives, `(layers, digits, hidden_size)`, fp32.
        cells: Which cell each digit is in, `(digits,)`.
        digits: The digits, as tokens, `(digits,)`.
    """

    layers: torch.Tensor
    cells: torch.Tensor
    digits: torch.Tensor


def readable(study: Study) -> None:
    """Linear probes of the residual stream, fitted on the split "train": the asked cell, and the digit in it."""
    for image, text_tokens in PROBED:
        study.measured(f"image {image}", text_tokens, partial(_probe, study, text_tokens, image == "hidden"))


def _probe(study: Study, text_tokens: int, hidden: bool) -> Cell:
    fitted = streams(study, "train", FITTED_ON * study.rows, text_tokens, hidden)
    tested = streams(study, study.split, study.rows, text_tokens, hidden)
    layers = list(zip(fitted.layers, tested.layers))
    return {
        "cell by layer": [round(probe_accuracy(old, fitted.cells, new, tested.cells), 4) for old, new in layers],
        "digit by layer": [round(probe_accuracy(old, fitted.digits, new, tested.digits), 4) for old, new in layers],
    }


@torch.no_grad()
def streams(study: Study, split: Split, rows: int, text_tokens: int, hidden: bool) -> Streams:
    """Let the base read rows, and keep its residual stream at the tokens that predict digits.

    Args:
        study: Its base is read.
        split: Where digits and text come from.
        rows: Rows of nine digits.
        text_tokens: Tokens of text between image and question.
        hidden: Whether no text token can attend to the image.
    """
    vlm = find_vlm(study.model)
    kept, cells, digits = [], [], []
    for row in range(rows):
        batch = study.draw(row, text_tokens, split)
        asked = batch.inputs["logits_to_keep"]
        num_queries = batch.inputs["input_ids"].shape[1] - int(asked[0])
        with (
            image_hidden(study.model) if hidden else contextlib.nullcontext(),
            layers_observed(vlm, num_queries) as outputs,
        ):
            study.model(**batch.inputs, use_cache=False)
        kept.append(torch.cat(outputs)[:, asked - asked[0]].float())
        cells.append(study.cells_of(batch))
        digits.append(batch.targets[0])
    return Streams(torch.cat(kept, 1), torch.cat(cells), torch.cat(digits))


@contextlib.contextmanager
def image_hidden(model: nn.Module) -> Iterator[None]:
    """Hide images from text in the forwards of a block, without gradients.

    Images are hidden only in training, so the model trains, but nothing of it requires gradients. The real base has
    no dropout.

    Args:
        model: The base, in eval mode.
    """
    model.requires_grad_(False).train()
    try:
        with images_hidden(find_vlm(model)), torch.enable_grad():
            yield
    finally:
        model.eval()


def text(study: Study) -> None:
    """The loss of held-out text, alone and after an image, with methods and adapters. Rows are windows of text.

    With the GGUF file, also that of the language model which the base was made from, only on text.
    """
    for name in READERS:
        with attached(study.model, *METHODS[name].adapters().values()):
            for condition in CONDITIONS:
                study.measured(name, condition, partial(_read, study, lambda: study.model, condition))
    for together in study.adapters:
        folders = separate(together)
        # Another adapter may have the same name: a hash tells them apart.
        names, hashes = ("+".join(map(of, folders)) for of in (lambda folder: Path(folder).name, hash_of_folder))
        name = f"{names} ({hashes})"
        model = partial(_with_adapters, study, folders)
        for condition in CONDITIONS:
            study.measured(name, condition, partial(_read, study, model, condition))
    if study.gguf is not None:
        gguf = study.gguf
        study.measured(LANGUAGE_MODEL, ALONE, partial(_read, study, lambda: load_language_model(gguf).model, ALONE))


def _with_adapters(study: Study, folders: list[str]) -> nn.Module:
    model = study.fresh_model()
    load_adapters(model, folders)
    return model


def _read(study: Study, model: Callable[[], nn.Module], condition: str) -> Cell:
    return {"loss": text_losses(model(), study, condition == BEHIND_IMAGE)}


@torch.no_grad()
def text_losses(model: nn.Module, study: Study, behind_image: bool) -> list[float]:
    """How well a model predicts consecutive windows of held-out text.

    Args:
        model: The model, with adapters or without.
        study: Has the text.
        behind_image: Whether a mosaic comes before each window. The same tokens are predicted with it and without.

    Returns:
        For each window, the mean of -log p over its tokens from the second on, in nats, not rounded.

    Raises:
        ValueError: There are not so many windows in the split.
    """
    questions, generator = study.questions, step_generator(study.seed, 0)
    windows = questions.draw_text(study.split, 1, Turn(text_tokens=study.rows * WINDOW), generator).view(-1, WINDOW)
    opening = questions.tokenizer(f"{START_OF_TURN}user\n", add_special_tokens=False).input_ids
    before = torch.tensor([*opening, *[questions.visual] * NUM_CELLS])
    losses = []
    for row, window in enumerate(windows):
        inputs = {"input_ids": window[None]}
        if behind_image:
            pictures = draw_pictures(study.split, 1, 0, 1, step_generator(study.seed, row))
            inputs = {"input_ids": torch.cat([before, window])[None], "pixel_values": pictures.mosaics * 2 - 1}
        logits = model(**inputs, use_cache=False, logits_to_keep=WINDOW).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:]).item())
    return losses

"""VISTA: outputs of FFNs are turned in the direction in which the image changes the end of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor

from ..tokens.early_exit import WITHOUT_EXIT
from ..tokens.families import VisionLanguageModel
from ..tokens.tap import this_thread
from ..tuners.branch import Branch
from ..tuners.ffn_method import FFNMethod, FFNStep, ffn_tuner
from ..tuners.in_generate import InGenerate, Prompt, Run, running, text_alone
from ..utils.checks import setting


SHORTEST = 1e-12  # what vectors are divided by at least, to be of length 1
LEAST, ROUNDING = 1e-4, 4  # shares of the length, the second in units of the dtype's: less says nothing of the image


@dataclass
class VISTAConfig(InGenerate, FFNMethod):
    """Turns outputs of FFNs in the direction in which the image changes the end of the prompt (arXiv 2502.03628,
    "Visual Information Steering with Token-logit Augmentation").

    Let `v` be what a decoder layer returns for the last token of the prompt, minus what it returns without the images.
    Let `y` be what the FFN of that layer returns for a token of text after an image, and `unit(x) = x / |x|`::

        y = |y| * unit(unit(y) + strength * (1 + max(0, cos(y, -v))) * unit(v))

    It acts only in `generate`, in the prompt and in the answer. Before that, the model reads the prompt twice, with
    and without its images, while this method is off. A plain forward is that of the base. The paper's second part,
    which adds logits of earlier layers, is left out. It has no parameters.

    Args:
        strength: How far it turns, 0 or more.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "vista"

    strength: float = setting(0.1, "How far what FFNs return is turned, 0 or more.", least=0)

    @classmethod
    def check_model(cls, vlm: VisionLanguageModel) -> None:
        """Raise a ValueError if the model does not generate, or its layers return several streams."""
        cls.check_generates(vlm, cls.tuner_name())
        if reason := WITHOUT_EXIT.get(vlm.text_config.model_type):
            raise ValueError(
                f"VISTA cannot say what the image changes after a layer of {type(vlm.model).__name__}: {reason}."
            )

    def begin(self, run: Run, prompt: Prompt, settings: GenerationConfig) -> list[LogitsProcessor]:
        """Read the prompt with and without its images.

        Raises:
            NotImplementedError: Pixels of some image are missing.
        """
        if bool(prompt.visual[:, : prompt.num_cached].any()):
            raise NotImplementedError(
                "VISTA reads the whole conversation with and without its images, but the KV cache holds images of an "
                "earlier turn, whose pixels this call of generate does not bring. Start with a new cache and all "
                "images."
            )
        with_images = _last_outputs(run.vlm, prompt.inputs, settings)
        without = _last_outputs(run.vlm, text_alone(prompt, self.title), settings)
        run.found = {layer_idx: _direction(output, without[layer_idx]) for layer_idx, output in with_images.items()}
        return []

    def changed(self, step: FFNStep) -> torch.Tensor | None:
        """The formula."""
        run = running(step.vlm.model)
        if run is None or run.found is None or run.config is not self or not run.has(step.context):
            return None
        output = step.output
        own = output.to(torch.promote_types(output.dtype, torch.float32))
        towards = run.found[step.layer_idx].to(own).unsqueeze(1)
        length = own.norm(dim=-1, keepdim=True)
        unit = own / length.clamp(min=SHORTEST)
        similarity = (unit * towards).sum(-1, keepdim=True)
        weight = torch.rsub(similarity.clamp(max=0), self.strength, alpha=self.strength)
        turned = length * F.normalize(torch.addcmul(unit, weight, towards), dim=-1, eps=SHORTEST)
        rows = step.context.text_after_images().to(output.device)
        return torch.where(rows.unsqueeze(-1), turned.to(output.dtype), output)


def _direction(output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The unit vector from one to the other, `(rows, hidden_size)` all; 0 where rounding may be all that differs."""
    precise = torch.promote_types(output.dtype, torch.float32)
    difference = output.to(precise) - other.to(precise)
    share = max(LEAST, ROUNDING * torch.finfo(output.dtype).eps)
    least = share * output.to(precise).norm(dim=-1, keepdim=True)
    is_there = difference.norm(dim=-1, keepdim=True) > least
    return torch.where(is_there, F.normalize(difference, dim=-1), 0)


def _last_outputs(
    vlm: VisionLanguageModel, inputs: Mapping[str, Any], settings: GenerationConfig
) -> dict[int, torch.Tensor]:
    """What each decoder layer returns for the last token of a prompt, by layer index, `(rows of generate,
    hidden_size)`."""
    found: dict[int, torch.Tensor] = {}
    with _watching(vlm, found):
        rows = len(Branch(vlm.model, inputs, settings).logits)
    return {layer_idx: states.unflatten(0, (rows, -1))[:, -1] for layer_idx, states in found.items()}


@contextlib.contextmanager
def _watching(vlm: VisionLanguageModel, found: dict[int, torch.Tensor]) -> Iterator[None]:
    """Record what each decoder layer returns in this thread: another may be answering somebody else."""
    thread = this_thread()

    def note(layer_idx: int, output: Any) -> None:
        if this_thread() != thread:
            return
        states = output[0] if isinstance(output, tuple) else output
        found[layer_idx] = states.flatten(0, -2)  # OPT puts the tokens of all rows in one list

    handles = [
        layer.register_forward_hook(lambda module, args, output, layer_idx=layer_idx: note(layer_idx, output))
        for layer_idx, layer in enumerate(vlm.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


VISTAModel = ffn_tuner(VISTAConfig)

"""VCD: tokens that are also likely with a noised image are lowered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..tokens.positions import placeholder_mask
from ..tuners.in_generate import Prompt
from ..tuners.logits_method import LogitsMethod, logits_tuner
from ..utils.checks import setting
from ..utils.packages import modalities_in


DIFFUSION_STEPS = 1000


@dataclass
class VCDConfig(LogitsMethod):
    """Lowers tokens that the model would also write for a noised image (arXiv 2311.16922, "Mitigating Object
    Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding").

    With `l` the logits of the next token, and `l_n` those with noise on the image::

        l = (1 + alpha) * l - alpha * l_n      for tokens with l >= max l + log(beta)
        l = -inf                               for all others

    The noise is that of step `noise_steps` of a diffusion: `sqrt(a) * x + sqrt(1 - a) * eps` for pixels `x` as the
    processor gives them. It acts only in `generate`, greedy or sampling, and runs the model twice for each
    token. A plain forward is that of the base. It has no parameters.

    Args:
        alpha: How much is subtracted, 0 or more.
        beta: Tokens with less than this share of the likeliest token's probability are excluded. Above 0, at most 1.
        noise_steps: At which step of the diffusion the noise is, 0 to 999.
        seed: The seed of the noise. Noise is drawn for each image by itself, so an image gets the same noise
            in any batch.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "vcd"

    alpha: float = setting(1.0, "How much is subtracted, 0 or more.", least=0)
    beta: float = setting(
        0.1,
        "Tokens with less than this share of the likeliest token's probability are excluded. Above 0, at most 1.",
        above=0,
        most=1,
    )
    noise_steps: int = setting(
        500, "At which step of the diffusion the noise is, 0 to 999.", least=0, most=DIFFUSION_STEPS - 1, whole=True
    )
    seed: int = setting(
        0, "The seed of the noise, which is drawn for each image by itself.", least=0, most=2**63 - 1, whole=True
    )

    def second_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The same prompt with noised pixels.

        Raises:
            NotImplementedError: Pixels of some image are missing, or cannot be told apart by image.
        """
        if bool(prompt.visual[:, : prompt.num_cached].any()):
            raise NotImplementedError(
                "VCD reads the whole conversation with noised images, but the KV cache holds images of an earlier "
                "turn, whose pixels this call of generate does not bring. Start with a new cache and all images."
            )
        pixels = [
            name
            for name, value in prompt.inputs.items()
            if ("pixel_values" in name or name == "image_patches") and torch.is_tensor(value)
            if value.is_floating_point()
        ]
        if len({"video" in name for name in pixels}) < len(modalities_in(prompt.inputs)):
            raise NotImplementedError(
                f"VCD puts noise on pixel_values, but this call of generate brings features in another form "
                f"({', '.join(prompt.inputs)} given). Give the pixels, or take the adapter off with unload()."
            )
        return {**prompt.inputs, **{name: self._noised(name, prompt) for name in pixels}}

    def _noised(self, name: str, prompt: Prompt) -> torch.Tensor:
        pixels = prompt.inputs[name]
        kept = self._share_kept()
        noised = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * self._noise(name, prompt).to(pixels)
        if pixels.dim() < 5:
            return noised
        # Rows with fewer images than others, and images with fewer tiles, are filled up with zeros, which models skip.
        return torch.where((pixels == 0).flatten(-3).all(-1)[..., None, None, None], pixels, noised)

    def _share_kept(self) -> float:
        """Which part of the variance is still the image's."""
        betas = torch.linspace(-6, 6, DIFFUSION_STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
        return float((1 - betas[: self.noise_steps + 1]).prod())

    def _noise(self, name: str, prompt: Prompt) -> torch.Tensor:
        """Noise of a shape that can be added to the pixels. Images of one shape get the same."""
        pixels, modality = prompt.inputs[name], "video" if "video" in name else "image"
        for grid_name, grid in prompt.inputs.items():  # patches of all images in one list
            if grid_name.startswith(f"{modality}_grid") and int(grid.prod(-1).sum()) == len(pixels):
                patches = grid.prod(-1).tolist()
                return torch.cat([self._draw(number, *pixels.shape[1:]) for number in patches])
        token_ids = prompt.vlm.placeholder_ids[modality]
        rows = placeholder_mask(prompt.inputs["input_ids"], token_ids).any(1).sum()
        if pixels.dim() < 3 or len(pixels) < int(rows):
            raise NotImplementedError(
                f"VCD draws noise for each image, but {name} of shape {tuple(pixels.shape)} does not say which part "
                f"is which image ({', '.join(prompt.inputs)} given). Take the adapter off with unload()."
            )
        _refuse_padded(pixels, prompt.inputs)
        return self._draw(*pixels.shape[-3 if pixels.dim() > 3 else -2 :])

    def _draw(self, *shape: int) -> torch.Tensor:
        # On the CPU, so that it is the same on any device.
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed), device="cpu")

    def scores(self, logits: torch.Tensor, other: torch.Tensor, num_generated: int) -> torch.Tensor:
        """The formula."""
        contrasted = (1 + self.alpha) * logits - self.alpha * other
        kept = logits >= logits.amax(-1, keepdim=True) + math.log(self.beta)
        return torch.where(kept, contrasted, -math.inf)


def _refuse_padded(pixels: torch.Tensor, inputs: Mapping[str, Any]) -> None:
    """Refuse images that a batch has padded to the size of the largest: by themselves, they would get other noise."""
    mask, sizes = inputs.get("pixel_attention_mask"), inputs.get("image_sizes")
    padded = False
    if mask is not None and mask.shape[-2:] == pixels.shape[-2:]:
        of_images = mask.bool().flatten(-2)
        padded = bool((of_images.any(-1) & ~of_images.all(-1)).any())
    elif sizes is not None and pixels.dim() == 4 and len(sizes) == len(pixels):
        sizes = torch.as_tensor(sizes)
        padded = sizes.amax(0).tolist() == list(pixels.shape[-2:]) and bool((sizes != sizes[0]).any())
    if padded:
        raise NotImplementedError(
            "VCD draws noise for each image as it is, but these images are of several sizes and padded to one. Call "
            "generate for images of one size at a time."
        )


VCDModel = logits_tuner(VCDConfig)

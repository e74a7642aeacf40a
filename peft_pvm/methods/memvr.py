"""MemVR: where the model is undecided, the output of an FFN is mixed with a lookup in the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from ..tokens.early_exit import EarlyExit, all_at_once
from ..tokens.families import VisionLanguageModel
from ..tokens.positions import causally_visible, gather_rows, pack, scatter_rows
from ..tuners.ffn_method import FFNMethod, FFNStep, ffn_tuner
from ..tuners.without_parameters import ROWS, Rows
from ..utils.checks import setting


PRODUCTS_AT_ONCE = 2**22  # of tokens and visual embeddings


@dataclass
class MemVRConfig(FFNMethod):
    """Mixes a lookup in the image into the output of one FFN, in the first layer where the model is still undecided
    (arXiv 2410.03577, "Look Twice Before You Answer").

    With `F` what the FFN of a layer returns for a token, `x` what it read, and `z_i` the embeddings that the vision
    tower wrote for the visual tokens before that token::

        a = sum_i (x . z_i) z_i
        F = (1 - ratio) * F + ratio * mean|F| / mean|a| * a

    Means are over channels. Each token is changed once at most, in the first of the method's layers where `H >
    threshold`. `H` says how undecided the model is: `H = -sum p log p / log 10`, where `p` are the probabilities of
    the 10 likeliest tokens, normalised to sum to 1. The final norm and the head compute them from the residual stream
    that enters the layer. Every layer on which it acts runs the head once more, for every token of text after an image
    that was not changed yet. It has no parameters.

    Args:
        ratio: The share of the lookup in the output, from 0 to 1.
        threshold: How undecided the model has to be, from 0 to 1.
        rows: "text": all text after an image, each token judged by itself. "generated": only the last token of each
            forward. Then a step of decoding does not give what a forward over the whole text gives.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the authors' 7 to 16 of 32
            layers, and the same part of other depths.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "memvr"
    layers_of_paper: ClassVar[tuple[int, int, int]] = (7, 16, 32)
    reads_embeddings: ClassVar[bool] = True

    ratio: float = setting(0.12, "The share of the lookup in the output, from 0 to 1.", least=0, most=1)
    threshold: float = setting(0.75, "How undecided the model has to be, from 0 to 1.", least=0, most=1)
    rows: Rows = setting("text", ROWS, among=("text", "generated"))

    @classmethod
    def check_model(cls, vlm: VisionLanguageModel) -> None:
        """Raise a ValueError if nothing can be read off between layers."""
        EarlyExit(vlm)

    def changed(self, step: FFNStep) -> torch.Tensor | None:
        """The formula, for the tokens that are changed in this layer."""
        turns, memory = self._turns(step)[0], step.context.memory
        batch_size, seq_len = turns.shape
        if seq_len == 1:  # it comes after all visual tokens, if it is changed at all
            mixed = self._mixed(
                step, step.ffn_input, step.output, None if memory.is_dense else (memory.slots >= 0).unsqueeze(1)
            )
            return torch.where(turns.unsqueeze(-1), mixed, step.output)
        if all_at_once(turns):
            positions = torch.arange(seq_len, device=turns.device).expand(batch_size, -1)
        else:
            positions = pack(turns)
            if positions.shape[1] == 0:
                return None
        num_at_once = max(PRODUCTS_AT_ONCE // (batch_size * memory.slots.shape[1]), 1)
        mixed = torch.cat([self._mixed_at(step, some) for some in positions.split(num_at_once, 1)], 1)
        return torch.where(turns.unsqueeze(-1), scatter_rows(mixed, positions, seq_len), step.output)

    def _turns(self, step: FFNStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are changed in this layer, and which were not changed before it, `(batch, seq_len)`, bool."""
        if step.layer_idx not in step.handed_on:
            if step.handed_on:
                _, waiting = step.handed_on[max(step.handed_on)]
                waiting = waiting.to(step.output.device)[:, -step.context.seq_len :]
            else:
                waiting = self._asked(step)
            entering = cast(torch.Tensor, step.entering).detach()  # a layer's first run
            turns = EarlyExit(step.vlm).undecided(entering, self.threshold, waiting)
            step.handed_on[step.layer_idx] = turns, waiting > turns
        return step.handed_on[step.layer_idx]

    def _asked(self, step: FFNStep) -> torch.Tensor:
        """Which tokens may be changed at all, `(batch, seq_len)`, bool."""
        text = step.context.text_after_images()
        if self.rows == "text" or text.shape[1] == 1:
            return text
        return text & (torch.arange(text.shape[1], device=text.device) == text.shape[1] - 1)

    def _mixed_at(self, step: FFNStep, positions: torch.Tensor) -> torch.Tensor:
        """`_mixed` of the tokens at `positions` in this forward, `(batch, length)`, as `pack` gives them."""
        sees = causally_visible(step.context.memory.slots, positions + step.context.past_length)
        return self._mixed(step, gather_rows(step.ffn_input, positions), gather_rows(step.output, positions), sees)

    def _mixed(
        self, step: FFNStep, ffn_input: torch.Tensor, output: torch.Tensor, sees: torch.Tensor | None
    ) -> torch.Tensor:
        """The FFN's output for some tokens with the image mixed in, `(batch, length, hidden_size)`.

        Args:
            step: The FFN.
            ffn_input: What it read of these tokens, likewise.
            output: What it returned for them, likewise.
            sees: Which visual tokens come before each, `(batch, length, num_visual)`, bool. `None`: all do.
        """
        precise = torch.promote_types(output.dtype, torch.float32)  # sums of products are large
        embeddings = step.context.derived(("embeddings", precise), lambda: step.context.memory.embeddings.to(precise))
        with torch.autocast(output.device.type, enabled=False):
            products = torch.bmm(ffn_input.to(precise), embeddings.transpose(1, 2))
            image = torch.bmm(products if sees is None else products.masked_fill(~sees, 0), embeddings)
        own = output.to(precise)
        of_output, of_image = (torch.linalg.vector_norm(states, 1, -1, keepdim=True) for states in (own, image))
        image = of_output / of_image.clamp(min=torch.finfo(precise).tiny) * image
        return torch.lerp(own, image, self.ratio).to(output.dtype)


MemVRModel = ffn_tuner(MemVRConfig)

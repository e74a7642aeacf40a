"""SPARC: visual tokens whose attention rises during the answer count for more from then on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F

from ..attention.call import AttentionCall, Output
from ..attention.stages import Later, Stage, Values, Watch
from ..tokens.context import VisualContext
from ..tokens.families import VisionLanguageModel
from ..tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from ..utils.checks import DEEPEST, setting
from ..utils.text import quoted


LAYER_OF_PAPER, DEPTH_OF_PAPER = 20, 32
NARROW = ("sliding_attention", "chunked_attention")  # types of layers that do not see all keys


@dataclass(frozen=True)
class _ValuesOfChosen(Values):
    """Scaled values, once there has been a forward to choose by."""

    def attend(self, call: AttentionCall, later: Later) -> Output:
        is_first = not any(name.startswith(SPARCConfig.method) for name in call.context.notes)
        return later(call) if is_first else super().attend(call, later)


@dataclass
class SPARCConfig(AttentionMethod):
    """Raises the weights of visual tokens from the moment that the answer looks at them more than before
    (arXiv 2502.01419, "Selective Progressive Attention ReCalibration").

    With `a_j` the attention weight of visual token `j` for the last query of a forward, averaged over the heads of
    `choosing_layer`, and `m_j` its moving average::

        chosen:     a_j > 0  and  a_j - m_j >= tau * m_j
        m_j       = beta * a_j + (1 - beta) * m_j            at first: a_j
        w_ij      = w_ij * alpha^n_j                         n_j: in how many forwards before j was chosen

    The weights are not normalised again. It acts when a forward continues a KV cache, as in `generate`. **The first
    forward, which brings the image, is that of the base.** It has no parameters.

    Args:
        alpha: The factor by which each choice of a visual token multiplies its weight, above 0.
        tau: By how much the attention on a chosen token exceeds its moving average, as a multiple of that average, at
            least 0.
        beta: The share of the newest forward in the moving average, above 0, at most 1.
        choosing_layer: The decoder layer whose weights decide which tokens are chosen. `None`: the authors' 20 of 32,
            and the same part of other depths.
        layers_to_transform: Indices of the decoder layers whose weights it changes (or one). `None`: all.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    method: ClassVar[str] = "sparc"
    acts_in_forwards: ClassVar[bool] = False

    alpha: float = setting(1.1, "The factor by which each choice of a visual token multiplies its weight.", above=0)
    tau: float = setting(
        1.5,
        "By how much the attention on a chosen token exceeds its moving average, as a multiple of it.",
        least=0,
    )
    beta: float = setting(0.9, "The share of the newest forward in the moving average.", above=0, most=1)
    choosing_layer: int | None = setting(
        None,
        "The decoder layer whose weights decide the choice, or None: the authors' part of the depth.",
        least=0,
        most=DEEPEST - 1,
        whole=True,
        or_none=True,
    )

    def fitted_to(self, vlm: VisionLanguageModel) -> SPARCConfig:
        """The configuration with a `choosing_layer`: of those that see all keys, the nearest to the authors'."""
        layers = self.layers_on(vlm)
        if self.choosing_layer is None:
            wide = [layer_idx for layer_idx in layers if vlm.layer_type(layer_idx) not in NARROW] or layers
            aim = LAYER_OF_PAPER / (DEPTH_OF_PAPER - 1) * (len(vlm.layers) - 1)
            config = copy.copy(self)  # the caller's can be used again, for another model
            config.choosing_layer = min(wide, key=lambda layer_idx: abs(layer_idx - aim))
            return config
        if self.choosing_layer not in layers:
            raise ValueError(
                f"SPARCConfig.choosing_layer is {self.choosing_layer}, but on {type(vlm.model).__name__} the method "
                f"can look into layers {quoted(layers)} only."
            )
        return self

    def layers_among(self, layers: list[int]) -> list[int]:
        """The layers that it changes, and the one by which it chooses."""
        return sorted({*super().layers_among(layers), cast(int, self.choosing_layer)})

    def stages(self, layer: SteeredLayer) -> list[Stage]:
        """Weights that are read, in one layer, and scaled values."""
        watch = [Watch(self.choose)] if layer.layer_idx == self.choosing_layer else []
        changes = self.layers_to_transform is None or layer.layer_idx in cast(list[int], self.layers_to_transform)
        scale = [_ValuesOfChosen(self.of_keys, rows="text")] if changes else []
        return [*watch, *scale]

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        """Keep what was chosen, also through forwards in which no adapter is active."""
        kept = {name: noted for name, noted in context.notes.items() if name.startswith(cls.method)}
        context.memory.notes.update(kept)

    def choose(self, call: AttentionCall) -> None:
        """Choose by the last query's weights, and note the choice on the KV cache for the forwards that follow."""
        context = call.context
        if context.memory.is_empty:
            return
        with torch.no_grad():
            weights = F.pad(call.last_row_weights().mean(1), (0, 1))  # a visual token without a key gets none
            seen = weights.gather(1, call.keys.visual_columns)
            average, count = (noted.to(seen) for noted in self._noted(context))
            chosen = (seen > 0) & (seen - average >= self.tau * average)
            newest = torch.where(average.isnan(), seen, self.beta * seen + (1 - self.beta) * average)
            rows = context.text_after_images()[:, -1:, None]
            noted = torch.stack([newest, count + chosen], -1)
            context.memory.notes[self._name] = torch.where(rows, noted, torch.stack([average, count], -1))

    def of_keys(self, call: AttentionCall) -> torch.Tensor:
        """What the values of each key are multiplied by, `(batch, num_keys)`."""
        context, num_keys = call.context, call.key.shape[2]

        def make() -> torch.Tensor:
            _, count = self._noted(context)
            factors = count.new_ones(len(count), num_keys + 1)
            return factors.scatter(1, call.keys.visual_columns, self.alpha**count)[:, :num_keys]

        return context.derived((self._name, self.alpha, num_keys), make)

    def _noted(self, context: VisualContext) -> tuple[torch.Tensor, torch.Tensor]:
        """The moving average, NaN of visual tokens that no query has seen, and how often each was chosen, before
        this forward: `(batch, num_visual)` both."""
        batch, num_visual = context.memory.slots.shape
        noted = context.notes.get(self._name, torch.zeros(batch, 0, 2)).to(context.device)
        new = num_visual - noted.shape[1]
        average, count = noted.unbind(-1)
        return F.pad(average, (0, new), value=torch.nan), F.pad(count, (0, new))

    @property
    def _name(self) -> str:
        return f"{self.method} {self.choosing_layer} {self.tau} {self.beta}"


SPARCModel = attention_tuner(SPARCConfig)

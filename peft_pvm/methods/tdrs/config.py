"""T-DRS: attention reweighted by similarity and distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...attention.stages import Stage, Weights
from ...tokens.context import VisualContext
from ...tuners.attention_method import AttentionMethod, SteeredLayer
from ...utils.checks import setting
from .reweighting import Reweighting, keep_positions
from .weights import Floor


FORMS = ("weights", "logits")
PAIRS = ("all", "inter")
KERNELS = ("auto", "blockwise", "triton")
FLOORS = "a number between 0 and 1, or a multiple of the least weight, such as '3*min'"


@dataclass
class TDRSConfig(AttentionMethod):
    """Configuration of T-DRS, arXiv 2511.09868. It has no parameters.

    Attention is reweighted in three steps: towards keys that are similar to the query (SD-DRS), towards keys that are
    near, where a similar key counts as nearer (DC-DRS), and towards distant keys, so that they keep a share (reDRS).
    What the paper leaves open is our reading; docs/methods/t-drs.md sets the two side by side.

    Args:
        form: What distance multiplies. "weights": attention weights, which are then renormalised. "logits": scores.
        sd_strength: How much is added to the score of a key of the same direction as the query. The paper has 1.
        dc_strength: Weight of the step that favours near keys (lambda_dc), 0 or more. The paper's best is 1.
        re_strength: Weight of the step that keeps distant keys in view (lambda_re), 0 or more. The paper's best is 0.8
            or 1.
        dc_floor: What the near-key factor falls to at the farthest key: a number in (0, 1), or "3*min" for a multiple
            of the least weight in the query's row, at most 0.999. A number saves a pass over the keys.
        re_floor: The same for the distant-key factor.
        pairs: Which pairs are reweighted: "all", or "inter" for those of text with visual tokens.
        kernel: "auto" takes the Triton kernel on CUDA where no gradients or weights are asked for, and else works
            blockwise in PyTorch; "blockwise" and "triton" insist.
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: all with self-attention.
        format_version: Of the saved adapter: leave it.
        init_weights: Without effect: there are no weights. PEFT expects the field.

    Raises:
        ValueError: A value out of its range or not among the choices.
    """

    method: ClassVar[str] = "tdrs"
    title: ClassVar[str] = "T-DRS: attention reweighted by similarity and distance"
    summary: ClassVar[str] = (
        "Three steps at inference: similar keys weigh more, near keys weigh more (similar ones count as nearer), and "
        "distant keys keep a share."
    )
    paper: ClassVar[str] = "2511.09868"

    rotates: ClassVar[bool] = True

    form: Literal["weights", "logits"] = setting(
        "weights",
        "What distance multiplies: attention 'weights', renormalised after, or scores ('logits').",
        among=FORMS,
    )
    sd_strength: float = setting(
        1.0, "How much is added to the score of a key of the same direction as the query, 0 or more.", least=0
    )
    dc_strength: float = setting(1.0, "Weight of the step that favours near keys (lambda_dc), 0 or more.", least=0)
    re_strength: float = setting(
        1.0, "Weight of the step that keeps distant keys in view (lambda_re), 0 or more.", least=0
    )
    dc_floor: float | str = setting(
        "3*min",
        "What the near-key factor falls to at the farthest key: a number in (0, 1), or a multiple of the row's least "
        "attention weight, such as '3*min'.",
        valid=Floor.is_valid,
        accepted=FLOORS,
    )
    re_floor: float | str = setting(
        "2*min",
        "What the distant-key factor falls to at the farthest key, like dc_floor.",
        valid=Floor.is_valid,
        accepted=FLOORS,
    )
    pairs: Literal["all", "inter"] = setting(
        "all", "Which pairs are reweighted: 'all', or 'inter' for those of text with visual tokens.", among=PAIRS
    )
    kernel: Literal["auto", "blockwise", "triton"] = setting(
        "auto", "How it is computed: 'auto' takes Triton on CUDA, else 'blockwise' in PyTorch.", among=KERNELS
    )

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        """Have the positions of all tokens kept, which its keys are compared without."""
        keep_positions(context)

    def stages(self, layer: SteeredLayer) -> Stage | Sequence[Stage]:
        """Reweighted scores, unless every step is off."""
        reweighting = Reweighting(self, layer.rotary, layer.layer_type)
        return () if self.is_off else Weights(reweighting.attend, reweighting.reference)

    @property
    def floors(self) -> tuple[Floor, Floor]:
        """Of both steps that look at the distance. A step that is off must not cost a look at the least weight."""
        return Floor.of(self.dc_floor), Floor.of(self.re_floor if self.re_strength else 0.5)

    @property
    def knows_distance(self) -> bool:
        """Whether one of the two steps acts that look at the distance."""
        return self.dc_strength != 0 or self.re_strength != 0

    @property
    def is_off(self) -> bool:
        """Whether every step has strength 0."""
        return self.sd_strength == 0 and not self.knows_distance

"""The configuration of a T-DRS adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..checks import LARGEST, check, is_number
from ..steering import SteeringConfig
from .weights import Floor


FORMS = ("weights", "logits")
PAIRS = ("all", "inter")
KERNELS = ("auto", "blockwise", "triton")


@dataclass
class TDRSConfig(SteeringConfig):
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

    form: Literal["weights", "logits"] = field(
        default="weights",
        metadata={"help": "What distance multiplies: attention 'weights', renormalised after, or scores ('logits')."},
    )
    sd_strength: float = field(
        default=1.0,
        metadata={"help": "How much is added to the score of a key of the same direction as the query, 0 or more."},
    )
    dc_strength: float = field(
        default=1.0, metadata={"help": "Weight of the step that favours near keys (lambda_dc), 0 or more."}
    )
    re_strength: float = field(
        default=1.0,
        metadata={"help": "Weight of the step that keeps distant keys in view (lambda_re), 0 or more."},
    )
    dc_floor: float | str = field(
        default="3*min",
        metadata={
            "help": "What the near-key factor falls to at the farthest key: a number in (0, 1), or a multiple of the "
            "row's least attention weight, such as '3*min'."
        },
    )
    re_floor: float | str = field(
        default="2*min", metadata={"help": "What the distant-key factor falls to at the farthest key, like dc_floor."}
    )
    pairs: Literal["all", "inter"] = field(
        default="all",
        metadata={"help": "Which pairs are reweighted: 'all', or 'inter' for those of text with visual tokens."},
    )
    kernel: Literal["auto", "blockwise", "triton"] = field(
        default="auto",
        metadata={"help": "How it is computed: 'auto' takes Triton on CUDA, else 'blockwise' in PyTorch."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("form", FORMS), ("pairs", PAIRS), ("kernel", KERNELS)):
            check(self, name, getattr(self, name) in choices, f"one of {choices}")
        for name in ("sd_strength", "dc_strength", "re_strength"):
            valid = is_number(getattr(self, name)) and getattr(self, name) >= 0
            check(self, name, valid, f"a number from 0 to {LARGEST}")
        for name in ("dc_floor", "re_floor"):
            accepted = "a number between 0 and 1, or a multiple of the least weight, such as '3*min'"
            check(self, name, Floor.is_valid(getattr(self, name)), accepted)

    @property
    def knows_distance(self) -> bool:
        """Whether one of the two steps acts that look at the distance."""
        return self.dc_strength != 0 or self.re_strength != 0

    @property
    def is_off(self) -> bool:
        """Whether every step has strength 0."""
        return self.sd_strength == 0 and not self.knows_distance

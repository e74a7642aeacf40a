"""The sizes of a PVM branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import WIDEST, PVMConfig


# The sizes of each weight, by name. "hidden" is one size for a base model, the others are each branch's own.
SIZES: dict[str, tuple[str | int, ...]] = {
    "text_reducer": ("r", "hidden"),
    "vision_reducer": ("r", "hidden"),
    "input_norm": ("r",),
    "q_proj": ("r", "r"),
    "k_proj": ("keys", "r"),
    "v_proj": ("keys", "r"),
    "o_proj": ("r", "r"),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "post_attn_norm": ("r",),
    "gate_proj": ("mlp", "r"),
    "up_proj": ("mlp", "r"),
    "down_proj": ("r", "mlp"),
    "output_expander": ("hidden", "r"),
    "gate": (1,),
}


@dataclass(frozen=True)
class BranchShape:
    """The sizes of a branch, derived from the base model's.

    Attributes:
        hidden_size: Width of the residual stream, D.
        r: Width of the branch.
        head_dim: Size of a head, the base model's.
        num_heads: `r / head_dim`.
        num_key_value_heads: `num_heads` by the base's grouping ratio, at least 1, a divisor of `num_heads`.
        intermediate_size: Width of the branch's MLP.
        hidden_act: The base's activation function, by name.
        eps: The base's norm epsilon.
        initializer_range: Standard deviation of fresh matrices.
    """

    hidden_size: int
    r: int
    head_dim: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    initializer_range: float

    @classmethod
    def of(cls, config: PVMConfig, text_config: Any) -> BranchShape:
        """The shape that `config` asks for on a base model with `text_config`.

        Raises:
            ValueError: `config.r` is not a multiple of the head size, the MLP would have no width or an absurd one, or
                `text_config` lacks what the sizes come from.
        """
        base_heads = text_config.num_attention_heads
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // base_heads
        if config.r % head_dim:
            raise ValueError(
                f"PVMConfig.r is {config.r}, but must be a multiple of the base model's head size {head_dim}: "
                f"{head_dim}, {2 * head_dim}, {3 * head_dim}, ..."
            )
        num_heads = config.r // head_dim
        base_groups = base_heads // (getattr(text_config, "num_key_value_heads", None) or base_heads)
        num_key_value_heads = max(1, num_heads // base_groups)
        while num_heads % num_key_value_heads:
            num_key_value_heads -= 1
        ratio = config.mlp_ratio
        if ratio is None:
            ratio = (
                _first(text_config, "intermediate_size", hint="; set PVMConfig.mlp_ratio") / text_config.hidden_size
            )
        if not 1 <= int(config.r * ratio) <= WIDEST:
            raise ValueError(
                f"PVMConfig.mlp_ratio is {ratio}, which makes the branch's MLP {int(config.r * ratio)} wide at "
                f"r={config.r}, but it must be 1 to {WIDEST} wide."
            )
        return cls(
            hidden_size=text_config.hidden_size,
            r=config.r,
            head_dim=head_dim,
            num_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            intermediate_size=int(config.r * ratio),
            hidden_act=_first(text_config, "hidden_act", "hidden_activation"),
            eps=_first(text_config, "rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps"),
            initializer_range=text_config.initializer_range,
        )

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by name."""
        sizes: dict[str | int, int] = {
            "r": self.r,
            "hidden": self.hidden_size,
            "keys": self.num_key_value_heads * self.head_dim,
            "head": self.head_dim,
            "mlp": self.intermediate_size,
            1: 1,
        }
        return {name: tuple(sizes[size] for size in wanted) for name, wanted in SIZES.items()}


def _first(text_config: Any, *names: str, hint: str = "") -> Any:
    for name in names:
        if (value := getattr(text_config, name, None)) is not None:
            return value
    raise ValueError(
        f"{type(text_config).__name__} has none of {', '.join(names)}, which PVM's sizes come from{hint}."
    )

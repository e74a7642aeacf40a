"""The configuration of a PVM adapter, and the sizes of its branches that follow from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from transformers.activations import ACT2FN

from ...folders.adapter_file import PEFT_PREFIX
from ...tuners.base import VisualConfig
from ...utils.checks import check, check_settings, is_number, is_text, layer_list, setting
from ...utils.text import quoted


MEMORY_VISIBILITY = ("causal", "sample")
MEMORY_SOURCE = ("embeddings", "hidden_states")
WIDEST = 2**20  # what a branch can be; a file that asks for more is damaged
MOST_BRANCHES = MOST_MODULES = 64  # of one adapter
CHOSEN_LATER = ("strided", "auto")  # layers that depend on the base model, or on it and data
BRANCH_FIELDS = ("r", "layers_to_transform", "memory_visibility", "memory_source", "mlp_ratio")

# The sizes of each weight of a branch, by name, in the order of the state dict. "hidden" is one size for a base model,
# the others are each branch's own.
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
WEIGHTS = tuple(SIZES)


def weight_name(name: str, number: int = 0) -> str:
    """The name of a weight in the layer and in the adapter's file, for the adapter's branch of this number."""
    return f"pvm_{name}_{number}" if number else f"pvm_{name}"


def _is_list_of_modules(names: Any) -> bool:
    is_list = isinstance(names, (list, tuple)) and len(names) <= MOST_MODULES
    return is_list and all(is_text(name, 200) and name for name in names)


@dataclass
class PVMConfig(VisualConfig):
    """Configuration of PVM (Persistent Visual Memory), arXiv 2605.00814.

    PVM adds a small trainable branch beside the FFN of a few decoder layers. Every text token looks up the raw visual
    embeddings there by cross-attention without positions, so the distance to the image does not matter.

    Args:
        r: Width of the branch, a multiple of the base model's head size. The paper takes 512 (1024 and 2048 did
            worse).
        layers_to_transform: The decoder layers that get a branch: "strided", "auto" or a list of indices (or one).
            "strided" is the paper's set for Qwen3-VL-4B (5, 11, 17) and Qwen3-VL-8B (8, 16, 24), and on other models
            three layers at 2/9, 4/9 and 6/9 of the depth. "auto" is a placeholder for layers that
            `peft_pvm.probe.layers.propose_layers` finds on the model and some rows of data, before the adapter is
            attached.
        init_gate: Initial value of the scalar that scales the branch. With 0, the model's output is
            unchanged, and training still works: only the gate has a gradient in the first step, and all weights have
            one from the second step on.
        memory_visibility: Which visual tokens a text token may look up. "causal": those before it, which keeps cached
            decoding equal to the full forward over several turns and hides later images from earlier answers.
            "sample": all of its sample, also later ones, as in the authors' code.
        memory_source: What is looked up. "embeddings": what the vision tower wrote into the input embeddings.
            "hidden_states": the hidden states of the visual tokens at the same layer, the paper's ablation, which did
            far worse than no branch at all (33.4 against 59.4; the paper does not say which states, this is our
            reading).
        mlp_ratio: Width of the branch's MLP, as a multiple of `r`. `None` takes the base model's ratio,
            that of its widest layer.
        modules_to_save: Modules of the base model that are trained and saved along with the adapter.
        branches: The settings of each branch, for an adapter that was put together from several ("cat" of
            `add_weighted_adapter`): dicts of `r`, `layers_to_transform` (indices), `memory_visibility`,
            `memory_source` and `mlp_ratio`. The adapter's own `r` is then the sum of theirs, and its layers are all of
            theirs; its other three fields have no effect. `None`: one branch.
        lineage: A hash of the adapter's initial weights, which training and loading keep. It is set on attaching; do
            not choose it. Adapters of one lineage can be averaged.
        format_version: The format of the saved adapter. Do not change it.
        init_weights: With `True`, the gate starts at `init_gate`, and all matrices are drawn from N(0,
            initializer_range) of the base. `False` is for tests: it also draws the gate, from N(0, 1), so that the
            branch acts at once.

    Raises:
        ValueError: A value that is not among the choices. Whether `r` and the layers fit the base model is checked on
            attaching.
    """

    method: ClassVar[str] = "pvm"
    title: ClassVar[str] = "PVM: Persistent Visual Memory"
    summary: ClassVar[str] = (
        "A small trainable branch beside the FFN of a few decoder layers. Every text token looks up the raw visual "
        "embeddings there by cross-attention without positions, so the distance to the image does not matter."
    )
    paper: ClassVar[str] = "2605.00814"

    r: int = setting(
        512,
        "Width of the branch; must be a multiple of the base model's head size.",
        least=1,
        most=WIDEST,
        whole=True,
    )
    layers_to_transform: list[int] | int | Literal["strided", "auto"] = setting(
        "strided",
        "Indices of the decoder layers that get a branch, or 'strided': the paper's layers for Qwen3-VL-4B and -8B, "
        "on other models three layers at 2/9, 4/9 and 6/9 of the depth. 'auto' stands for layers to be proposed.",
    )
    init_gate: float = setting(
        0.0,
        "Initial value of the scalar that scales the branch; 0 leaves the model's output as it is.",
        valid=is_number,
        accepted="a number that fits fp16",
    )
    memory_visibility: Literal["causal", "sample"] = setting(
        "causal",
        "Which visual tokens a text token may look up: 'causal', those before it, or 'sample', all of its sample, "
        "also later ones (as in the authors' code).",
        among=MEMORY_VISIBILITY,
    )
    memory_source: Literal["embeddings", "hidden_states"] = setting(
        "embeddings",
        "What is looked up: 'embeddings', the vision tower's output as it enters the text model, or 'hidden_states', "
        "the visual tokens' hidden states at the same layer (the paper's ablation).",
        among=MEMORY_SOURCE,
    )
    mlp_ratio: float | None = setting(
        None,
        "Width of the branch's MLP as a multiple of r; None takes the base model's ratio.",
        above=0,
        or_none=True,
    )
    modules_to_save: list[str] | None = setting(
        None,
        "Modules of the base model that are trained and saved along with the adapter.",
        valid=lambda names: names is None or _is_list_of_modules(names),
        accepted="a list of module names or None",
    )
    branches: list[dict[str, Any]] | None = setting(
        None, "The settings of each branch, for an adapter that was put together from several."
    )
    lineage: str | None = setting(
        None,
        "Hash of the initial weights, set on attaching. Adapters of one lineage can be averaged.",
        valid=lambda lineage: lineage is None or (is_text(lineage) and bool(re.fullmatch("[0-9a-f]{16}", lineage))),
        accepted="a hash of 16 hexadecimal digits or None",
    )
    init_weights: bool = setting(
        True,
        "True starts training from the unchanged model; False also draws the gate at random, for tests.",
        valid=lambda value: isinstance(value, bool),
        accepted="True or False",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches is not None:
            self._take_from_branches()
        if self.layers_to_transform not in CHOSEN_LATER:
            self.layers_to_transform = layer_list(self, "'strided', 'auto'")

    def _take_from_branches(self) -> None:
        branches: Any = self.branches
        valid = isinstance(branches, list) and 0 < len(branches) <= MOST_BRANCHES
        valid = valid and all(isinstance(fields, dict) and fields.keys() == set(BRANCH_FIELDS) for fields in branches)
        check(self, "branches", valid, f"None or a list of up to {MOST_BRANCHES} dicts of {', '.join(BRANCH_FIELDS)}")
        parts = self.parts()
        check(
            self,
            "branches",
            all(isinstance(part.layers_to_transform, list) for part in parts),
            "given by layer indices",
        )
        self.r = sum(part.r for part in parts)
        self.layers_to_transform = sorted({layer_idx for part in parts for layer_idx in part.layer_indices})
        check_settings(self)

    def parts(self) -> list[PVMConfig]:
        """The configuration of each branch."""
        if self.branches is None:
            return [self]
        parts = [PVMConfig(**fields) for fields in self.branches]
        for part in parts:
            part.init_gate, part.init_weights = self.init_gate, self.init_weights
        return parts

    @property
    def layer_indices(self) -> list[int]:
        """`layers_to_transform`, once it is known for the base model.

        Raises:
            ValueError: It still says "strided" or "auto".
        """
        check(self, "layers_to_transform", isinstance(self.layers_to_transform, list), "resolved on a base model")
        return cast(list[int], self.layers_to_transform)

    def misfits(self, header: Mapping[str, torch.Tensor]) -> list[str]:
        parts = self.parts()
        needed = {
            f".layers.{layer_idx}.pvm.{weight_name(name, number)}.weight": (name, number)
            for number, part in enumerate(parts)
            for layer_idx in part.layer_indices
            for name in WEIGHTS
        }
        own = {key: key[key.rindex(".layers.") :] for key in header if ".layers." in key and ".pvm.pvm_" in key}
        prefixes = {key.removesuffix(end) for key, end in own.items()}
        problems = [f"its layers have different names, {quoted(sorted(prefixes))}"] if len(prefixes) > 1 else []
        sizes: dict[tuple[str | int, int], int] = {}
        for number, part in enumerate(parts):
            sizes |= {("r", number): part.r, (1, number): 1}
        for key, tensor in header.items():
            if key not in own:
                if not any(f"{saved}." in key.removeprefix(PEFT_PREFIX) for saved in self.modules_to_save or ()):
                    problems.append(f"{key} is not PVM's, and modules_to_save does not name it")
            elif own[key] not in needed:
                problems.append(f"its configuration knows nothing of {key}")
            elif not tensor.is_floating_point():
                problems.append(f"{key} holds {tensor.dtype}, not floating-point numbers")
            else:
                name, number = needed[own[key]]
                wanted = [(size, 0 if size == "hidden" else number) for size in SIZES[name]]
                shape = [sizes.setdefault(size, length) for size, length in zip(wanted, tensor.shape)]
                if shape != list(tensor.shape) or len(wanted) != tensor.dim():
                    problems.append(f"{key} has shape {tuple(tensor.shape)}, which does not go with the others")
        return problems + [f"it lacks {end}" for end in sorted(needed.keys() - own.values())]

    def gates(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[int, float]]:
        gates = []
        for number, part in enumerate(self.parts()):
            name = f".pvm.{weight_name('gate', number)}.weight"
            found = {key.rpartition(".layers.")[2]: tensor for key, tensor in tensors.items() if key.endswith(name)}
            gates.append({layer_idx: float(found[f"{layer_idx}{name}"]) for layer_idx in part.layer_indices})
        return gates


def _experts_of_a_token(text_config: Any) -> int:
    shared = getattr(text_config, "shared_expert_intermediate_size", 0)
    return text_config.num_experts_per_tok * text_config.moe_intermediate_size + shared


def _rounded_by_lfm2(text_config: Any) -> int:
    width = text_config.intermediate_size
    if text_config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if text_config.block_ffn_dim_multiplier is not None:
            multiple = text_config.block_multiple_of
            width = multiple * math.ceil(int(text_config.block_ffn_dim_multiplier * width) / multiple)
    return width


def _with_experts_beside(text_config: Any) -> int:
    experts = text_config.top_k_experts * text_config.moe_intermediate_size if text_config.enable_moe_block else 0
    return text_config.intermediate_size + experts


# By the text model's `model_type`: the width of the FFN that a token passes, where `intermediate_size` is not that.
FFN_WIDTHS: dict[str, Callable[[Any], int]] = {
    "gemma4_text": _with_experts_beside,
    "lfm2": _rounded_by_lfm2,
    "qwen3_5_moe_text": _experts_of_a_token,  # has no `intermediate_size`
    "qwen3_omni_moe_text": _experts_of_a_token,  # that of the published config is one expert's
}


def ffn_width(text_config: Any) -> int:
    """The width of the base model's FFN, of which a branch's MLP keeps the ratio to `hidden_size`."""
    width_of = FFN_WIDTHS.get(getattr(text_config, "model_type", ""))
    if width_of is not None:
        return width_of(text_config)
    width = _first(text_config, "intermediate_size", "ffn_dim", hint="; set PVMConfig.mlp_ratio")
    return max(width) if isinstance(width, Sequence) else width  # Gemma 3n: a list


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
        hidden_act: The base's activation function, by name; SiLU where that has weights of its own.
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
        text_config = text_config.per_layer_config[0]  # layers may differ, as in Step 3.7: all branches have one shape
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
            ratio = ffn_width(text_config) / text_config.hidden_size
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
            hidden_act=_activation(text_config),
            # A config that names none leaves it to torch, as that of OPT does.
            eps=_first(text_config, "rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", default=1e-5),
            initializer_range=_first(text_config, "initializer_range", "init_std"),
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


def _activation(text_config: Any) -> str:
    """The base's activation function, by name; the paper's where it has weights, which a branch has no place for, or
    where the config leaves it to the code, as that of LFM2 does."""
    name = _first(text_config, "hidden_act", "hidden_activation", "activation_function", default="silu")
    return "silu" if list(ACT2FN[name].parameters()) else name


def _first(text_config: Any, *names: str, default: Any = None, hint: str = "") -> Any:
    values = (getattr(text_config, name, None) for name in names)
    if (value := next((value for value in values if value is not None), default)) is not None:
        return value
    raise ValueError(
        f"{type(text_config).__name__} has none of {', '.join(names)}, which PVM's sizes come from{hint}."
    )

"""The configuration of a PVM adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from ..checks import check, is_int, is_number, is_text, layer_list
from ..tuners.base import VisualConfig


MEMORY_VISIBILITY = ("causal", "sample")
MEMORY_SOURCE = ("embeddings", "hidden_states")
WIDEST = 2**20  # what a branch can be; a file that asks for more is damaged
MOST_BRANCHES = MOST_MODULES = 64  # of one adapter
BRANCH_FIELDS = ("r", "layers_to_transform", "memory_visibility", "memory_source", "mlp_ratio")


@dataclass
class PVMConfig(VisualConfig):
    """Configuration of PVM (Persistent Visual Memory), arXiv 2605.00814.

    PVM adds a small trainable branch beside the FFN of a few decoder layers. Every text token looks up the raw visual
    embeddings there by cross-attention without positions, so the distance to the image does not matter.

    Args:
        r: Width of the branch, a multiple of the base model's head size. The paper takes 512 (1024 and 2048 did
            worse).
        layers_to_transform: The decoder layers that get a branch: "strided" or a list of indices (or one).
            "strided" is the paper's set for Qwen3-VL-4B (5, 11, 17) and Qwen3-VL-8B (8, 16, 24), and on other models
            three layers at 2/9, 4/9 and 6/9 of the depth.
        init_gate: Initial value of the scalar that scales the branch. 0 leaves the model's output as it is, and
            learns: only the gate has a gradient in the first step, everything from the second step on.
        memory_visibility: Which visual tokens a text token may look up. "causal": those before it, which keeps cached
            decoding equal to the full forward over several turns and hides later images from earlier answers.
            "sample": all of its sample, also later ones, as in the authors' code.
        memory_source: What is looked up. "embeddings": what the vision tower wrote into the input embeddings.
            "hidden_states": the hidden states of the visual tokens at the same layer, the paper's ablation, which did
            far worse than no branch at all (33.4 against 59.4; the paper does not say which states, this is our
            reading).
        mlp_ratio: Width of the branch's MLP, as a multiple of `r`. `None` takes the base model's ratio.
        modules_to_save: Modules of the base model that are trained and saved along with the adapter.
        branches: Of an adapter that was put together from several ("cat" of `add_weighted_adapter`): what each branch
            is made with, as dicts of `r`, `layers_to_transform` (indices), `memory_visibility`, `memory_source` and
            `mlp_ratio`. The adapter's own `r` is then their sum, and its layers are all of theirs; the other three say
            nothing. `None`: one branch.
        lineage: Set on attaching, do not choose it: a hash of the adapter's initial weights, which training on and
            loading keep. Adapters of one lineage can be averaged.
        format_version: Of the saved adapter: leave it.
        init_weights: Whether to initialise so that training can start from the unchanged model: the gate as
            `init_gate` says, all matrices from N(0, initializer_range) of the base. `False` also draws the gate, from
            N(0, 1), so that the branch acts at once: for tests.

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

    r: int = field(
        default=512, metadata={"help": "Width of the branch; must be a multiple of the base model's head size."}
    )
    layers_to_transform: list[int] | int | Literal["strided"] = field(
        default="strided",
        metadata={
            "help": "Indices of the decoder layers that get a branch, or 'strided': the paper's layers for "
            "Qwen3-VL-4B and -8B, on other models three layers at 2/9, 4/9 and 6/9 of the depth."
        },
    )
    init_gate: float = field(
        default=0.0,
        metadata={"help": "Initial value of the scalar that scales the branch; 0 leaves the model's output as it is."},
    )
    memory_visibility: Literal["causal", "sample"] = field(
        default="causal",
        metadata={
            "help": "Which visual tokens a text token may look up: 'causal', those before it, or 'sample', all of its "
            "sample, also later ones (as in the authors' code)."
        },
    )
    memory_source: Literal["embeddings", "hidden_states"] = field(
        default="embeddings",
        metadata={
            "help": "What is looked up: 'embeddings', the vision tower's output as it enters the text model, or "
            "'hidden_states', the visual tokens' hidden states at the same layer (the paper's ablation)."
        },
    )
    mlp_ratio: float | None = field(
        default=None,
        metadata={"help": "Width of the branch's MLP as a multiple of r; None takes the base model's ratio."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules of the base model that are trained and saved along with the adapter."},
    )
    branches: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "What each branch of an adapter is made with that was put together from several."},
    )
    lineage: str | None = field(
        default=None,
        metadata={"help": "Hash of the initial weights, set on attaching. Adapters of one lineage can be averaged."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True starts training from the unchanged model; False also draws the gate at random, for tests."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.branches is not None:
            self._take_from_branches()
        check(self, "r", is_int(self.r) and 0 < self.r <= WIDEST, f"an integer from 1 to {WIDEST}")
        if self.layers_to_transform != "strided":
            self.layers_to_transform = layer_list(self, "'strided'")
        check(self, "init_gate", is_number(self.init_gate), "a number that fits fp16")
        check(self, "init_weights", isinstance(self.init_weights, bool), "True or False")
        modules = self.modules_to_save
        valid = isinstance(modules, (list, tuple)) and len(modules) <= MOST_MODULES
        valid = valid and all(is_text(name, 200) and name for name in modules or ())
        check(self, "modules_to_save", modules is None or valid, "a list of module names or None")
        check(self, "memory_visibility", self.memory_visibility in MEMORY_VISIBILITY, f"one of {MEMORY_VISIBILITY}")
        check(self, "memory_source", self.memory_source in MEMORY_SOURCE, f"one of {MEMORY_SOURCE}")
        ratio = self.mlp_ratio
        check(self, "mlp_ratio", ratio is None or (is_number(ratio) and ratio > 0), "a positive number or None")
        valid = self.lineage is None or (is_text(self.lineage) and bool(re.fullmatch("[0-9a-f]{16}", self.lineage)))
        check(self, "lineage", valid, "a hash of 16 hexadecimal digits or None")

    def _take_from_branches(self) -> None:
        branches: Any = self.branches
        valid = isinstance(branches, list) and 0 < len(branches) <= MOST_BRANCHES
        valid = valid and all(isinstance(fields, dict) and fields.keys() == set(BRANCH_FIELDS) for fields in branches)
        check(self, "branches", valid, f"None or a list of up to {MOST_BRANCHES} dicts of {', '.join(BRANCH_FIELDS)}")
        parts = self.parts()
        check(self, "branches", all(part.layers_to_transform != "strided" for part in parts), "given by layer indices")
        self.r = sum(part.r for part in parts)
        self.layers_to_transform = sorted({layer_idx for part in parts for layer_idx in part.layer_indices})

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
            ValueError: It still says "strided".
        """
        check(self, "layers_to_transform", isinstance(self.layers_to_transform, list), "resolved on a base model")
        return cast(list[int], self.layers_to_transform)

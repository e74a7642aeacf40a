"""What a probe found: plain numbers that can be written, read back and shown again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders.data_file import holding, read_json
from .measures import Dilution, PowerLaw, mean_over_layers, rounded


if TYPE_CHECKING:
    from typing import Self


FORMAT_VERSION = 2


@dataclass(frozen=True)
class LayerAttention:
    """Where one layer looked, for each generated token, as attention weights averaged over heads.

    Attributes:
        layer_idx: The decoder layer.
        visual_mass: The attention on all visual tokens, a number in [0, 1] for each generated token.
        lowest_head: `visual_mass` of the head in which it is smallest.
        highest_head: `visual_mass` of the head in which it is largest.
        text_to_visual: Attention on text divided by attention on visual tokens. `None` if the latter is 0.
        text_tokens: How many non-visual tokens the query sees.
        sinks: The visual tokens that draw attention whatever the query is, counted from the first visual token.
        sink_mass: The attention that reaches the sinks.
        decay: The power law of `visual_mass` over `text_tokens`.
        dilution: The dilution law of the same numbers.
        scores_below_zero: Share of the scores of visual keys that are below 0 before any adapter changes them, over
            all heads, for each generated token. A method that multiplies scores by more than 1 takes attention from
            these keys.
    """

    layer_idx: int
    visual_mass: list[float]
    lowest_head: list[float]
    highest_head: list[float]
    text_to_visual: list[float | None]
    text_tokens: list[int]
    sinks: list[int]
    sink_mass: list[float]
    decay: PowerLaw | None
    dilution: Dilution | None
    scores_below_zero: list[float]

    @property
    def share_below_zero(self) -> float:
        """`scores_below_zero`, averaged over the generated tokens."""
        return sum(self.scores_below_zero) / len(self.scores_below_zero)

    @property
    def mass_without_sinks(self) -> list[float]:
        """The attention on visual tokens that are not sinks."""
        return [rounded(max(mass - sink, 0.0)) for mass, sink in zip(self.visual_mass, self.sink_mass)]


@dataclass(frozen=True)
class ForwardRecord:
    """One forward over prompt and answer.

    Attributes:
        name: "base", "adapters" (all active ones), or "only" and an adapter's name.
        adapters: The adapters that were active.
        attention: Where each layer with softmax attention looked.
        mean_decay: The power law of `mean_mass` over the `text_tokens` of the layer that sees most.
        mean_dilution: The dilution law of the same numbers.
        lens: For each layer, KL(final prediction || the layer's) at each generated token, in nats. `None`: the text
            model has no final norm that could be applied.
        kl_to_base: KL(this || base) of the prediction of each generated token, in nats; of the base itself 0.
        agreement: Share of the generated tokens that are this forward's first choice.
        choice_ids: For each generated token, the token that this forward would have chosen in its place.
        choices: The same as text.
        mean_map: The attention that reaches each visual token, averaged over heads, layers and generated tokens.
        maps: The same for some of the generated tokens, from the first to the last.
    """

    name: str
    adapters: list[str]
    attention: list[LayerAttention]
    mean_decay: PowerLaw | None
    mean_dilution: Dilution | None
    lens: list[list[float]] | None
    kl_to_base: list[float]
    agreement: float
    choice_ids: list[int]
    choices: list[str]
    mean_map: list[float]
    maps: dict[int, list[float]]

    @property
    def label(self) -> str:
        """What a reader calls it: "base", or the names of the adapters that act."""
        return " + ".join(self.adapters) or "base"

    @property
    def mean_mass(self) -> list[float]:
        """Visual mass averaged over layers, for each generated token."""
        return mean_over_layers([layer.visual_mass for layer in self.attention])

    @property
    def mean_mass_without_sinks(self) -> list[float]:
        """The same without the visual sinks of each layer."""
        return mean_over_layers([layer.mass_without_sinks for layer in self.attention])


@dataclass(frozen=True)
class AdapterRecord:
    """One attached adapter.

    Attributes:
        name: Its name.
        method: PEFT's name of its type.
        active: Whether it is among the active ones.
        kl_alone: KL(it alone || base) of the prediction of each generated token, in nats. `None`: it does not act.
    """

    name: str
    method: str
    active: bool
    kl_alone: list[float] | None


@dataclass(frozen=True)
class BranchRecord:
    """The PVM branch of one adapter in one layer, with all active adapters.

    Attributes:
        adapter: The adapter.
        layer_idx: The decoder layer.
        gate: The learned scalar that the branch is multiplied by.
        relative_update: The norm of its output divided by the norm of the residual stream that it reads, for each
            generated token.
        retrieval: For each chosen token, the branch's cross-attention over the visual tokens, averaged over heads. It
            adds up to 1.
    """

    adapter: str
    layer_idx: int
    gate: float
    relative_update: list[float]
    retrieval: dict[int, list[float]]


@dataclass(frozen=True)
class Findings:
    """The numbers of a `ProbeResult`, which explains the fields."""

    model_name: str
    prompt: str
    environment: dict[str, str]
    settings: dict[str, Any]
    num_prompt_tokens: int
    num_visual_tokens: int
    grids: list[tuple[int, int]]
    token_ids: list[int]
    tokens: list[str]
    base_token_ids: list[int]
    base_tokens: list[str]
    unobserved_layers: list[int]
    forwards: list[ForwardRecord]
    adapters: list[AdapterRecord]
    branches: list[BranchRecord]
    images: list[bytes] = field(default_factory=list, repr=False)

    @property
    def base(self) -> ForwardRecord:
        """The forward with every adapter off."""
        return self.forwards[0]

    @property
    def retrieval_tokens(self) -> list[int]:
        """The generated tokens whose retrieval was kept."""
        return sorted({token for branch in self.branches for token in branch.retrieval})

    def to_json(self) -> str:
        """All numbers, without the images."""
        content = asdict(self)
        num_images = len(content.pop("images"))
        content = {"format_version": FORMAT_VERSION, "num_images": num_images, **content}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read back what `ProbeResult.save` wrote.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: It holds no probe.json, or an image is missing.
            ValueError: The file has another format, or is damaged.
        """
        folder = Path(folder)
        path = folder / "probe.json"
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}. ProbeResult.load reads a folder that save wrote.")
        content = read_json(path)
        version = content.pop("format_version", None) if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}, this peft_pvm reads {FORMAT_VERSION}. Probe again."
            )
        with holding(path, "what ProbeResult.save writes"):
            images = [(folder / f"image-{number}.png").read_bytes() for number in range(content.pop("num_images"))]
            content["grids"] = [tuple(grid) for grid in content["grids"]]
            content["forwards"] = [_forward(forward) for forward in content["forwards"]]
            content["adapters"] = [AdapterRecord(**adapter) for adapter in content["adapters"]]
            content["branches"] = [_branch(branch) for branch in content["branches"]]
            return cls(**content, images=images)


def most_text_tokens(attention: list[LayerAttention]) -> list[int]:
    """How many non-visual tokens each query sees in the layer that sees most."""
    return [max(position) for position in zip(*(layer.text_tokens for layer in attention))]


def _forward(content: Mapping[str, Any]) -> ForwardRecord:
    attention = [LayerAttention(**{**layer, **_laws(layer, "")}) for layer in content["attention"]]
    maps = {int(token): weights for token, weights in content["maps"].items()}
    return ForwardRecord(**{**content, **_laws(content, "mean_"), "attention": attention, "maps": maps})


def _laws(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    decay, dilution = content[f"{prefix}decay"], content[f"{prefix}dilution"]
    return {
        f"{prefix}decay": decay and PowerLaw(**decay),
        f"{prefix}dilution": dilution and Dilution(**dilution),
    }


def _branch(content: Mapping[str, Any]) -> BranchRecord:
    retrieval = {int(token): weights for token, weights in content["retrieval"].items()}
    return BranchRecord(**{**content, "retrieval": retrieval})

"""What a probe found: plain numbers that can be saved, read back and shown again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data_file import holding, read_json
from ..extras import require
from ..replacing import replacing
from .decay import Dilution, PowerLaw, rounded


FORMAT_VERSION = 1
NEEDED_TO_DRAW = ("lab", "matplotlib")  # the extra, and the module


@dataclass(frozen=True)
class LayerAttention:
    """Where one layer looked, for each generated token, as attention weights averaged over heads.

    Attributes:
        layer_idx: The decoder layer.
        visual_mass: What reaches the visual tokens, a number in [0, 1] for each generated token.
        lowest_head: The same for the head in which it is smallest.
        highest_head: The same for the head in which it is largest.
        text_to_visual: Attention to text over attention to visual tokens. `None` where nothing reaches these.
        text_tokens: How many non-visual tokens the query sees.
        sinks: The visual tokens that draw mass whatever the query, counted from the first visual token.
        sink_mass: What reaches them.
        decay: Of `visual_mass` with `text_tokens`.
        dilution: The same.
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

    @property
    def mass_without_sinks(self) -> list[float]:
        """What reaches the other visual tokens."""
        return [rounded(max(mass - sink, 0.0)) for mass, sink in zip(self.visual_mass, self.sink_mass)]


@dataclass(frozen=True)
class ForwardRecord:
    """One forward over prompt and answer.

    Attributes:
        name: "base", "adapters" (as the model stands), or "only" and an adapter's name.
        adapters: Those that acted.
        attention: Of every layer that has softmax attention.
        mean_decay: Of the visual mass averaged over layers, with the `text_tokens` of the layer that sees most.
        mean_dilution: The same.
        lens: For each layer, KL(final prediction || the layer's) at each generated token, in nats. `None`: the text
            model has no final norm that could be applied.
        kl_to_base: KL(this || base) of the prediction of each generated token, in nats; of the base itself 0.
        agreement: Share of the generated tokens that are this forward's first choice.
    """

    name: str
    adapters: list[str]
    attention: list[LayerAttention]
    mean_decay: PowerLaw | None
    mean_dilution: Dilution | None
    lens: list[list[float]] | None
    kl_to_base: list[float]
    agreement: float

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
        active: Whether it acts as the model stands.
        kl_alone: KL(it alone || base) of the prediction of each generated token, in nats. `None`: it does not act.
    """

    name: str
    method: str
    active: bool
    kl_alone: list[float] | None


@dataclass(frozen=True)
class BranchRecord:
    """The PVM branch of one adapter in one layer, with all adapters as they stand.

    Attributes:
        adapter: The adapter.
        layer_idx: The decoder layer.
        gate: The learned scalar that the branch is multiplied by.
        relative_update: Norm of what it adds over the norm of the residual stream that it reads, for each generated
            token.
        retrieval: By generated token, for the chosen ones, its cross-attention over the visual tokens, averaged over
            heads; adds up to 1.
    """

    adapter: str
    layer_idx: int
    gate: float
    relative_update: list[float]
    retrieval: dict[int, list[float]]


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found. Every number is rounded to six significant digits.

    Attributes:
        model_name: The model.
        prompt: As given.
        environment: Versions and device.
        settings: What the probe was asked for, and how the model computes.
        num_prompt_tokens: Length of the prompt.
        num_visual_tokens: Visual tokens among them.
        grids: Rows and columns of visual tokens, for each image, where they are known; otherwise empty.
        token_ids: What was generated.
        tokens: The same as text.
        unobserved_layers: Decoder layers without softmax attention, which have no weights to record.
        forwards: The base first.
        adapters: All that are attached.
        branches: Of the PVM adapters that act.
        images: PNG files of what was looked at, for the report.
    """

    model_name: str
    prompt: str
    environment: dict[str, str]
    settings: dict[str, Any]
    num_prompt_tokens: int
    num_visual_tokens: int
    grids: list[tuple[int, int]]
    token_ids: list[int]
    tokens: list[str]
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

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `probe.json`, the pictures and `report.html`, all or none. The same result gives the same bytes.

        Args:
            folder: Made if it is not there; files of the same name are overwritten.

        Returns:
            The path of the report.

        Raises:
            ImportError: matplotlib is not installed. All but the pictures and the report is written by then: `load`
                reads it where matplotlib is.
        """
        from .html import report

        missing = None
        try:
            require(*NEEDED_TO_DRAW)
        except ImportError as error:
            missing = error
        else:
            from .plots import draw

            pictures = draw(self)
        with replacing(folder, entry="probe.json") as staged:
            for number, image in enumerate(self.images):
                (staged / f"image-{number}.png").write_bytes(image)
            (staged / "probe.json").write_text(self.to_json(), encoding="utf-8", newline="\n")
            if missing is None:
                for picture in pictures:
                    (staged / f"{picture.name}.png").write_bytes(picture.png)
                (staged / "report.html").write_text(report(self, pictures), encoding="utf-8", newline="\n")
        if missing is not None:
            raise ImportError(f"{folder} has the numbers, but neither pictures nor report. {missing}") from missing
        return Path(folder) / "report.html"

    def to_json(self) -> str:
        """All numbers, without the images."""
        content = asdict(self)
        num_images = len(content.pop("images"))
        content = {"format_version": FORMAT_VERSION, "num_images": num_images, **content}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ProbeResult:
        """Read back what `save` wrote.

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
            raise ValueError(f"{path} has format_version {version!r}, this peft_pvm reads {FORMAT_VERSION}.")
        with holding(path, "what ProbeResult.save writes"):
            images = [(folder / f"image-{number}.png").read_bytes() for number in range(content.pop("num_images"))]
            content["grids"] = [tuple(grid) for grid in content["grids"]]
            content["forwards"] = [_forward(forward) for forward in content["forwards"]]
            content["adapters"] = [AdapterRecord(**adapter) for adapter in content["adapters"]]
            content["branches"] = [_branch(branch) for branch in content["branches"]]
            return cls(**content, images=images)


def _forward(content: Mapping[str, Any]) -> ForwardRecord:
    attention = [LayerAttention(**{**layer, **_laws(layer, "")}) for layer in content["attention"]]
    return ForwardRecord(**{**content, **_laws(content, "mean_"), "attention": attention})


def _laws(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    decay, dilution = content[f"{prefix}decay"], content[f"{prefix}dilution"]
    return {
        f"{prefix}decay": decay and PowerLaw(**decay),
        f"{prefix}dilution": dilution and Dilution(**dilution),
    }


def _branch(content: Mapping[str, Any]) -> BranchRecord:
    retrieval = {int(token): weights for token, weights in content["retrieval"].items()}
    return BranchRecord(**{**content, "retrieval": retrieval})


def mean_over_layers(by_layer: list[list[float]]) -> list[float]:
    """The mean of each position over layers."""
    return [rounded(sum(position) / len(position)) for position in zip(*by_layer)]


def numbers(tensor: torch.Tensor) -> Any:
    """A tensor as (nested) lists of rounded numbers."""
    values = tensor.tolist()
    return _rounded_all(values)


def _rounded_all(values: Any) -> Any:
    return [_rounded_all(value) for value in values] if isinstance(values, list) else rounded(values)

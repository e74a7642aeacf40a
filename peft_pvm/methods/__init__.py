"""The methods: one row each. Tests, demo, measurements, commands and the tables in the docs follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..tuners.base import VisualConfig
from .cai import CAIConfig, CAIModel
from .dipe import DIPEConfig, DIPEModel
from .hgai import HGAIConfig, HGAIModel
from .log_bias import LogBiasConfig, LogBiasModel
from .m3id import M3IDConfig, M3IDModel
from .memvr import MemVRConfig, MemVRModel
from .pai import PAIConfig, PAIModel
from .pvm import PVMConfig, PVMModel, hotswap_adapter
from .savaa import SAVAAConfig, SAVAAModel
from .sparc import SPARCConfig, SPARCModel
from .tdrs import TDRSConfig, TDRSModel
from .vaf import VAFConfig, VAFModel
from .var import VARConfig, VARModel
from .vcd import VCDConfig, VCDModel
from .vista import VISTAConfig, VISTAModel


# What `peft_pvm` exports.
__all__ = [
    "CAIConfig",
    "CAIModel",
    "DIPEConfig",
    "DIPEModel",
    "HGAIConfig",
    "HGAIModel",
    "LogBiasConfig",
    "LogBiasModel",
    "M3IDConfig",
    "M3IDModel",
    "MemVRConfig",
    "MemVRModel",
    "PAIConfig",
    "PAIModel",
    "PVMConfig",
    "PVMModel",
    "SAVAAConfig",
    "SAVAAModel",
    "SPARCConfig",
    "SPARCModel",
    "TDRSConfig",
    "TDRSModel",
    "VAFConfig",
    "VAFModel",
    "VARConfig",
    "VARModel",
    "VCDConfig",
    "VCDModel",
    "VISTAConfig",
    "VISTAModel",
    "hotswap_adapter",
]


@dataclass(frozen=True)
class Method:
    """A method of this package.

    Attributes:
        name: What tables call it; in lower case, what commands call it.
        config: Its configuration.
        does: What it does, in half a sentence.
        changes: The part of a forward that it changes, for methods without parameters a kind of
            stage, or the logits of `generate`.
        kernels: Which attention kernels it runs on, and what it runs beside them.
        tuner: Its tuner, if the configuration is not all of it.
        full_name: What else it is called.
        parameters: How many it has.
        text_alone: What becomes of a row of the batch without images: "untouched", to the bit, also beside rows with
            images; "equal", where another kernel may compute the same; or "changed".
        of_the_model: Settings that have to be found for each model, here so that the method runs on any.
        plain_matrices: How many matrices of scores of all heads, in fp32, its plain form holds at once. `None`: it has
            no plain form.
    """

    name: str
    config: type[VisualConfig]
    does: str
    changes: str
    kernels: str
    tuner: Any = None
    full_name: str = ""
    parameters: str = "none"
    text_alone: Literal["untouched", "equal", "changed"] = "equal"
    of_the_model: Mapping[str, Any] = field(default_factory=dict)
    plain_matrices: int | None = 4

    @property
    def needs_training(self) -> bool:
        """Whether it has parameters."""
        return self.config.has_parameters

    @property
    def acts_in_forwards(self) -> bool:
        """Whether it changes one forward over a whole text, and not only what comes of several."""
        return self.config.acts_in_forwards

    @property
    def page(self) -> str:
        """Its page, under `docs/`."""
        return f"methods/{self.name.lower()}.md"


METHODS = (
    Method(
        "PVM",
        PVMConfig,
        "a branch beside the FFN of a few decoder layers looks up the raw visual embeddings, whatever the distance",
        "FFN",
        "any; in its layers, a second attention, to the visual tokens only",
        tuner=PVMModel,
        full_name="Persistent Visual Memory",
        parameters="27.9 M on Qwen3-VL-8B",
        text_alone="untouched",
        plain_matrices=0,
    ),
    Method(
        "DIPE",
        DIPEConfig,
        "scores between text and image use anchored positions, so that their distance does not grow beyond a limit",
        "Positions",
        "any; runs twice in a forward with an image, or once with wider heads",
    ),
    Method(
        "T-DRS",
        TDRSConfig,
        "attention is reweighted by similarity and distance",
        "Weights",
        "its own: blockwise, or Triton on a GPU",
        text_alone="changed",
        plain_matrices=12,
    ),
    Method(
        "VAF",
        VAFConfig,
        "in the text after the image, scores of visual keys are raised",
        "KeyScale",
        "any; runs twice in a forward with an image, on sdpa only up to the image's end",
    ),
    Method(
        "Log-bias",
        LogBiasConfig,
        "scores of visual keys are raised by the logarithm of the length of the text after the image",
        "Bias",
        "any, with 8 more channels in each head",
        full_name="the null model",
    ),
    Method(
        "PAI",
        PAIConfig,
        "in the text after the image, each score of a visual key is raised by a share of its size",
        "Scores",
        "any; computes the scores of visual keys once more",
    ),
    Method(
        "HGAI",
        HGAIConfig,
        "in all heads, scores of visual keys are raised by a share of their mean size over the heads",
        "Scores",
        "any; computes the scores of visual keys once more",
    ),
    Method(
        "CAI",
        CAIConfig,
        "in layers where the model is still undecided, scores of visual keys that are like the token are raised",
        "Scores",
        "any; computes the scores of visual keys twice more, and the output layer once more in each of its layers",
        full_name="Context-aware Attention Intervention",
    ),
    Method(
        "VAR",
        VARConfig,
        "in heads that look at the image, part of the attention on sinks is moved to the other visual tokens",
        "GroupWeights",
        "any; in a forward with an image, on values three times as wide",
        full_name="Visual Attention Redistribution",
        of_the_model={"sink_channels": [0]},
    ),
    Method(
        "SAVAA",
        SAVAAConfig,
        "while an answer is written, scores of visual keys are raised, and more so after a risky token",
        "KeyScale",
        "any; in a step of decoding, computes its row of scores by itself",
    ),
    Method(
        "SPARC",
        SPARCConfig,
        "visual tokens whose attention rises during the answer count for more from then on",
        "Values",
        "any; in one layer, computes the scores of the last row once more",
        full_name="Selective Progressive Attention ReCalibration",
    ),
    Method(
        "MemVR",
        MemVRConfig,
        "where the model is undecided in a middle layer, the FFN's output is mixed with a lookup in the image",
        "FFN",
        "any; runs the output layer once more in each of its layers",
        full_name="Memory-Space Visual Retracing",
        text_alone="untouched",
        plain_matrices=None,
    ),
    Method(
        "VISTA",
        VISTAConfig,
        "in `generate`, outputs of FFNs are turned in the direction in which the image changes the prompt's end",
        "FFN",
        "any; in `generate`, reads the prompt twice more",
        full_name="Visual Information Steering",
        text_alone="untouched",
        plain_matrices=None,
    ),
    Method(
        "M3ID",
        M3IDConfig,
        "tokens that the image makes likelier than the text alone are raised, and more so in long answers",
        "Logits",
        "any; in `generate`, runs a second forward for each token",
        text_alone="untouched",
        plain_matrices=0,
    ),
    Method(
        "VCD",
        VCDConfig,
        "tokens that are also likely with a noised image are lowered",
        "Logits",
        "any; in `generate`, runs a second forward for each token",
        text_alone="untouched",
        plain_matrices=0,
    ),
)

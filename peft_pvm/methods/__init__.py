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
        text_alone: What a row without images is to it: "untouched", to the bit, also beside rows with images;
            "equal", where another kernel may compute the same; or "changed".
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
        "any; in its layers, an attention to the visual tokens beside it",
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
        "any; twice in a forward with an image, or once with wider heads",
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
        "scores of visual keys are raised in the text that follows",
        "KeyScale",
        "any; twice in a forward with an image, on sdpa up to the image's end",
    ),
    Method(
        "Log-bias",
        LogBiasConfig,
        "scores of visual keys are raised by the logarithm of the length of the text that follows",
        "Bias",
        "any, with 8 channels more a head",
        full_name="the null model",
    ),
    Method(
        "PAI",
        PAIConfig,
        "scores of visual keys are raised by a share of their size in the text that follows",
        "Scores",
        "any; the scores of visual keys once more",
    ),
    Method(
        "HGAI",
        HGAIConfig,
        "scores of visual keys are raised in all heads by a share of their mean size over heads",
        "Scores",
        "any; the scores of visual keys once more",
    ),
    Method(
        "CAI",
        CAIConfig,
        "scores of the visual keys that are like a token are raised in layers that it enters undecided",
        "Scores",
        "any; the scores of visual keys twice more, and the head once in each of its layers",
        full_name="Context-aware Attention Intervention",
    ),
    Method(
        "VAR",
        VARConfig,
        "a part of what attention sinks take goes to the other visual tokens, in heads that look at the image",
        "GroupWeights",
        "any; in a forward with an image, over values three times as wide",
        full_name="Visual Attention Redistribution",
        of_the_model={"sink_channels": [0]},
    ),
    Method(
        "SAVAA",
        SAVAAConfig,
        "scores of visual keys are raised while an answer is written, the more the riskier the last token was",
        "KeyScale",
        "any; in a step of decoding, its row of scores by hand",
    ),
    Method(
        "SPARC",
        SPARCConfig,
        "visual tokens that a token of the answer looks at more than before count for more from then on",
        "Values",
        "any; in one layer, the scores of the last row once more",
        full_name="Selective Progressive Attention ReCalibration",
    ),
    Method(
        "MemVR",
        MemVRConfig,
        "where the model is undecided in a middle layer, the output of its FFN is mixed with what the image says",
        "FFN",
        "any; the head once more in each of its layers",
        full_name="Memory-Space Visual Retracing",
        text_alone="untouched",
        plain_matrices=None,
    ),
    Method(
        "VISTA",
        VISTAConfig,
        "what FFNs return in `generate` is turned towards what the image changes at the end of the prompt",
        "FFN",
        "any; in `generate`, the prompt read twice more",
        full_name="Visual Information Steering",
        text_alone="untouched",
        plain_matrices=None,
    ),
    Method(
        "M3ID",
        M3IDConfig,
        "what the image makes likelier than the text alone is raised, the more the longer the answer",
        "Logits",
        "any; in `generate`, a second forward for each token",
        text_alone="untouched",
        plain_matrices=0,
    ),
    Method(
        "VCD",
        VCDConfig,
        "what a noised image makes likely is subtracted, among the likely tokens",
        "Logits",
        "any; in `generate`, a second forward for each token",
        text_alone="untouched",
        plain_matrices=0,
    ),
)

"""The methods: one row each. Tests, demo, measurements and the tables in the docs follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..tuners.attention_method import AttentionMethod
from ..tuners.base import VisualConfig
from .dipe import DIPEConfig, DIPEModel
from .log_bias import LogBiasConfig, LogBiasModel
from .pvm import PVMConfig, PVMModel, hotswap_adapter
from .tdrs import TDRSConfig, TDRSModel
from .vaf import VAFConfig, VAFModel


# What `peft_pvm` exports.
__all__ = [
    "DIPEConfig",
    "DIPEModel",
    "LogBiasConfig",
    "LogBiasModel",
    "PVMConfig",
    "PVMModel",
    "TDRSConfig",
    "TDRSModel",
    "VAFConfig",
    "VAFModel",
    "hotswap_adapter",
]


@dataclass(frozen=True)
class Method:
    """A method of this package.

    Attributes:
        name: What tables call it; in lower case, what commands call it.
        config: Its configuration.
        tuner: Its tuner, if the configuration is not all of it.
        text_alone: What a row without images is to it: "untouched", to the bit, also beside rows with images;
            "equal", where another kernel may compute the same; or "changed".
        plain_matrices: How many matrices of scores of all heads, in fp32, its plain form holds at once.
    """

    name: str
    config: type[VisualConfig]
    tuner: Any = None
    text_alone: Literal["untouched", "equal", "changed"] = "equal"
    plain_matrices: int = 4

    @property
    def needs_training(self) -> bool:
        """Whether it has parameters."""
        return not issubclass(self.config, AttentionMethod)


METHODS = (
    Method("PVM", PVMConfig, PVMModel, text_alone="untouched", plain_matrices=0),
    Method("DIPE", DIPEConfig),
    Method("T-DRS", TDRSConfig, text_alone="changed", plain_matrices=12),
    Method("VAF", VAFConfig),
    Method("Log-bias", LogBiasConfig),
)

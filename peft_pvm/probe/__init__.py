"""How much a vision-language model looks at its image while it answers, and what adapters change about that."""

from .findings import AdapterRecord, BranchRecord, ForwardRecord, LayerAttention
from .inputs import build_inputs, picture_of
from .measures import Dilution, PowerLaw, fit_dilution, fit_power_law
from .report import ProbeResult
from .run import probe
from .words import verdict


__all__ = [
    "AdapterRecord",
    "BranchRecord",
    "Dilution",
    "ForwardRecord",
    "LayerAttention",
    "PowerLaw",
    "ProbeResult",
    "build_inputs",
    "fit_dilution",
    "fit_power_law",
    "picture_of",
    "probe",
    "verdict",
]

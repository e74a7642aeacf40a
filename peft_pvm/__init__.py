"""Adapters that keep vision-language models looking at the image. Importing registers their types with PEFT."""

from .checkpoints import convert_reference_checkpoint, export_reference_checkpoint
from .loading import add_adapters, load_adapters, save_adapter
from .methods.dipe import DIPEConfig, DIPEModel
from .methods.tdrs import TDRSConfig, TDRSModel
from .pvm import PVMConfig, PVMModel, hotswap_adapter
from .registry import extend_peft, register
from .tuners.attached import attached
from .versions import check_versions


__version__ = "0.1.0"
__all__ = [
    "DIPEConfig",
    "DIPEModel",
    "PVMConfig",
    "PVMModel",
    "TDRSConfig",
    "TDRSModel",
    "add_adapters",
    "attached",
    "convert_reference_checkpoint",
    "export_reference_checkpoint",
    "hotswap_adapter",
    "load_adapters",
    "save_adapter",
]

check_versions()
register(PVMConfig, PVMModel)
register(DIPEConfig)
register(TDRSConfig)
extend_peft()

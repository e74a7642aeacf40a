"""Adapters that keep vision-language models looking at the image. Importing registers their types with PEFT."""

from .pvm import PVMConfig, PVMModel
from .registry import register, remember_adapter_sources


__version__ = "0.1.0"
__all__ = ["PVMConfig", "PVMModel"]

register("pvm", PVMConfig, PVMModel)
remember_adapter_sources()

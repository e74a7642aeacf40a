"""PVM, Persistent Visual Memory (arXiv 2605.00814): a learnable memory of the image beside the FFN."""

from .checkpoints import hotswap_adapter
from .config import PVMConfig
from .layer import PVMLayer
from .model import PVMModel


__all__ = ["PVMConfig", "PVMLayer", "PVMModel", "hotswap_adapter"]

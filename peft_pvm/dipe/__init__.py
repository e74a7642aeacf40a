"""DIPE: the distance between text and image does not grow."""

from .config import DIPEConfig
from .model import DIPEModel


__all__ = ["DIPEConfig", "DIPEModel"]

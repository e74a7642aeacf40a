"""T-DRS: attention reweighted at inference by similarity and distance."""

from .config import TDRSConfig
from .model import TDRSModel


__all__ = ["TDRSConfig", "TDRSModel"]

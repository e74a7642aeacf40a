"""T-DRS: attention reweighted by similarity and distance."""

from ...tuners.attention_method import attention_tuner
from .method import TDRSConfig


__all__ = ["TDRSConfig", "TDRSModel"]

TDRSModel = attention_tuner(TDRSConfig)

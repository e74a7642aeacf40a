"""DIPE: the distance between text and image does not grow."""

from ...tuners.attention_method import attention_tuner
from .method import DIPEConfig


__all__ = ["DIPEConfig", "DIPEModel"]

DIPEModel = attention_tuner(DIPEConfig)

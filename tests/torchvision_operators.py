"""For machines where torchvision is built for CUDA and torch for CPUs: what lmms-eval needs of it is plain torch."""

from __future__ import annotations

import importlib.util

import torch


def declare_missing_operators() -> None:
    """Let torchvision be imported without its own operators, by declaring the two that its import looks for."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

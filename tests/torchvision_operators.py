"""A plugin for pytest where torchvision is built for CUDA and torch for CPUs: `pytest -p torchvision_operators`.

torchvision then cannot be imported, for want of its own operators. What lmms-eval and transformers need of it is plain
torch, so it is enough to declare the two operators that the import looks for. Nothing calls them.
"""

from importlib.util import find_spec

import torch


if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

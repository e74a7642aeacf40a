"""For a Python that has torchvision built for CUDA beside a torch for CPUs: this folder belongs on PYTHONPATH.

torchvision then cannot be imported, for want of its own operators. What transformers, lmms-eval and vLLM need of it is
plain torch, so it is enough to declare the two operators that its import looks for, in every process that imports it.
Nothing calls them.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, _BeforeTorchvision())

"""For a Python that has torchvision's wheel for CUDA beside a torch for the CPU, which is all that the package index has.

Its compiled operators cannot be loaded there, and importing it stops where it describes two of them that it does not
compile itself. Nothing here calls them. This module, on PYTHONPATH, declares them in every process of vLLM.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["torch"]._peft_pvm_tests_library = self.library  # for as long as the process lives


sys.meta_path.insert(0, _BeforeTorchvision())

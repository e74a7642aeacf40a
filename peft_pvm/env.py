"""`python -m peft_pvm.env` prints what a bug report needs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import torch

from .utils.packages import supported_ranges


PACKAGES = ("peft-pvm", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub", "trl", "vllm")


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that matter, and the devices.

    Returns:
        What is reported, by name, in the order in which it is printed. A package that is missing says so.
    """
    report = {"Python": platform.python_version(), "Platform": platform.platform()}
    for package in PACKAGES:
        report[package] = _version(package)
    report["CPU"] = f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})"
    report["CPU threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        report["GPU"] = (
            f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}, {torch.cuda.device_count()} in all)"
        )
    else:
        report["GPU"] = "none"
    return report


def _cpu() -> str:
    find = getattr(torch.cpu, "get_capabilities", None)  # older releases of torch have none
    return (find and find().get("cpu_name")) or platform.processor() or platform.machine()


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):  # such as vLLM's build for CPUs
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "not installed"


if __name__ == "__main__":
    for name, value in environment().items():
        print(f"- {name}: {value}")
    print(f"- Supported: {supported_ranges()}")

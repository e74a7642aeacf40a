"""Serving with vLLM: its plugin, found by the entry point `vllm.general_plugins`, and what makes a folder for it."""

from .export import ARCHITECTURE, export_vllm


__all__ = ["export_vllm", "register"]


def register() -> None:
    """Make our architecture known to vLLM. It calls this in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")

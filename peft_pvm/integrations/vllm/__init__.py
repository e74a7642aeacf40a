"""Serving with vLLM: its plugin, found by the entry point `vllm.general_plugins`, and what makes a folder for it."""

from .choices import serve_arguments
from .export import export_vllm, serve_environment
from .families import FAMILIES


__all__ = ["export_vllm", "register", "serve_arguments", "serve_environment"]


def register() -> None:
    """Make our architectures known to vLLM, which calls this function in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, f"{__name__}.model:{family.architecture}")
        if family.native in MODELS_CONFIG_MAP:  # such as the dtype of Qwen3.5's recurrent states
            MODELS_CONFIG_MAP[family.architecture] = MODELS_CONFIG_MAP[family.native]

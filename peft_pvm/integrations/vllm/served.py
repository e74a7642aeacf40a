"""What the config of an exported folder says of the adapters."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftConfig

from ...methods.dipe import DIPEConfig
from ...pvm import PVMConfig


ARCHITECTURE = "PeftPVMQwen3VLForConditionalGeneration"
FIELD = "peft_pvm"  # of the text config, where the adapters stand by method


def fields_of(config: PeftConfig) -> dict[str, Any]:
    """What is written of an adapter's configuration. Where it was trained may be a path, and is nobody's business."""
    left_out = ("base_model_name_or_path", "revision")
    return {name: value for name, value in config.to_dict().items() if value is not None and name not in left_out}


def configs_of(text_config: Any) -> tuple[PVMConfig | None, DIPEConfig | None]:
    """The adapters' configurations, as `export_vllm` wrote them into a text config."""
    by_method = getattr(text_config, FIELD)
    found = [PeftConfig.from_peft_type(**by_method[name]) if name in by_method else None for name in ("pvm", "dipe")]
    return found[0], found[1]


def acts_on(dipe: DIPEConfig, layer_idx: int) -> bool:
    """Whether DIPE acts on a decoder layer of Qwen3-VL, which all rotate queries and keys."""
    layers = dipe.layers_to_transform
    return layers is None or layer_idx in cast(list[int], layers)

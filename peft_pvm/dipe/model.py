"""The DIPE tuner."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..attention import Steering
from ..context import VisualContext
from ..families import VisionLanguageModel
from ..steering import SteeringLayer, SteeringTuner
from .anchored import AnchoredScoring
from .config import DIPEConfig


class DIPELayer(SteeringLayer[DIPEConfig]):
    """Stands beside the text model and anchors scores in the layers of the active adapters; several make a union."""

    def __init__(self, vlm: VisionLanguageModel, layers: list[int]):
        super().__init__(vlm, layers)
        rotary = cast(nn.Module, vlm.rotary)  # DIPEModel has made sure that there is one
        self._scorings = {layer_idx: AnchoredScoring(rotary, vlm.layer_type(layer_idx)) for layer_idx in layers}

    def plan(self, context: VisualContext, configs: dict[str, DIPEConfig]) -> None:
        by_layer = {layer_idx: name for name, config in configs.items() for layer_idx in self.layers_of(config)}
        for layer_idx, adapter_name in by_layer.items():
            Steering.add(context, layer_idx, adapter_name, scoring=self._scorings[layer_idx])


class DIPEModel(SteeringTuner):
    """Attaches DIPE to a vision-language model. Source: arXiv 2603.10863.

    The text model gets a child `dipe` without parameters. Layers that do not rotate queries and keys (some of Llama 4
    and Cohere 2) and layers of linear attention (Qwen3.5) are left as they are.

    Args:
        model: A vision-language model from transformers.
        peft_config: The adapter's configuration.
        adapter_name: The adapter's name.

    Raises:
        ValueError: The model is not one that fits, or the configuration does not fit the model.

    Example:
        model = get_peft_model(model, DIPEConfig())
    """

    prefix = "dipe_"
    child_name = "dipe"
    tuner_layer_cls = DIPELayer

    def steerable_layers(self) -> list[int]:
        vlm = self.vlm
        attentions = vlm.self_attentions
        layers = [layer_idx for layer_idx in super().steerable_layers() if vlm.rotates(attentions[layer_idx])]
        if vlm.rotary is None or not layers:
            raise ValueError(
                f"{type(vlm.model).__name__} has no layer that rotates queries and keys by position (a text model "
                "with rotary_emb), so DIPE has no distance to hold."
            )
        return layers

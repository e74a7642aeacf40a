"""The T-DRS tuner."""

from __future__ import annotations

from ..attention import Steering
from ..context import VisualContext
from ..families import VisionLanguageModel
from ..steering import SteeringLayer, SteeringTuner
from .config import TDRSConfig
from .reweighting import Reweighting


class TDRSLayer(SteeringLayer[TDRSConfig]):
    """Stands beside the text model and reweights scores in the layers of the active adapters, one for each layer."""

    def __init__(self, vlm: VisionLanguageModel, layers: list[int]):
        super().__init__(vlm, layers)
        attentions = vlm.self_attentions
        self._rotations = {
            layer_idx: (vlm.rotary if vlm.rotates(attentions[layer_idx]) else None, vlm.layer_type(layer_idx))
            for layer_idx in layers
        }

    def prepare(self, context: VisualContext) -> None:
        context.keeps_positions = True

    def plan(self, context: VisualContext, configs: dict[str, TDRSConfig]) -> None:
        for adapter_name, config in configs.items():
            if config.is_off:
                continue
            for layer_idx in self.layers_of(config):
                weighing = Reweighting(config, *self._rotations[layer_idx])
                Steering.add(context, layer_idx, adapter_name, weighing=weighing)


class TDRSModel(SteeringTuner):
    """Attaches T-DRS to a vision-language model. Source: arXiv 2511.09868.

    The text model gets a child `tdrs` without parameters. Layers of linear attention (Qwen3.5) are left as they are.

    Args:
        model: A vision-language model from transformers.
        peft_config: The adapter's configuration.
        adapter_name: The adapter's name.

    Raises:
        ValueError: The model is not one that fits, or the configuration does not fit the model.

    Example:
        model = get_peft_model(model, TDRSConfig(sd_strength=3.0))
    """

    prefix = "tdrs_"
    child_name = "tdrs"
    tuner_layer_cls = TDRSLayer

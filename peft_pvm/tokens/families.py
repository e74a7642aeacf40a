"""Where each family of vision-language models keeps what the tuners need: a special case is a row here."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationMixin

from ..utils.packages import FEATURE_KEYWORDS, caps_paligemma
from ..utils.wrapping import look_inside, unwrapped
from .blocks import DecoderBlock, find_block


# By the text model's `model_type`: the name of the self-attention of a layer, where it is another than `self_attn`.
ATTENTION_NAMES: dict[str, str] = {
    "nemotron_h": "mixer",
}
WITHOUT_SCORES = ("linear_attention", "mlp", "moe")  # types of layers that have no self-attention
CROSS_ATTENTION = re.compile("cross_?att")  # a part of the names of such modules
PIXELS = re.compile("pixel|image")  # a part of the names of arguments that bring images


def _has_rope_theta(attention: Any) -> bool:
    return bool(attention.config.layer_rope_theta[attention.layer_idx])


# By the text model's `model_type`: which attention modules rotate queries and keys by position. Elsewhere those
# do whose `use_rope` does not say otherwise.
ROTATES: dict[str, Callable[[Any], bool]] = {
    "cohere2": lambda attention: attention.sliding_window is not None,
    "muse_glimmer_text": _has_rope_theta,
    "muse_spark_text": _has_rope_theta,
    "cohere_compass_text": lambda attention: (
        attention.config.rope_parameters[attention.config.layer_types[attention.layer_idx]] is not None
    ),
    "exaone4": lambda attention: attention.sliding_window is None or attention.is_sliding,
}


# By the text model's `model_type`: the name of the rotary embedding of each layer, where a text model has several.
ROTARY_NAMES: dict[str, Callable[[Any, int], str]] = {
    "molmo2_text": lambda config, layer_idx: (
        "rotary_emb" if layer_idx in config.rope_scaling_layers else "rotary_emb_unscaled"
    ),
}


def _softcapped(config: Any, output: torch.Tensor) -> torch.Tensor:
    cap = getattr(config, "final_logit_softcapping", None)
    return output if cap is None else cap * torch.tanh(output / cap)


def _multiplied_and_softcapped(config: Any, output: torch.Tensor) -> torch.Tensor:
    return _softcapped(config, output * config.output_multiplier)


# By the model's `model_type`: the logits, from the text model's config and the output of the head. Elsewhere the two
# are the same.
LOGITS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "cohere_compass": lambda config, output: output if config.logit_scale is None else output * config.logit_scale,
    "gemma3n": _softcapped,
    "gemma4": _softcapped,
    "gemma4_unified": _softcapped,
    "granite4_vision": lambda config, output: output / config.logits_scaling,
    "granite_docling": lambda config, output: output / config.logits_scaling,
    "hyperclovax_vision_v2": lambda config, output: output * config.logits_scaling,
    "inkling2": _softcapped,
    "inkling2_loop": _softcapped,
    "mistral_large4": _softcapped,
    "muse_glimmer": _multiplied_and_softcapped,
    "muse_spark": _multiplied_and_softcapped,
    "paligemma": lambda config, output: _softcapped(config, output) if caps_paligemma() else output,
}


@dataclass(frozen=True)
class VLMFamily:
    """What differs between families above the decoder layer.

    Attributes:
        placeholders: For each modality, the config fields that hold the ids of its placeholder tokens.
        image_mask: The keyword of a mask that says where images are, of a text model that puts their features
            (`image_embeds`) in itself. `None`: placeholder tokens say so.
        images_first: Whether images count only in the first forward of a conversation, as in the model itself.
    """

    placeholders: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"image": ("image_token_id",), "video": ("video_token_id",)}
    )
    image_mask: str | None = None
    images_first: bool = False


# The frames of a video use the placeholder of images.
_GLM = VLMFamily(placeholders={"image": ("image_token_id",), "video": ("image_token_id",)})

# The frames of a video come as `pixel_values`.
_VIDEO = VLMFamily(placeholders={"image": ("video_token_id",), "video": ("video_token_id",)})

# By the model's `model_type`: what is not of the common shape.
FAMILIES: dict[str, VLMFamily] = {
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glmga": _GLM,
    "glm_ocr": _GLM,
    "instructblipvideo": _VIDEO,
    "kosmos-2": VLMFamily(placeholders={}, image_mask="image_embeds_position_mask", images_first=True),
    "kosmos-2.5": VLMFamily(placeholders={}, image_mask="image_embeds_position_mask"),
    "nemotron_h_omni": _GLM,
}


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with its parts found.

    Attributes:
        model: The model itself.
        multimodal: The module that takes `input_ids` together with pixel values and calls the text model.
        text_model: The decoder stack (`layers`, `embed_tokens`).
        text_model_name: Its name inside the model.
        placeholder_ids: For each modality, its placeholder token ids.
        family: What is special about it.
    """

    model: nn.Module
    multimodal: nn.Module
    text_model: nn.Module
    text_model_name: str
    placeholder_ids: Mapping[str, tuple[int, ...]]
    family: VLMFamily = field(default_factory=VLMFamily)

    @functools.cached_property
    def block(self) -> DecoderBlock:
        """The shape of the decoder layers around their FFN, which only what acts there needs to know.

        Raises:
            ValueError: It is not known; the message names the layer, what it holds and what was looked for.
        """
        return find_block(self.model, self.text_model)

    @property
    def text_config(self) -> Any:
        """The text model's config."""
        return self.text_model.config

    @property
    def inner_generator(self) -> nn.Module | None:
        """The language model whose `generate` that of the multimodal module calls, with the features merged in."""
        generate = getattr(type(self.multimodal), "generate", GenerationMixin.generate)
        if generate is GenerationMixin.generate:
            return None
        inside = (module for module in self.multimodal.modules() if module is not self.multimodal)
        return next(
            (each for each in inside if isinstance(each, GenerationMixin) and _holds(each, self.text_model)), None
        )

    @property
    def generators(self) -> list[nn.Module]:
        """The models around the text model that generate, whose forwards return logits: the model or an inner one."""
        modules = self.model.modules()
        return [each for each in modules if isinstance(each, GenerationMixin) and _holds(each, self.text_model)]

    @property
    def head(self) -> nn.Module | None:
        """The module that makes logits of final hidden states; `None`: the model has none."""
        heads = (getattr(module, "get_output_embeddings", lambda: None)() for module in self.model.modules())
        return next((head for head in heads if head is not None), None)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits of final hidden states.

        Args:
            hidden_states: `(..., hidden_size)`, as the text model returns them.

        Returns:
            `(..., vocab_size)`.
        """
        output = cast(nn.Module, self.head)(hidden_states)
        of_output = LOGITS.get(getattr(self.model.config, "model_type", ""))
        return output if of_output is None else of_output(self.text_config, output)

    @property
    def rotary(self) -> nn.Module | None:
        """The module that turns positions into rotations, where the text model has one."""
        return getattr(self.text_model, "rotary_emb", None)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, inside whatever others wrapped them in."""
        stack: Any = self.text_model.layers
        return [unwrapped(layer) for layer in stack]

    @property
    def self_attentions(self) -> dict[int, nn.Module]:
        """By layer index, the self-attention modules. Layers of linear attention, which has no scores, have none."""
        name = ATTENTION_NAMES.get(self.text_config.model_type, "self_attn")
        return {
            layer_idx: unwrapped(getattr(layer, name))
            for layer_idx, layer in enumerate(self.layers)
            if hasattr(layer, name) and self.layer_type(layer_idx) not in WITHOUT_SCORES
        }

    def rotates(self, attention: nn.Module) -> bool:
        """Whether an attention module rotates queries and keys by their positions."""
        rotates = ROTATES.get(self.text_config.model_type, lambda module: bool(getattr(module, "use_rope", True)))
        return rotates(attention)

    def rotary_of(self, layer_idx: int) -> nn.Module | None:
        """What rotates the queries and keys of a layer; `None` where nothing does."""
        if self.rotary is None or not self.rotates(self.self_attentions[layer_idx]):
            return None
        name_of = ROTARY_NAMES.get(self.text_config.model_type)
        return self.rotary if name_of is None else getattr(self.text_model, name_of(self.text_config, layer_idx))

    def layer_type(self, layer_idx: int) -> str | None:
        """The type of a layer, for a rotary embedding that tells types apart."""
        layer_types = getattr(self.text_config, "layer_types", None)
        return None if layer_types is None else layer_types[layer_idx]

    def index_of(self, layer: nn.Module) -> int:
        """The index of a decoder layer."""
        return next(layer_idx for layer_idx, other in enumerate(self.layers) if other is layer)

    def layer_name(self, layer_idx: int) -> str:
        """The full name of a decoder layer inside the model."""
        stack: Any = self.text_model.layers
        return look_inside(f"{self.text_model_name}.layers.{layer_idx}".removeprefix("."), stack[layer_idx])[0]


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return any(each is other for each in module.modules())


def find_vlm(model: nn.Module) -> VisionLanguageModel:
    """Find the parts of a vision-language model.

    A model without a row in `FAMILIES` is taken if it has the common shape: a config with an image placeholder id, one
    module that takes pixel values, below it one text model. What is inside the decoder layers is only looked up by
    what needs it.

    Args:
        model: A transformers model, not wrapped by PEFT.

    Raises:
        ValueError: The model is of another shape; the message names the model, what it has and what was looked for.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model is already a PeftModel. Attach to what it wraps: get_peft_model(model.get_base_model(), "
            "config), or peft_pvm.add_adapters(model.get_base_model(), ...) for adapters of several types."
        )
    modules = dict(model.named_modules())
    text_models = _find_text_models(modules)
    if reason := _why_unsuited(model, modules, text_models):
        raise ValueError(f"{_named(model)} {reason}. Adapters act on images whose tokens are among those of the text.")
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), VLMFamily())
    placeholder_ids = _find_placeholder_ids(model, family)
    if len(text_models) != 1:
        found = f"it holds {len(text_models)} text models {text_models}"
        raise _refusal(model, found, "one module with layers and embed_tokens")
    text_model_name = text_models[0]
    brings = [family.image_mask] if family.image_mask else FEATURE_KEYWORDS["image"]
    multimodal = _nearest_multimodal(modules, text_model_name, brings)
    if multimodal is None:
        raise _refusal(
            model,
            f"no module above its text model {text_model_name!r} takes pixel values",
            "a module whose forward takes input_ids and pixel_values and which calls the text model",
        )
    return VisionLanguageModel(model, multimodal, modules[text_model_name], text_model_name, placeholder_ids, family)


def _why_unsuited(model: Any, modules: Mapping[str, nn.Module], text_models: Collection[str]) -> str | None:
    """Why no adapter can act on a model, as the end of a sentence that begins with its name; `None`: one may."""
    config = getattr(model, "config", None)
    if any(getattr(each, "is_encoder_decoder", False) for each in (config, getattr(config, "text_config", None))):
        return (
            "is an encoder-decoder: images are in the encoder, all of which the decoder sees at every step, so that "
            "no text comes between them and the text that is written"
        )
    if length := getattr(config, "canvas_length", None):
        return (
            f"writes text by block diffusion: a stack of layers of its own denoises {length} tokens at a time, which "
            "is not where images are read"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)
    if len(text_models) > 1 and head() is None:
        return f"writes no text: none of {' and '.join(text_models)} is a language model with a head"
    if not any(map(_takes_pixels, modules.values())):
        return "reads no images: the forward of none of its modules takes pixel values"
    stacks = tuple(text_models) or ("",)
    if crossing := next((name for name in modules if name.startswith(stacks) and CROSS_ATTENTION.search(name)), None):
        return (
            f"looks at images by cross-attention ({crossing}), so that no image token is among the text tokens "
            "whose distance could grow"
        )
    return None


def _takes_pixels(module: nn.Module) -> bool:
    return any(PIXELS.search(name) for name in inspect.signature(type(module).forward).parameters)


def _named(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return f"{type(model).__name__} (model_type {model_type!r})"


def _refusal(model: nn.Module, found: str, looked_for: str) -> ValueError:
    return ValueError(
        f"{_named(model)} is not a vision-language model that peft_pvm can attach to: {found}. Looked for "
        f"{looked_for}. `peft-pvm models` lists those that are tested; a model of the same shape works without being "
        "listed, any other needs a row in peft_pvm/tokens/families.py."
    )


def _find_placeholder_ids(model: nn.Module, family: VLMFamily) -> dict[str, tuple[int, ...]]:
    config = getattr(model, "config", None)
    placeholder_ids = {}
    for modality, fields in family.placeholders.items():
        ids = (getattr(config, name, None) for name in fields)
        placeholder_ids[modality] = tuple(token_id for token_id in ids if token_id is not None)
    if not family.image_mask and not placeholder_ids["image"]:
        looked_for = " or ".join(f"config.{name}" for name in family.placeholders["image"])
        raise ValueError(
            f"{_named(model)} names no image placeholder token in its config, so nothing in input_ids says where "
            f"images are. Looked for {looked_for}; another name needs a row in peft_pvm/tokens/families.py."
        )
    return placeholder_ids


def _find_text_models(modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of the decoder stacks."""
    return [
        name
        for name, module in modules.items()
        if unwrapped(module) is module  # a wrapper has the attributes of what it wraps
        and isinstance(getattr(module, "layers", None), nn.ModuleList)
        and (hasattr(module, "embed_tokens") or isinstance(getattr(module, "embeddings", None), nn.Embedding))
    ]


def _nearest_multimodal(
    modules: Mapping[str, nn.Module], text_model_name: str, brings: Collection[str]
) -> nn.Module | None:
    name = text_model_name
    while name:
        name = name.rpartition(".")[0]
        parameters = inspect.signature(type(modules[name]).forward).parameters
        if "input_ids" in parameters and not parameters.keys().isdisjoint(brings):
            return modules[name]
    return None

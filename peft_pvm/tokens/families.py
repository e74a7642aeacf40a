"""Where each family of vision-language models keeps what the tuners need: a special case of a model is a row here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationMixin

from ..utils.packages import FEATURE_KEYWORDS, is_tuner_child
from ..utils.wrapping import look_inside, unwrapped
from .unsuited import why_unsuited


@dataclass(frozen=True)
class DecoderBlock:
    """How a decoder layer is put together around its FFN.

    Attributes:
        ffn_norm: The submodule whose *input* is the residual stream after self-attention. `None` for a parallel block,
            where FFN and attention read the same normed input: there that stream is layer input + attention output.
        ffn_end: The submodule whose *output* is what the FFN adds to the residual stream.
        token_mixers: The submodules that mix tokens; a layer has one of them.
        ends_with_sum: Whether the output of `ffn_end` is the residual stream with the FFN added already: a gate that
            weighs both.
        ffn_scale: What a layer multiplies that output by before it adds it: Granite's `residual_multiplier`.
        has_streams: Whether there are several residual streams. The FFN then reads a mixture of them, and what it
            returns is spread over them. So is what is put beside it, which reads that mixture.
    """

    ffn_norm: str | None = "post_attention_layernorm"
    ffn_end: str = "mlp"
    token_mixers: tuple[str, ...] = ("self_attn", "linear_attn")
    ends_with_sum: bool = False
    ffn_scale: float = 1.0
    has_streams: bool = False

    @property
    def is_parallel(self) -> bool:
        """Whether FFN and attention read the same normed input."""
        return self.ffn_norm is None

    @property
    def norm_name(self) -> str:
        """The norm before the FFN."""
        return self.ffn_norm or "input_layernorm"

    @property
    def looked_for(self) -> str:
        return f"{' or '.join(self.token_mixers)}, {self.norm_name} and {self.ffn_end}"

    def fits(self, layer: nn.Module) -> bool:
        names = dict(layer.named_children())
        mixer = any(name in names for name in self.token_mixers)
        return mixer and self.norm_name in names and self.ffn_end in names

    def norm(self, layer: nn.Module) -> nn.Module:
        """The norm before the FFN of `layer`."""
        return getattr(layer, self.norm_name)

    def token_mixer(self, layer: nn.Module) -> nn.Module:
        """The attention module of `layer`."""
        return next(getattr(layer, name) for name in self.token_mixers if hasattr(layer, name))


PRE_NORM = DecoderBlock()
PRE_NORM_CHILDREN = {*PRE_NORM.token_mixers, "input_layernorm", PRE_NORM.ffn_norm, PRE_NORM.ffn_end}
SANDWICH = DecoderBlock(ffn_norm="pre_feedforward_layernorm", ffn_end="post_feedforward_layernorm")

CONV = DecoderBlock(ffn_norm="ffn_norm", ffn_end="feed_forward", token_mixers=("self_attn", "conv"))
INKLING = "an FFN reads several residual streams by attention, and a convolution would spread a branch over tokens"
STREAMS = DecoderBlock(ffn_norm="mlp", has_streams=True)
KOSMOS = DecoderBlock(ffn_norm="final_layer_norm", ffn_end="ffn")
POST_NORM = DecoderBlock(ffn_norm="mlp", ffn_end="post_attention_layernorm")  # the FFN reads the stream as it is

# By the text model's `model_type`: a wrapper such as LLaVA or PaliGemma takes several. A function, where its config
# decides. What is not listed must be of exactly the common pre-norm shape. A string says why no branch fits in.
BLOCKS: dict[str, DecoderBlock | str | Callable[[Any], DecoderBlock]] = {
    "apertus1p5_text": DecoderBlock(ffn_norm="feedforward_layernorm"),
    "cohere": DecoderBlock(ffn_norm=None),
    "cohere2": DecoderBlock(ffn_norm=None),
    "cohere_compass_text": DecoderBlock(ffn_norm=None),
    "emu3_text_model": PRE_NORM,
    "exaone4": DecoderBlock(ffn_norm="mlp", ffn_end="post_feedforward_layernorm"),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "gemma3n_text": SANDWICH,  # within the residual stream that a layer computes; AltUp passes it on to the others
    "gemma4_text": SANDWICH,
    "gemma4_unified_text": SANDWICH,
    "glm4v_text": DecoderBlock(ffn_end="post_mlp_layernorm"),
    "glm5_next_text": STREAMS,
    "glm_ocr_text": DecoderBlock(ffn_end="post_mlp_layernorm"),
    "hy_v4_vl_text": "its residual is several streams, which each layer mixes, and no single one to read and add to",
    "hyperclovax": DecoderBlock(ffn_end="post_norm2"),
    "inkling2_loop_text": INKLING,
    "inkling2_text": INKLING,
    "inkling_text": DecoderBlock(ffn_end="mlp_sconv"),  # a convolution over tokens, which must not spread a branch
    "kosmos_2_5_text_model": KOSMOS,
    "kosmos_2_text_model": KOSMOS,
    "lfm2": CONV,
    "lfm3": replace(CONV, ffn_end="post_ffn_norm"),
    "llama4_text": DecoderBlock(ffn_end="feed_forward"),
    "molmo2_text": lambda config: POST_NORM if config.norm_after else PRE_NORM,
    "muse_glimmer_text": SANDWICH,
    "muse_spark_text": DecoderBlock(
        ffn_norm="pre_feedforward_layernorm", ffn_end="post_feedforward_residual_gate", ends_with_sum=True
    ),
    "nemotron_h": "each layer is attention or an FFN, not both",
    "opt": DecoderBlock(ffn_norm="final_layer_norm", ffn_end="fc2"),
    "persimmon": DecoderBlock(ffn_end="dropout"),
    "qwen4_exp_text": STREAMS,
}

# By the text model's `model_type`: the name of the self-attention of a layer, where it is another than `self_attn`.
ATTENTION_NAMES: dict[str, str] = {
    "nemotron_h": "mixer",
}
WITHOUT_SCORES = ("linear_attention", "mlp", "moe")  # types of layers that have no self-attention


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


@dataclass(frozen=True)
class VLMFamily:
    """What differs between families above the decoder layer.

    Attributes:
        placeholders: For each modality, the config fields that hold the ids of its placeholder tokens.
        image_mask: The keyword of a mask that says where images are, of a text model that puts their features
            (`image_embeds`) in itself. `None`: placeholder tokens say so.
        images_first: Whether images count in the first forward of a conversation alone, as the model has it.
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

# By the model's `model_type`: the families that the tests cover.
FAMILIES: dict[str, VLMFamily] = {
    "aya_vision": VLMFamily(),
    "deepseek_vl": VLMFamily(),
    "gemma3": VLMFamily(),
    "gemma4": VLMFamily(),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glmga": _GLM,
    "glm_ocr": _GLM,
    "idefics3": VLMFamily(),
    "instructblipvideo": _VIDEO,
    "internvl": VLMFamily(),
    "kosmos-2": VLMFamily(placeholders={}, image_mask="image_embeds_position_mask", images_first=True),
    "kosmos-2.5": VLMFamily(placeholders={}, image_mask="image_embeds_position_mask"),
    "llama4": VLMFamily(),
    "llava": VLMFamily(),
    "llava_next": VLMFamily(),
    "llava_onevision": VLMFamily(),
    "mistral3": VLMFamily(),
    "nemotron_h_omni": _GLM,
    "paligemma": VLMFamily(),
    "qwen2_5_vl": VLMFamily(),
    "qwen2_vl": VLMFamily(),
    "qwen3_5": VLMFamily(),
    "qwen3_vl": VLMFamily(),
    "qwen3_vl_moe": VLMFamily(),
    "smolvlm": VLMFamily(),
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
        return _find_block(self.model, self.text_model)

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

    Families in `FAMILIES` are known and tested. Any other model is taken if it has the common shape: a config with an
    image placeholder id, one module that takes `pixel_values`, below it one text model. What is inside the decoder
    layers is asked for by what needs it.

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
    if reason := why_unsuited(model, modules, text_models):
        raise ValueError(
            f"{_named(model)} {reason}. Adapters act on images whose tokens stand among those of the text."
        )
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


def _find_block(model: nn.Module, text_model: Any) -> DecoderBlock:
    """The shape of the decoder layers, if all of them have it."""
    text_type = getattr(text_model.config, "model_type", "")
    is_listed = text_type in BLOCKS
    row = BLOCKS.get(text_type, PRE_NORM)
    of_model = f"{type(model).__name__} (text model type {text_type!r})"
    if isinstance(row, str):
        raise ValueError(f"Nothing can be put beside the FFNs of {of_model}: {row}. {NEEDS_NO_BLOCK}.")
    block = row if isinstance(row, DecoderBlock) else row(text_model.config)
    for layer_idx, layer in enumerate(map(unwrapped, text_model.layers)):
        children = {name for name, child in layer.named_children() if not is_tuner_child(child)}
        # Norms in unknown places change where the branch belongs, so an unlisted layer must have no other children.
        if not block.fits(layer) or (not is_listed and not children <= PRE_NORM_CHILDREN):
            raise ValueError(
                f"Nothing can be put beside the FFNs of {of_model}: decoder layer {layer_idx} "
                f"({type(layer).__name__}) holds {sorted(children)}. Looked for {block.looked_for}"
                f"{'' if is_listed else ' and no other norm'}. {NEEDS_NO_BLOCK}, and a row in "
                "peft_pvm/tokens/families.py makes this one known."
            )
    return replace(block, ffn_scale=getattr(text_model.config, "residual_multiplier", 1.0))


NEEDS_NO_BLOCK = "Adapters that change attention alone do not need to know the FFN"

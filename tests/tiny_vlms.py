"""Tiny random models of every family, and batches for them. Nothing is downloaded.

A conversation is written as a string: "t4 i t3" is 4 text tokens, an image, 3 text tokens; "v" is a video. Its tokens
and pixels depend on the string alone, so that a conversation is the same in every batch.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as T
from copies import Mould


HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 4, 2, 3, 320
IMAGE, VIDEO, START, END, AUDIO, PAD, BOS, EOS = 300, 301, 302, 303, 305, 0, 1, 2
TEXT = dict(
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    vocab_size=VOCAB,
    max_position_embeddings=2048,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
SIGLIP = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE_INTERLEAVED = {**MROPE, "mrope_interleaved": True}
GLM_ROPE = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
GLM_IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    image_start_token_id=START,
    image_end_token_id=END,
    video_start_token_id=306,
    video_end_token_id=307,
)
QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=HIDDEN,
)
QWEN3_VISION = dict(QWEN_VISION, intermediate_size=64, num_position_embeddings=64)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
VISION_CLIP_LIKE = dict(vision_feature_layer=-1)


def _qwen3_vl():
    vision = dict(QWEN3_VISION, deepstack_visual_indexes=[0, 1])
    text = dict(TEXT, head_dim=16, rope_parameters=MROPE_INTERLEAVED)
    return T.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _qwen3_vl_moe():
    vision = dict(QWEN3_VISION, deepstack_visual_indexes=[0, 1])
    text = dict(TEXT, head_dim=16, rope_parameters=MROPE_INTERLEAVED, decoder_sparse_step=1, **MOE)
    return T.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _qwen3_5():
    rope = {**MROPE_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    text = dict(
        TEXT,
        num_hidden_layers=4,
        head_dim=32,
        rope_parameters=rope,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention", "full_attention", "full_attention"],
    )
    return T.Qwen3_5Config(text_config=text, vision_config=QWEN3_VISION, **QWEN_IDS)


def _qwen2_5_vl():
    vision = dict(QWEN_VISION, intermediate_size=64, fullatt_block_indexes=[1], window_size=16)
    text = dict(TEXT, rope_parameters=MROPE, use_sliding_window=False)
    return T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _qwen2_vl():
    vision = dict(QWEN_VISION, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2)
    del vision["out_hidden_size"]
    text = dict(TEXT, rope_parameters=MROPE, use_sliding_window=False)
    return T.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _glm4v():
    vision = dict(QWEN_VISION, intermediate_size=64, image_size=32)
    return T.Glm4vConfig(text_config=dict(TEXT, rope_parameters=GLM_ROPE), vision_config=vision, **GLM_IDS)


def _glm4v_moe():
    vision = dict(QWEN_VISION, intermediate_size=64, image_size=32)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)
    text = dict(TEXT, head_dim=16, rope_parameters=GLM_ROPE, first_k_dense_replace=1, **experts)
    return T.Glm4vMoeConfig(text_config=text, vision_config=vision, **GLM_IDS)


def _llava():
    return T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        **VISION_CLIP_LIKE,
    )


def _llava_next():
    return T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**SIGLIP),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 28], [28, 56]],
        **VISION_CLIP_LIKE,
    )


def _llava_onevision():
    return T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**SIGLIP),
        text_config=T.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28, 28], [28, 56]],
        **VISION_CLIP_LIKE,
    )


def _internvl():
    vision = T.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[28, 28],
        patch_size=[7, 7],
    )
    return T.InternVLConfig(
        vision_config=vision,
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        **VISION_CLIP_LIKE,
    )


def _mistral3():
    vision = T.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    return T.Mistral3Config(
        vision_config=vision,
        text_config=T.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        **VISION_CLIP_LIKE,
    )


def _idefics3():
    return T.Idefics3Config(
        vision_config=dict(SIGLIP), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )


def _smolvlm():
    return T.SmolVLMConfig(
        vision_config=dict(SIGLIP), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )


def _deepseek_vl():
    return T.DeepseekVLConfig(
        vision_config=T.SiglipVisionConfig(**SIGLIP), text_config=T.LlamaConfig(**TEXT), image_token_id=IMAGE
    )


def _llava_cohere():
    config = _llava()
    config.text_config = T.CohereConfig(**TEXT)
    return config


def _paligemma(text=None):
    vision = T.SiglipVisionConfig(**SIGLIP, projection_dim=HIDDEN, vision_use_head=False)
    text = text or T.GemmaConfig(**TEXT, head_dim=16)
    return T.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=HIDDEN)


def _paligemma2():
    # No soft cap on attention: sdpa leaves it out, so that the base itself would differ between kernels.
    attention = dict(query_pre_attn_scalar=16, attn_logit_softcapping=None, layer_types=["full_attention"] * LAYERS)
    return _paligemma(T.Gemma2Config(**TEXT, head_dim=16, **attention))


def _gemma3():
    return T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**TEXT, **SLIDING),
        vision_config=T.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _gemma4(**text):
    text = {**TEXT, **SLIDING, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **text}
    text = T.Gemma4TextConfig(**text, global_head_dim=32)
    vision = T.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
    )
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END, audio_token_id=AUDIO)
    return T.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **ids)


def _gemma4_shared():
    """The last two layers take the keys and values of earlier ones, and compute only the tokens whose logits count."""
    layer_types = ["sliding_attention", "full_attention"] * 2
    per_layer_input = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
    return _gemma4(num_hidden_layers=4, layer_types=layer_types, num_kv_shared_layers=2, **per_layer_input)


def _aya_vision():
    return T.AyaVisionConfig(
        vision_config=T.SiglipVisionConfig(**SIGLIP),
        text_config=T.Cohere2Config(**TEXT, **SLIDING),
        image_token_index=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_select_strategy="full",
        **VISION_CLIP_LIKE,
    )


def _llama4():
    text = dict(
        TEXT,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1],
        attention_chunk_size=64,
    )
    vision = dict(
        SIGLIP,
        intermediate_size=128,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
        pixel_shuffle_ratio=0.5,
    )
    return T.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )


# ---- what one image (or video) of a family looks like: its token ids, and the keyword arguments that bring its pixels


def _grid_visual(modality: str, token_id: int, frames: int = 1):
    """Qwen and GLM: patches in one flat list, with their grid. A frame is 4 x 4 patches, merged to 4 tokens."""

    def make(model, generator):
        config = model.config.vision_config
        channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
        features = channels * config.temporal_patch_size * config.patch_size**2
        suffix = "_videos" if modality == "video" else ""
        pixels = torch.randn(16 * frames, features, generator=generator, device="cpu")
        grid = {f"pixel_values{suffix}": pixels, f"{modality}_grid_thw": torch.tensor([[frames, 4, 4]])}
        return frames * [START, *[token_id] * 4, END], grid

    return make


def _square_visual(num_tokens: int, **extra: Callable[[], torch.Tensor]):
    """LLaVA and its kin: square images, stacked."""

    def make(model, generator):
        pixels = {"pixel_values": torch.randn(1, 3, 28, 28, generator=generator, device="cpu")}
        return [IMAGE] * num_tokens, {**pixels, **{name: value() for name, value in extra.items()}}

    return make


def _tiled_visual(num_tokens: int):
    """LLaVA-Next and -OneVision: the image and its tiles."""

    def make(model, generator):
        pixels = torch.randn(1, 2, 3, 28, 28, generator=generator, device="cpu")
        return [IMAGE] * num_tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]])}

    return make


def _onevision_video(model, generator):
    # 3 frames of 4 tokens, pooled to 1 token each, and a newline
    return [VIDEO] * 4, {"pixel_values_videos": torch.randn(1, 3, 3, 28, 28, generator=generator, device="cpu")}


def _gemma4_positions(frames: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return torch.stack([columns, rows], -1).reshape(1, 16, 2).expand(frames, -1, -1)


def _gemma4_image(model, generator):
    pixels = torch.randn(1, 16, 48, generator=generator, device="cpu")
    return [START, *[IMAGE] * 4, END], {"pixel_values": pixels, "image_position_ids": _gemma4_positions(1)}


def _gemma4_video(model, generator):
    ids = [START, *[VIDEO] * 8, END]
    pixels, positions = torch.randn(2, 16, 48, generator=generator, device="cpu"), _gemma4_positions(2)
    if "num_frames_per_video" not in inspect.signature(model.model.forward).parameters:  # transformers before 5.23
        return ids, {"pixel_values_videos": pixels[None], "video_position_ids": positions[None]}
    arguments = {"video_position_ids": positions, "num_frames_per_video": torch.tensor([2])}
    return ids, {"pixel_values_videos": pixels, **arguments}


def _image_sizes() -> torch.Tensor:
    return torch.tensor([[28, 28]])


@dataclass
class Rendered:
    """A conversation in tokens: ids, modality of each (0 text, 1 image, 2 video), and where which pixels stand."""

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    visuals: list[tuple[int, dict[str, torch.Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class TinyVLM:
    """One family.

    Attributes:
        model_class: The transformers class.
        config: Makes its configuration.
        image: Makes an image's token ids and pixel arguments.
        video: The same for a video, where the family has them.
        pixels_by_row: Whether pixel values are given as `(batch, images, ...)` instead of one after the other.
        is_prefix_lm: Whether the prompt attends to itself in both directions unless told otherwise.
        seed: Added to that of the weights: with some, the base's own rounding errors exceed what tests allow.
        broken: The version of transformers in which the model itself raises, and why. `None`: it works in all.
        is_noisy: Whether its own rounding errors in fp32 come near what tests allow.
    """

    model_class: str
    config: Callable[[], Any]
    image: Callable
    video: Callable | None = None
    pixels_by_row: bool = False
    is_prefix_lm: bool = False
    seed: int = 0
    broken: tuple[str, str] | None = None
    is_noisy: bool = False

    @property
    def is_there(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(T, self.model_class)

    @property
    def is_broken(self) -> bool:
        """Whether the model itself raises in the installed version of transformers."""
        return self.broken is not None and T.__version__.startswith(self.broken[0])

    def build(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        """A random model, in eval mode, with weights large enough that attention is not uniform.

        Skips the test where the model itself is broken.
        """
        if self.is_broken:
            pytest.skip(f"{self.model_class} is broken in transformers {T.__version__}: {self.broken[1]}")
        return _mould(self, seed, **kwargs).make()  # building takes ten times as long

    def build_precise(self, **kwargs: Any) -> T.PreTrainedModel:
        """As `build`, but a noisy one in fp64: for tests that two ways to compute agree.

        How far a noisy one is from a bound in fp32 hangs on the kernels that torch has for the CPU.
        """
        if not self.is_noisy:
            return self.build(**kwargs)
        model = self.build(**kwargs).double()
        model.config.get_text_config()._experts_implementation = "eager"  # the only one that takes float64
        return model

    def build_anyway(self, seed: int = 0, **kwargs: Any) -> T.PreTrainedModel:
        """As `build`, also where the model itself is broken."""
        seed += self.seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(T, self.model_class)._from_config(self.config(), **kwargs).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    scale = 0.1 if "embed" in name else 0.6 / parameter.shape[-1] ** 0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * scale)
        return model

    def inputs(self, model: T.PreTrainedModel, *conversations: str, start: int = 0, stop: int | None = None):
        """A left-padded batch; `start` and `stop` cut a piece out of a single conversation, between images."""
        rows = [self._render(model, conversation) for conversation in conversations]
        width = max(len(row.ids) for row in rows)
        stop = width if stop is None else stop
        input_ids = torch.tensor([[PAD] * (width - len(row.ids)) + row.ids for row in rows])
        types = torch.tensor([[0] * (width - len(row.ids)) + row.types for row in rows], dtype=torch.int)
        attention_mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
        pixels = [[arguments for first, arguments in row.visuals if start <= first < stop] for row in rows]
        batch = {
            "input_ids": input_ids[:, start:stop],
            "attention_mask": attention_mask[:, :stop],
            "position_ids": self._position_ids(model, rows, input_ids, types, attention_mask)[..., start:stop],
            **self._collate(pixels),
        }
        takes = inspect.signature(getattr(model, "model", model).forward).parameters
        if "mm_token_type_ids" in takes and ("image_grid_thw" in batch or "video_grid_thw" in batch):
            batch["mm_token_type_ids"] = types[:, start:stop]
        if self.is_prefix_lm:
            batch["token_type_ids"] = torch.ones_like(batch["input_ids"])  # all suffix, which is causal
        if model.dtype == torch.float64:
            batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        return batch

    def prompt(self, model: T.PreTrainedModel, *conversations: str) -> dict[str, torch.Tensor]:
        """A batch for `generate`, which makes its own positions."""
        batch = self.inputs(model, *conversations)
        del batch["position_ids"]
        return batch

    def _render(self, model, conversation: str) -> Rendered:
        generator = torch.Generator().manual_seed(zlib.crc32(conversation.encode()))
        row = Rendered()
        for segment in conversation.split():
            if segment[0] == "t":
                ids = torch.randint(10, 290, (int(segment[1:]),), generator=generator, device="cpu").tolist()
                types = [0] * len(ids)
            else:
                ids, arguments = {"i": self.image, "v": self.video}[segment](model, generator)
                types = [{"i": 1, "v": 2}[segment] * (token_id in (IMAGE, VIDEO)) for token_id in ids]
                row.visuals.append((len(row.ids), arguments))
            row.ids += ids
            row.types += types
        return row

    def _collate(self, pixels: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        visuals = [visual for row in pixels for visual in row]
        if self.pixels_by_row and visuals:
            stacked = torch.zeros(len(pixels), max(map(len, pixels)), *visuals[0]["pixel_values"].shape[1:])
            for row, images in enumerate(pixels):
                for column, visual in enumerate(images):
                    stacked[row, column] = visual["pixel_values"][0]
            return {"pixel_values": stacked}
        names = {name for visual in visuals for name in visual}
        device = torch.get_default_device()  # pixels are drawn on the CPU, so that they are the same everywhere
        pixels = {name: [visual[name] for visual in visuals if name in visual] for name in sorted(names)}
        return {name: torch.cat([tensor.to(device) for tensor in tensors]) for name, tensors in pixels.items()}

    def _position_ids(self, model, rows: list[Rendered], input_ids, types, attention_mask) -> torch.Tensor:
        if not hasattr(getattr(model, "model", None), "get_rope_index"):
            return (attention_mask.cumsum(-1) - 1).clamp(min=0)
        visuals = self._collate([[arguments for _, arguments in row.visuals] for row in rows])
        grids = {name: visuals[name] for name in ("image_grid_thw", "video_grid_thw") if name in visuals}
        return model.model.get_rope_index(input_ids, mm_token_type_ids=types, attention_mask=attention_mask, **grids)[
            0
        ]


GRID = _grid_visual("image", IMAGE)
VIDEO_BY_FRAME = _grid_visual("video", VIDEO, frames=2)
VIDEO_IN_ONE = _grid_visual("video", VIDEO)
GLM_VIDEO = _grid_visual("video", IMAGE, frames=2)


@functools.lru_cache(maxsize=4)
def _mould(tiny: TinyVLM, seed: int, **kwargs: Any) -> Mould:
    return Mould(tiny.build_anyway(seed, **kwargs))


FAMILIES = {
    "qwen3_vl": TinyVLM("Qwen3VLForConditionalGeneration", _qwen3_vl, GRID, VIDEO_BY_FRAME),
    "qwen3_vl_moe": TinyVLM("Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, GRID, VIDEO_BY_FRAME),
    "qwen3_5": TinyVLM("Qwen3_5ForConditionalGeneration", _qwen3_5, GRID, VIDEO_BY_FRAME, seed=5, is_noisy=True),
    "qwen2_5_vl": TinyVLM("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, GRID, VIDEO_IN_ONE),
    "qwen2_vl": TinyVLM("Qwen2VLForConditionalGeneration", _qwen2_vl, GRID, VIDEO_IN_ONE),
    "llava": TinyVLM("LlavaForConditionalGeneration", _llava, _square_visual(4)),
    "llava_cohere": TinyVLM("LlavaForConditionalGeneration", _llava_cohere, _square_visual(4)),
    "llava_next": TinyVLM("LlavaNextForConditionalGeneration", _llava_next, _tiled_visual(10)),
    "llava_onevision": TinyVLM(
        "LlavaOnevisionForConditionalGeneration", _llava_onevision, _tiled_visual(10), _onevision_video
    ),
    "deepseek_vl": TinyVLM("DeepseekVLForConditionalGeneration", _deepseek_vl, _square_visual(4)),
    "internvl": TinyVLM("InternVLForConditionalGeneration", _internvl, _square_visual(4)),
    "mistral3": TinyVLM("Mistral3ForConditionalGeneration", _mistral3, _square_visual(4, image_sizes=_image_sizes)),
    "idefics3": TinyVLM("Idefics3ForConditionalGeneration", _idefics3, _square_visual(1), pixels_by_row=True),
    "smolvlm": TinyVLM("SmolVLMForConditionalGeneration", _smolvlm, _square_visual(1), pixels_by_row=True),
    "paligemma": TinyVLM("PaliGemmaForConditionalGeneration", _paligemma, _square_visual(4), is_prefix_lm=True),
    "paligemma2": TinyVLM("PaliGemmaForConditionalGeneration", _paligemma2, _square_visual(4), is_prefix_lm=True),
    "gemma3": TinyVLM("Gemma3ForConditionalGeneration", _gemma3, _square_visual(4)),
    "gemma4": TinyVLM("Gemma4ForConditionalGeneration", _gemma4, _gemma4_image, _gemma4_video, seed=21, is_noisy=True),
    "glm4v": TinyVLM("Glm4vForConditionalGeneration", _glm4v, GRID, GLM_VIDEO),
    "glm4v_moe": TinyVLM("Glm4vMoeForConditionalGeneration", _glm4v_moe, GRID, GLM_VIDEO),
    "aya_vision": TinyVLM("AyaVisionForConditionalGeneration", _aya_vision, _square_visual(1)),
    "llama4": TinyVLM(
        "Llama4ForConditionalGeneration",
        _llama4,
        _square_visual(1),
        broken=("5.24.0", "it reads image_outputs of its text model's output, which has none"),
    ),
}

GEMMA4_SHARED = TinyVLM("Gemma4ForConditionalGeneration", _gemma4_shared, _gemma4_image, _gemma4_video)

# Families that differ from another one in nothing that most tests are about. The five properties, and what methods
# compute, are tested on all.
TWINS = {
    "qwen3_vl_moe": "glm4v_moe",
    "qwen2_vl": "qwen2_5_vl",
    **dict.fromkeys(("deepseek_vl", "internvl", "mistral3"), "llava"),
    "smolvlm": "idefics3",
    "paligemma": "paligemma2",
    "glm4v": "glm4v_moe",
    "aya_vision": "llava_cohere",
}
REPRESENTATIVE = ("qwen3_vl", "llava", "gemma3")  # mRoPE and DeepStack; plain; sandwich norms and sliding windows

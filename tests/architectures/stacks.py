"""Text models of other shapes than one stack of layers with one residual stream; images that come by a Q-Former."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tiny_vlms import (
    BOS,
    EOS,
    GLM_IDS,
    GRID,
    HIDDEN,
    IMAGE,
    MOE,
    MROPE_INTERLEAVED,
    PAD,
    QWEN3_VISION,
    QWEN_IDS,
    QWEN_VISION,
    SIGLIP,
    TEXT,
    VIDEO,
    VIDEO_BY_FRAME,
    VOCAB,
    _square_visual,
)

from .rows import NOTHING_ROTATES, SEVERAL_STREAMS, WITHOUT_A_STATE, WITHOUT_TOKENS, AnyVLM, Architecture


def _nemotron_h_omni():
    """Its stack is called `embeddings` and `layers`, and a layer has one mixer."""
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    text = T.NemotronHConfig(
        **text,
        layers_block_type=["full_attention", "moe", "linear_attention", "mlp", "full_attention", "moe"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        time_step_min=1e-9,  # a step of decoding takes no heed of it, and would differ from the whole
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=4,
        image_size=16,
        max_img_size=32,
        video_temporal_patch_size=2,
    )
    return T.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=HIDDEN,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _nemotron_image(model, generator):
    pixels = torch.randn(16, 3 * 4 * 4, generator=generator, device="cpu")
    return [IMAGE] * 4, {"pixel_values": pixels, "image_grid_hw": torch.tensor([[4, 4]])}


def _nemotron_video(model, generator):
    pixels = torch.randn(1, 2, 2 * 3, 16, 16, generator=generator, device="cpu")
    return [IMAGE] * 8, {"pixel_values_videos": pixels}


KOSMOS = dict(
    vocab_size=VOCAB,
    embed_dim=HIDDEN,
    layers=3,
    ffn_dim=96,
    attention_heads=4,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


class Kosmos(AnyVLM):
    """A mask says where images are. Token ids say nothing."""

    def inputs(self, model, *conversations, **cut):
        batch = super().inputs(model, *conversations, **cut)
        is_visual = batch["input_ids"] == IMAGE
        if "pixel_values" not in batch and "flattened_patches" not in batch:
            batch["image_embeds"] = torch.zeros(0, 4, HIDDEN, dtype=model.dtype)  # it asks for some at every step
        return {**batch, "image_embeds_position_mask": is_visual.long()}


class Kosmos2(Kosmos):
    """Its mask cannot be made in float64, which the oracle computes in.

    In transformers 5.16, its projector is causal on sdpa, and not on eager attention.
    """

    def build_anyway(self, seed=0, **kwargs):
        model = super().build_anyway(seed, **{"attn_implementation": "eager", **kwargs})
        text_model = model.text_model.model
        make = text_model._prepare_decoder_attention_mask

        def make_in_fp32(mask, shape, inputs_embeds, length):
            made = make(mask, shape, inputs_embeds.float(), length)
            return None if made is None else made.to(inputs_embeds.dtype)

        text_model._prepare_decoder_attention_mask = make_in_fp32
        return model


def _kosmos_2():
    return T.Kosmos2Config(text_config=dict(KOSMOS), vision_config=dict(SIGLIP), latent_query_num=4)


def _kosmos_2_5():
    vision = dict(
        hidden_size=32, patch_embed_hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return T.Kosmos2_5Config(text_config=dict(KOSMOS), vision_config=dict(vision, head_dim=16), latent_query_num=4)


def _patches(model, generator):
    places = torch.tensor([[1.0, 1], [1, 2], [2, 1], [2, 2]])  # row and column, before the pixels
    pixels = torch.randn(4, 48, generator=generator, device="cpu")
    return [IMAGE] * 4, {"flattened_patches": torch.cat([places, pixels], 1)[None]}


QFORMER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    encoder_hidden_size=32,
)


def _blip(family: str, text: Any):
    """Images come by a Q-Former, and `generate` hands what it has merged to the language model's own."""
    ids = {"video_token_index": VIDEO} if family.endswith("Video") else {"image_token_index": IMAGE}
    return getattr(T, f"{family}Config")(
        vision_config=dict(SIGLIP), qformer_config=dict(QFORMER), text_config=text, num_query_tokens=4, **ids
    )


def _opt():
    return T.OPTConfig(**TEXT, ffn_dim=96, word_embed_proj_dim=HIDDEN)


def _t5():
    return T.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )


class WithT5(AnyVLM):
    """What it writes is read by a decoder of its own."""

    def inputs(self, model, *conversations, **cut):
        batch = super().inputs(model, *conversations, **cut)
        del batch["position_ids"]
        return {**batch, "decoder_input_ids": torch.zeros(len(conversations), 3, dtype=torch.long)}


def _blip_image(model, generator):
    pixels = torch.randn(1, 3, 28, 28, generator=generator, device="cpu")
    return [IMAGE] * 4, {"pixel_values": pixels}


def _asked_image(model, generator):
    """With a question for the Q-Former."""
    ids, pixels = _blip_image(model, generator)
    return ids, {**pixels, "qformer_input_ids": torch.randint(10, 290, (1, 5), generator=generator, device="cpu")}


class Asked(AnyVLM):
    """It gives its Q-Former the keywords that it does not know, positions included."""

    def inputs(self, model, *conversations, **cut):
        batch = super().inputs(model, *conversations, **cut)
        del batch["position_ids"]
        return batch

    def prompt(self, model, *conversations):
        return self.inputs(model, *conversations)


def _asked_frames(model, generator):
    pixels = torch.randn(1, 2, 3, 28, 28, generator=generator, device="cpu")
    question = torch.randint(10, 290, (1, 5), generator=generator, device="cpu")
    return [VIDEO] * 8, {"pixel_values": pixels, "qformer_input_ids": question}


def _qwen4_exp():
    """Several residual streams, keys chosen by an indexer, and positions of all tokens at every step."""
    text = dict(
        TEXT,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=32,
        rope_parameters={**MROPE_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        shared_expert_intermediate_size=32,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        split_ngram_parts=1,
        **MOE,
    )
    return T.Qwen4ExpConfig(text_config=text, vision_config=dict(QWEN3_VISION), **QWEN_IDS)


def _glm5_next():
    """Several residual streams, and latent attention without rotation."""
    text = dict(
        TEXT,
        num_hidden_layers=4,
        num_key_value_heads=4,
        layer_types=["linear_attention", "full_attention", "full_attention", "full_attention"],
        indexer_types=["full", "full", "shared", "full"],
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=16,
        v_head_dim=8,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=16,  # with few, all of some pools' scores are 0, and which of them are chosen is chance
        index_kpool=2,
        linear_head_dim=16,
        linear_num_heads=2,
        hc_mult=2,
    )
    vision = dict(QWEN_VISION, intermediate_size=64, image_size=32, projection_intermediate_size=64)
    return T.Glm5NextConfig(text_config=text, vision_config=vision, **GLM_IDS)


def _inkling2(loops: bool):
    """Attention over residual streams, with sinks and biases by distance; some layers may run several times."""
    text = dict(
        TEXT,
        num_hidden_layers=6,
        layer_types=["hybrid_sliding", "hybrid"] * 3,
        head_dim=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=8,
        unpadded_vocab_size=VOCAB,
        rel_extent=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_layers_per_attn_res_block=2,
    )
    del text["intermediate_size"]
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        posemb_grid_size=4,
        projection_hidden_dim=HIDDEN,
        text_hidden_size=HIDDEN,
    )
    if not loops:
        return T.Inkling2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    looped = dict(text, loop_layer_index_start=2, loop_layer_index_end=4, loop_num_passes=2, loop_gate_rank=8)
    vision = dict(vision, model_type="inkling2_vision")
    return T.Inkling2LoopConfig(text_config=looped, vision_config=vision, image_token_id=IMAGE)


def _inkling_image(model, generator):
    pixels = torch.randn(4, 8, 8, 3, generator=generator, device="cpu")
    return [IMAGE] * 4, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])}


INKLING2 = {
    "FFN": "reads several residual streams by attention",
    "attention": "attention sinks",
    "cai": SEVERAL_STREAMS,
    "dipe": NOTHING_ROTATES["dipe"],
}
ENCODER_DECODER = {"all": "is an encoder-decoder: images are in the encoder"}
ASKS_FOR_PIXELS = {
    "cached": "its forward asks for pixels at every step, and returns no cache",
    "padded": "it cannot read a row of text alone",
}

ROWS: dict[str, Architecture] = {
    "inkling2": Architecture(
        "Inkling 2 Small",
        AnyVLM("Inkling2ForConditionalGeneration", lambda: _inkling2(loops=False), _inkling_image),
        refused=INKLING2,
    ),
    "inkling2_loop": Architecture(
        "Inkling 2 Mini",
        AnyVLM("Inkling2LoopForConditionalGeneration", lambda: _inkling2(loops=True), _inkling_image),
        refused=INKLING2,
    ),
    "glm5_next": Architecture(
        "GLM-5.3-Flash",
        AnyVLM("Glm5NextForConditionalGeneration", _glm5_next, GRID, is_noisy=True),
        refused={**NOTHING_ROTATES, **WITHOUT_A_STATE, **dict.fromkeys(("memvr", "cai", "vista"), SEVERAL_STREAMS)},
        streams=("mlp", "mlp"),
    ),
    "qwen4_exp": Architecture(
        "Qwen4-Exp",
        AnyVLM("Qwen4ExpForConditionalGeneration", _qwen4_exp, GRID, VIDEO_BY_FRAME),
        refused={**WITHOUT_A_STATE, **dict.fromkeys(("memvr", "cai", "vista"), SEVERAL_STREAMS)},
        streams=("mlp", "mlp"),
    ),
    "blip-2": Architecture(
        "BLIP-2 (OPT)",
        AnyVLM("Blip2ForConditionalGeneration", lambda: _blip("Blip2", _opt()), _blip_image),
        refused={**NOTHING_ROTATES, **WITHOUT_TOKENS},
        differs=ASKS_FOR_PIXELS,
    ),
    "blip-2/t5": Architecture(
        "BLIP-2 (Flan-T5)",
        WithT5("Blip2ForConditionalGeneration", lambda: _blip("Blip2", _t5()), _blip_image),
        refused=ENCODER_DECODER,
    ),
    "instructblip": Architecture(
        "InstructBLIP (Vicuna)",
        AnyVLM(
            "InstructBlipForConditionalGeneration",
            lambda: _blip("InstructBlip", T.LlamaConfig(**TEXT)),
            _asked_image,
        ),
        refused=WITHOUT_TOKENS,
        differs=ASKS_FOR_PIXELS,
    ),
    "instructblip/t5": Architecture(
        "InstructBLIP (Flan-T5)",
        WithT5("InstructBlipForConditionalGeneration", lambda: _blip("InstructBlip", _t5()), _asked_image),
        refused=ENCODER_DECODER,
    ),
    "instructblipvideo": Architecture(
        "InstructBLIP (Vicuna) on videos",
        Asked(
            "InstructBlipVideoForConditionalGeneration",
            lambda: _blip("InstructBlipVideo", T.LlamaConfig(**TEXT)),
            _asked_frames,
        ),
        refused=WITHOUT_TOKENS,
        differs=ASKS_FOR_PIXELS,
    ),
    "kosmos-2": Architecture(
        "Kosmos-2",
        Kosmos2("Kosmos2ForConditionalGeneration", _kosmos_2, _square_visual(4)),
        refused={**NOTHING_ROTATES, **WITHOUT_TOKENS},
        differs={"cached": "it reads images in the first forward alone"},
    ),
    "kosmos-2.5": Architecture(
        "Kosmos-2.5",
        Kosmos("Kosmos2_5ForConditionalGeneration", _kosmos_2_5, _patches),
        refused={**NOTHING_ROTATES, **WITHOUT_TOKENS},
    ),
    "nemotron_h_omni": Architecture(
        "Nemotron 3 Nano Omni",
        AnyVLM("NemotronH_Omni_Reasoning_V3", _nemotron_h_omni, _nemotron_image, _nemotron_video),
        refused={
            "FFN": "each layer is attention or an FFN, not both",
            **NOTHING_ROTATES,
        },
    ),
}

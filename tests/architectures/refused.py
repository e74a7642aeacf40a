"""Models on which no method can work."""

from __future__ import annotations

import torch
import transformers as T
from tiny_vlms import END, IMAGE, KV_HEADS, SIGLIP, SLIDING, START, TEXT, VOCAB, _gemma4_image

from .rows import AnyVLM, Architecture


class Whole(AnyVLM):
    """A model that takes other things than a conversation: `image` makes all that one forward takes."""

    def inputs(self, model, *conversations, **pieces):
        return self.image(model, torch.Generator().manual_seed(0))


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
BERT = dict(SMALL, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
T5 = dict(d_kv=16, d_ff=64, num_layers=2, num_heads=2)


def _encoded(*size: int, **names: int):
    """Pixels, and the last tokens of a text that begins with four placeholders, under one name or more."""

    def make(model, generator):
        pixels = torch.randn(*(size or (1, 3, 28, 28)), generator=generator, device="cpu")
        text = torch.tensor([[*[IMAGE] * 4, 10, 11, 12, 13, 14, 15]])
        return {"pixel_values": pixels, **{name: text[:, -length:] for name, length in names.items()}}

    return make


def _mllama():
    vision = dict(
        SMALL,
        num_global_layers=1,
        attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]],
        max_num_tiles=1,
    )
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = dict(TEXT, num_hidden_layers=4, cross_attention_layers=[1, 3], rope_parameters=rope)
    return T.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)


def _mllama_inputs(model, generator):
    ids = torch.tensor([[10, 11, IMAGE, 12, 13]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 1, 1, 3, 28, 28, generator=generator, device="cpu"),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, ids.shape[1], 1, 1, dtype=torch.long),
    }


def _idefics():
    vision = dict(embed_dim=32, image_size=28, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return T.IdeficsConfig(**text, vision_config=dict(vision, patch_size=14))


def _idefics_inputs(model, generator):
    ids = torch.tensor([[10, 11, 12, 13]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, 3, 28, 28, generator=generator, device="cpu"),
        "image_attention_mask": torch.ones(1, 4, 1, dtype=torch.long),
    }


def _blip():
    vision = dict(SMALL, image_size=28, patch_size=14)
    return T.BlipConfig(text_config=dict(BERT, encoder_hidden_size=32), vision_config=vision)


def _git():
    return T.GitConfig(**BERT, vision_config=dict(SMALL, image_size=28, patch_size=14))


def _pix2struct():
    text = dict(T5, vocab_size=VOCAB, hidden_size=32)
    vision = dict(hidden_size=32, patch_embed_hidden_size=48, d_ff=64, d_kv=16, seq_len=16)
    vision = dict(vision, num_hidden_layers=2, num_attention_heads=2)
    return T.Pix2StructConfig(text_config=text, vision_config=vision)


def _pix2struct_inputs(model, generator):
    """Patches, each with its row and column before its pixels."""
    grid = torch.cartesian_prod(torch.arange(1.0, 3), torch.arange(1.0, 3))
    patches = torch.cat([grid, torch.randn(4, 48, generator=generator, device="cpu")], 1)[None]
    return {"flattened_patches": patches, "decoder_input_ids": torch.tensor([[10, 11, 12]])}


def _udop():
    return T.UdopConfig(**T5, vocab_size=VOCAB, d_model=32, image_size=28, patch_size=14)


def _udop_inputs(model, generator):
    boxes = torch.rand(1, 4, 2, generator=generator, device="cpu") / 2
    return _encoded(input_ids=4, decoder_input_ids=3)(model, generator) | {"bbox": torch.cat([boxes, boxes + 0.25], 2)}


def _vision_encoder_decoder():
    text = T.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    vision = T.ViTConfig(**SMALL, image_size=28, patch_size=14)
    return T.VisionEncoderDecoderConfig(encoder=vision.to_dict(), decoder=text.to_dict())


def _bart(**fields):
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    return dict(sizes, vocab_size=VOCAB, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **fields)


def _florence2():
    stages = dict(depths=[1], patch_size=[7], patch_stride=[4], patch_padding=[3], patch_prenorm=[False])
    vision = dict(stages, embed_dim=[32], num_heads=[2], num_groups=[2], window_size=4, projection_dim=32)
    return T.Florence2Config(text_config=T.BartConfig(**_bart()), vision_config=vision, image_token_id=IMAGE)


def _pp_formulanet():
    vision = dict(SMALL, image_size=32, patch_size=4, output_channels=8, window_size=2, global_attn_indexes=[1])
    neck = dict(mlp_dim=64, post_conv_in_channels=8, post_conv_mid_channels=8, post_conv_out_channels=16)
    return T.PPFormulaNetConfig(text_config=_bart(), vision_config=dict(vision, **neck, decoder_hidden_size=32))


def _t5gemma2():
    text = dict(TEXT, **SLIDING, query_pre_attn_scalar=16)
    encoder = T.T5Gemma2EncoderConfig(
        text_config=dict(text),
        vision_config=T.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return T.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=IMAGE, eoi_token_index=END)


def _pi0():
    gemma = dict(TEXT, num_hidden_layers=2, head_dim=16)
    vlm = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**SIGLIP, vision_use_head=False),
        text_config=T.GemmaConfig(**gemma),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    experts = dict(dit_config=T.GemmaConfig(**gemma), chunk_size=4, max_state_dim=8, max_action_dim=8)
    return T.PI0Config(vlm_config=vlm, **experts)


def _pi0_inputs(model, generator):
    pixels = torch.randn(1, 1, 3, 28, 28, generator=generator, device="cpu")
    return {
        "state": torch.randn(1, 8, generator=generator, device="cpu"),
        "noise": torch.randn(1, 4, 8, generator=generator, device="cpu"),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.tensor([[IMAGE] * 4 + [10, 11]]),
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _diffusion_gemma():
    moe = dict(num_experts=4, top_k_experts=2, moe_intermediate_size=32)
    text = dict(TEXT, **SLIDING, **moe, global_head_dim=16, num_global_key_value_heads=KV_HEADS)
    vision = T.Gemma4VisionConfig(**SMALL, num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2)
    ids = dict(image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END)
    return T.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4, **ids)


def _diffusion_inputs(model, generator):
    ids, pixels = _gemma4_image(model, generator)
    canvas = torch.tensor([[10, 11, 12, 13]])
    return {"input_ids": torch.tensor([[*ids, 10, 11]]), "decoder_input_ids": canvas, **pixels}


def _evolla():
    protein = dict(SMALL, vocab_size=32, max_position_embeddings=64)
    resampler = dict(resampler_depth=1, resampler_dim_head=16, resampler_heads=2, resampler_num_latents=4)
    return T.EvollaConfig(**TEXT, protein_encoder_config=protein, aligner_num_add_layers=1, **resampler)


def _evolla_inputs(model, generator):
    protein = torch.tensor([[5, 6, 7, 8]])
    return {
        "input_ids": torch.tensor([[10, 11, 12]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "protein_input_ids": protein,
        "protein_attention_mask": torch.ones_like(protein),
    }


CROSS_ATTENTION = {"all": "looks at images by cross-attention"}
ENCODER_DECODER = {"all": "is an encoder-decoder: images are in the encoder"}

ROWS = {
    "mllama": Architecture(
        "Llama 3.2 Vision",
        Whole("MllamaForConditionalGeneration", _mllama, _mllama_inputs),
        CROSS_ATTENTION,
    ),
    "idefics": Architecture("IDEFICS", Whole("IdeficsForVisionText2Text", _idefics, _idefics_inputs), CROSS_ATTENTION),
    "blip": Architecture("BLIP", Whole("BlipForConditionalGeneration", _blip, _encoded(input_ids=4)), CROSS_ATTENTION),
    "git": Architecture(
        "GIT", Whole("GitForCausalLM", _git, _encoded(input_ids=4)), {"all": "names no image placeholder token"}
    ),
    "pix2struct": Architecture(
        "Pix2Struct, DePlot, MatCha",
        Whole("Pix2StructForConditionalGeneration", _pix2struct, _pix2struct_inputs),
        ENCODER_DECODER,
    ),
    "udop": Architecture("UDOP", Whole("UdopForConditionalGeneration", _udop, _udop_inputs), ENCODER_DECODER),
    "vision-encoder-decoder": Architecture(
        "TrOCR, Donut, Nougat",
        Whole("VisionEncoderDecoderModel", _vision_encoder_decoder, _encoded(decoder_input_ids=3)),
        ENCODER_DECODER,
    ),
    "florence2": Architecture(
        "Florence-2",
        Whole(
            "Florence2ForConditionalGeneration", _florence2, _encoded(1, 3, 4, 12, input_ids=10, decoder_input_ids=3)
        ),
        ENCODER_DECODER,
    ),
    "pp_formulanet": Architecture(
        "PP-FormulaNet",
        Whole("PPFormulaNetForConditionalGeneration", _pp_formulanet, _encoded(1, 3, 32, 32, decoder_input_ids=3)),
        ENCODER_DECODER,
    ),
    "t5gemma2": Architecture(
        "T5Gemma 2",
        Whole("T5Gemma2ForConditionalGeneration", _t5gemma2, _encoded(input_ids=10, decoder_input_ids=3)),
        ENCODER_DECODER,
    ),
    "pi0": Architecture("π0", Whole("PI0ForConditionalGeneration", _pi0, _pi0_inputs), {"all": "writes no text"}),
    "diffusion_gemma": Architecture(
        "DiffusionGemma",
        Whole("DiffusionGemmaForBlockDiffusion", _diffusion_gemma, _diffusion_inputs),
        {"all": "writes text by block diffusion"},
    ),
    "evolla": Architecture(
        "Evolla", Whole("EvollaForProteinText2Text", _evolla, _evolla_inputs), {"all": "reads no images"}
    ),
}

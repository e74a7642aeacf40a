"""The real base in transformers: a LLaVA of the language model and a small vision tower, and its processor."""

from __future__ import annotations

import os

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from peft_pvm.demo.mosaic import GRID, MERGE_SIZE, NUM_CELLS, PATCH_SIZE
from peft_pvm.demo.questions import END_OF_TURN, PLACEHOLDER, Questions
from peft_pvm.folders.base_checkpoint import CONFIG, weight_files
from peft_pvm.folders.replacing import replacing

from .language_model import LanguageModel


CELL_SIDE = PATCH_SIZE * MERGE_SIZE  # pixels: a patch of the tower is a cell of the mosaic
IMAGE_SIDE = GRID * CELL_SIDE
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{%- for part in parts -%}{{- part.text -}}{%- endfor -%}"
    "{{- '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{%- for part in parts -%}"
    "{{- '<empty_output>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}{{- '<|im_end|>' -}}"
    "{%- endif -%}{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def new_vlm(language_model: LanguageModel, seed: int = 0) -> LlavaForConditionalGeneration:
    """The language model after a fresh vision tower and projector, in fp32 and eval mode.

    Args:
        language_model: Its weights are copied.
        seed: Decides those of tower and projector; torch's own generator is left as it was.
    """
    text = language_model.model.config
    config = LlavaConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIDE,
            patch_size=CELL_SIDE,
            vision_use_head=False,
        ),
        image_token_id=Questions(language_model.tokenizer).visual,
        image_seq_length=NUM_CELLS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = LlavaForConditionalGeneration(config)
    vlm.model.language_model.load_state_dict(language_model.model.model.state_dict())
    vlm.lm_head.load_state_dict(language_model.model.lm_head.state_dict())
    tokenizer = language_model.tokenizer
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    vlm.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    return vlm.eval()


def vlm_processor(language_model: LanguageModel) -> LlavaProcessor:
    """The processor that makes the base's inputs from images and chats."""
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        language_model.tokenizer,
        patch_size=CELL_SIDE,
        vision_feature_select_strategy="full",
        image_token=PLACEHOLDER,
        chat_template=CHAT_TEMPLATE,
    )


def save_vlm(vlm: LlavaForConditionalGeneration, language_model: LanguageModel, folder: str | os.PathLike) -> None:
    """Write the base as `from_pretrained` reads it, with its processor.

    Args:
        vlm: The base.
        language_model: Whose tokenizer it has.
        folder: The folder.
    """
    with replacing(folder, entry=CONFIG, outdated=weight_files) as staged:
        vlm.save_pretrained(staged)
        vlm_processor(language_model).save_pretrained(staged)

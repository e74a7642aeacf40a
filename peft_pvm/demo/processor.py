"""The tiny model as a folder like any other's, with tokenizer, image processor and chat template."""

from __future__ import annotations

import os
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..folders.base_checkpoint import CONFIG, weight_files
from ..folders.replacing import replacing
from . import mosaic


# The dialogue that the model was trained on has no roles and no ends of turn.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{%- for part in parts -%}{{- part.text -}}{%- endfor -%}{%- endgeneration -%}"
    "{%- else -%}"
    "{%- for part in parts -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def cell_token(cell: int) -> str:
    """The token that asks for a cell of a grey mosaic."""
    return f"[cell {cell}]"


def digit_token(digit: int) -> str:
    """The token that answers with a digit."""
    return f"[digit {digit}]"


class TinyVLMProcessor(ProcessorMixin):
    """Qwen3-VL's processor without videos, for which transformers' own needs torchvision.

    Importing this module makes it known, by its name, to `AutoProcessor`.
    """

    return_mm_token_type_ids = True

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token, self.image_token_id = "<|image_pad|>", mosaic.IMAGE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    replace_image_token = Qwen3VLProcessor.replace_image_token


class _TinyVLMConfig(Qwen3VLConfig):
    """AutoProcessor registers processors by configuration; that of Qwen3-VL itself stays as it is."""


AutoProcessor.register(_TinyVLMConfig, TinyVLMProcessor)


def tiny_vlm_processor() -> TinyVLMProcessor:
    """The processor that makes the tiny model's inputs from images and chats."""
    tokenizer = Tokenizer(
        models.BPE(vocab={character: byte for byte, character in bytes_to_unicode().items()}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|pad|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens(names)
    coloured = [f"[{colour} cell {cell}]" for colour in ("red", "green", "blue") for cell in range(mosaic.NUM_CELLS)]
    written = [*map(cell_token, range(mosaic.NUM_CELLS)), *coloured, *map(digit_token, range(mosaic.NUM_DIGITS))]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in written])
    side = mosaic.GRID * mosaic.MERGE_SIZE * mosaic.PATCH_SIZE
    return TinyVLMProcessor(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=mosaic.PATCH_SIZE,
            merge_size=mosaic.MERGE_SIZE,
            temporal_patch_size=mosaic.TEMPORAL_PATCH_SIZE,
            size={"shortest_edge": side**2, "longest_edge": side**2},
            image_mean=[0.5] * mosaic.CHANNELS,
            image_std=[0.5] * mosaic.CHANNELS,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=names[0], eos_token=names[0], extra_special_tokens=names[1:]
        ),
        chat_template=CHAT_TEMPLATE,
    )


def save_as_folder(model: Qwen3VLForConditionalGeneration, folder: str | os.PathLike) -> None:
    """Write the tiny model as `from_pretrained` reads it, with its processor."""
    with replacing(folder, entry=CONFIG, outdated=weight_files) as staged:
        model.save_pretrained(staged)
        tiny_vlm_processor().save_pretrained(staged)

"""The task as trainers take it: the tiny model as a folder like any other's, and questions as chats with images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
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


if TYPE_CHECKING:
    from datasets import Dataset, Features


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


Form = Literal["messages", "prompts"]


def make_chats(
    form: Form, rows: int, max_distractor_length: int = 256, split: mosaic.Split = "train", seed: int = 0
) -> Dataset:
    """Draw mosaics, text and questions, and write them as chats.

    Args:
        form: "messages": columns `images` and `messages`, a chat that asks for all nine cells, for `SFTTrainer`.
            "prompts": `images`, `prompt` and `solution`, one question a row, for `GRPOTrainer`.
        rows: Number of chats.
        max_distractor_length: Bytes of text before the first question, at most; their number is drawn uniformly.
        split: Where digits and text come from: "train", "validation" or "test".
        seed: Decides what is drawn.

    Raises:
        ValueError: Another form, or a number out of range.
    """
    if form not in get_args(Form):
        raise ValueError(f"The form is {form!r}, but must be one of {get_args(Form)}.")
    if rows < 1:
        raise ValueError(f"rows is {rows}, but must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    chats = [_chat(form, max_distractor_length, split, generator) for _ in range(rows)]
    from datasets import Dataset

    return Dataset.from_list(chats, features=_features(form))


def _features(form: Form) -> Features:
    from datasets import Features, Image, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    if form == "prompts":
        return Features({"images": List(Image()), "prompt": messages, "solution": Value("string")})
    return Features({"images": List(Image()), "messages": messages})


def write_chats(data: Dataset, folder: str | os.PathLike, split: str = "train") -> None:
    """Save chats as a folder that `datasets.load_dataset` reads.

    Args:
        data: The chats.
        folder: The folder to write to.
        split: The split's name.
    """
    name = f"{split}.parquet"
    with replacing(folder, entry=name) as staged:
        data.to_parquet(staged / name)


def _chat(form: Form, max_distractor_length: int, split: mosaic.Split, generator: torch.Generator) -> dict[str, Any]:
    from PIL.Image import fromarray

    length = int(torch.randint(max_distractor_length + 1, (), generator=generator))
    pictures = mosaic.draw_pictures(split, 1, length, 1, generator)
    cells = torch.randperm(mosaic.NUM_CELLS, generator=generator).tolist()
    answers = [digit_token(int(pictures.digits[0, 0, cell])) for cell in cells]
    text = bytes(pictures.input_ids[0, mosaic.IMAGE_LENGTH :].tolist()).decode(errors="ignore")
    image = fromarray((pictures.mosaics[0].permute(1, 2, 0) * 255).round().byte().numpy())
    if form == "prompts":
        prompt = [{"role": "user", "content": text + cell_token(cells[0])}]
        return {"images": [image], "prompt": prompt, "solution": answers[0]}
    messages = list(_turns(text, cells, answers))
    return {"images": [image], "messages": messages}


def _turns(text: str, cells: list[int], answers: list[str]) -> Iterator[dict[str, str]]:
    for number, (cell, answer) in enumerate(zip(cells, answers)):
        yield {"role": "user", "content": ("" if number else text) + cell_token(cell)}
        yield {"role": "assistant", "content": answer}

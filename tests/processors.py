"""The real processors of tiny models of three families."""

from __future__ import annotations

import transformers as T
from tiny_vlms import BOS, END, EOS, IMAGE, PAD, START, VOCAB


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SIZE = {"height": 28, "width": 28}


def tokenizer(names: dict[int, str], **attributes: str) -> T.PreTrainedTokenizerFast:
    """Letters and a few special tokens, of the ids that the tiny models know."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", **names}
    letters = {30 + index: letter for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ?\n<>-_.")}
    vocabulary = {{**letters, **special}.get(index, chr(256 + index)): index for index in range(VOCAB)}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=attributes,
    )


def llava_processor() -> T.ProcessorMixin:
    images = T.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE)
    return T.LlavaProcessor(
        images,
        tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )


def gemma3_processor() -> T.ProcessorMixin:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = tokenizer({START: names["boi_token"], END: names["eoi_token"], IMAGE: names["image_token"]}, **names)
    images = T.Gemma3ImageProcessorPil(size=SIZE)
    return T.Gemma3Processor(
        images, tokens, image_seq_length=4, chat_template=CHAT.replace("IMAGE", names["boi_token"])
    )


def idefics3_processor() -> T.ProcessorMixin:
    """Without a chat template: the image token stands before the prompt."""
    names = {IMAGE: "<image>", 310: "<fake_token_around_image>", 311: "<end_of_utterance>", 312: "<global-img>"}
    images = T.Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    return T.Idefics3Processor(images, tokenizer(names), image_seq_len=1)


PROCESSORS = {"llava": llava_processor, "gemma3": gemma3_processor, "idefics3": idefics3_processor}

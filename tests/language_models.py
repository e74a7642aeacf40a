"""A stand-in for the real language model: a tiny random Llama, whose tokenizer has the words of the mosaic task."""

from __future__ import annotations

import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.real.language_model import LanguageModel
from peft_pvm.demo.questions import COLOURS, END_OF_TURN, PLACEHOLDER, PLACES, ask, tell


def tiny_language_model(seed: int = 0, words: bool = True) -> LanguageModel:
    """A language model of the real one's shape.

    Args:
        seed: Decides the weights.
        words: Whether the words of the task are tokens.
    """
    tokens = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokens.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", END_OF_TURN, PLACEHOLDER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    places = [f"{colour} {place}" for colour in COLOURS for place in PLACES]
    sentences = [ask(places), f"Digits: {tell(places, [0] * len(places))}"]
    tokens.train_from_iterator(sentences if words else [], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<|im_start|>", eos_token=END_OF_TURN, pad_token="<|endoftext|>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer)


def read_chat(text: str) -> list[tuple[list[str], list[str]]]:
    """The places and the answer of each turn of a chat."""
    turns = re.findall(r"Which digits are at (.*?)\?<\|im_end\|>.*?Digits: (.*?)<\|im_end\|>", text, re.DOTALL)
    return [(asked.split(", "), told.split(", ")) for asked, told in turns]

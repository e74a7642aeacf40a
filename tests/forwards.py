"""Forwards of a model under test: prompts, whole passes, prefilling and resuming on a cache, generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import environment  # noqa: F401  # its settings act before PEFT is imported
import pytest
import torch
from peft import PeftModel
from tiny_vlms import IMAGE, VIDEO, VOCAB, TinyVLM
from transformers.cache_utils import StaticLayer

from peft_pvm.utils.packages import CACHE


TOLERANCE = 1e-5  # between logits that another order of the same sums gives
PROMPTS = ("t4 i t3 i t6", "t7 i t5", "t9")
# Special tokens are not sampled: without a cache, the base would take them for images that bring no features.
GENERATE = dict(
    max_new_tokens=5,
    min_new_tokens=5,
    pad_token_id=0,
    suppress_tokens=list(range(300, VOCAB)),
    return_dict_in_generate=True,
    output_logits=True,
)
static_caches_crop = pytest.mark.skipif("crop" not in vars(StaticLayer), reason="static caches cannot be cropped")
LAST = 3  # tokens decoded after the operation


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def in_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return in_dtype(inputs, torch.float64)


def generate(tiny: TinyVLM, model: PeftModel, *prompts: str, seed: int | None = None, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    base = model.get_base_model()
    inputs = tiny.prompt(base, *prompts)
    inputs = in_double(inputs) if base.dtype == torch.float64 else inputs
    return model.generate(**inputs, **{**GENERATE, "do_sample": False, **kwargs})


def without_images(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text of one conversation."""
    ids = [token_id for token_id in inputs["input_ids"][0].tolist() if token_id not in (IMAGE, VIDEO)]
    text = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if "token_type_ids" in inputs:
        text["token_type_ids"] = torch.ones(1, len(ids), dtype=torch.long)
    return text


def prefill(tiny: TinyVLM, model: PeftModel, *conversations: str, stop: int | None = None, cache=None):
    inputs = tiny.inputs(model.get_base_model(), *conversations, stop=stop)
    with torch.no_grad():
        return model(**inputs, **{CACHE: cache}, use_cache=True)[CACHE]


def resume(tiny: TinyVLM, model: PeftModel, cache, conversation: str, start: int) -> torch.Tensor:
    inputs = tiny.inputs(model.get_base_model(), conversation, start=start)
    return logits(model, inputs, **{CACHE: cache}, use_cache=True)


def ends_of_turns(tiny: TinyVLM, base: torch.nn.Module, first: str, chat: str) -> list[int]:
    """Where to cut a chat that begins with `first`: a prompt, an answer token by token, another turn, its answer."""
    prompt, length = (tiny.inputs(base, each)["input_ids"].shape[1] for each in (first, chat))
    return [0, prompt - 2, prompt - 1, prompt, length - 4, length - 3, length - 1, length]


def logits_in_turns(
    tiny: TinyVLM, base: torch.nn.Module, chats: Sequence[str], cuts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The logits of whole chats, each on its own cache, piece by piece in turns with the others."""
    caches: list = [None] * len(chats)
    pieces: list[list[torch.Tensor]] = [[] for _ in chats]
    with torch.no_grad():
        for turn in range(len(cuts[0]) - 1):
            for number, chat in enumerate(chats):
                piece = tiny.inputs(base, chat, start=cuts[number][turn], stop=cuts[number][turn + 1])
                output = base(**piece, **{CACHE: caches[number]}, use_cache=True)
                caches[number] = output[CACHE]
                pieces[number].append(output.logits)
    return [torch.cat(of_chat, 1) for of_chat in pieces]


def counted_graphs() -> tuple[list[torch.fx.GraphModule], Callable]:
    """A list, and a backend for `torch.compile` that runs graphs as they are and adds each to the list."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return graphs, backend


def prompt_and_step(tiny: TinyVLM, base: torch.nn.Module, conversation: str) -> tuple[dict, dict]:
    """The inputs of a prompt, and those of one more token on the cache that it leaves."""
    prompt = tiny.inputs(base, conversation)
    step = dict(
        input_ids=torch.tensor([[11]]),
        position_ids=prompt["position_ids"][..., -1:] + 1,
        attention_mask=torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long),
    )
    return prompt, step


def length_of(tiny: TinyVLM, model: PeftModel, conversation: str) -> int:
    return tiny.inputs(model.get_base_model(), conversation)["input_ids"].shape[1]

"""What is asked of vLLM and of transformers alike, how, and the lab's tiny Qwen3-VL as both run it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from experiments.serving_load import save_for_vllm
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.integrations.vllm import export_vllm
from peft_pvm.integrations.vllm.choices import FOLDER


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
NEW_TOKENS = 12


@dataclass(frozen=True)
class Request:
    """A prompt with a placeholder for each image, which images, by number, and of how many frames a video is."""

    prompt: str
    images: tuple[int, ...] = ()
    frames: int = 0


@dataclass(frozen=True)
class Answer:
    """The tokens of a greedy answer, the log-probability of each, and how many tokens of the prompt were cached."""

    tokens: list[int]
    logprobs: list[float]
    num_cached: int = 0

    def begins(self, length: int) -> Answer:
        """The first tokens of it."""
        return replace(self, tokens=self.tokens[:length], logprobs=self.logprobs[:length])

    def differs_by(self, other: Answer) -> float:
        """By how much at most their logprobs differ; infinite if the tokens do."""
        if self.tokens != other.tokens:
            return float("inf")
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs))


TOLERANCE = 2e-4  # of log-probabilities, in fp32


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same tokens with the same log-probabilities."""
    differences = [a.differs_by(b) for a, b in zip(found, expected, strict=True)]
    assert max(differences) < TOLERANCE, differences


REQUESTS = [
    Request(f"{IMAGE}[cell 3]", (0,)),
    Request(f"{IMAGE}{'A sentence of text that lies in between. ' * 8}[cell 5]", (1,)),
    Request(f"Some text first. {IMAGE}{'and more of it ' * 30}[cell 1]", (2,)),
    Request(f"{IMAGE} then another {IMAGE} and a question [cell 7]", (3, 4)),
    Request(f"{IMAGE}{IMAGE} side by side", (5, 5)),
    Request(f"text and an image at the end {IMAGE}", (6,)),
    Request(f"{VIDEO} and an image {IMAGE}{' of which ' * 10}[cell 4]", (7,), frames=6),
    Request("no image at all [cell 2]"),
]


def picture(number: int) -> Image.Image:
    """Noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(frames: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A video of so many pictures, two a second, and what is known about it."""
    pixels = np.stack([np.asarray(picture(100 + number)) for number in range(frames)])
    known = dict(fps=2.0, duration=frames / 2, total_num_frames=frames, frames_indices=list(range(frames)))
    return pixels, known


def save_base(folder: Path) -> Path:
    """The tiny model with the processor of a real Qwen3-VL, as vLLM wants it."""
    return save_for_vllm(load_tiny_vlm(), folder)


def exported(base: Path, adapters: Sequence[Path], folder: Path) -> Path:
    """What vLLM serves."""
    return export_vllm(base, ["+".join(map(str, adapters))], folder) if adapters else base


def ask_transformers(base: Path, adapters: Sequence[Path], requests: Sequence[Request], **kwargs: Any) -> list[Answer]:
    """What each request alone is answered."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    processor = AutoProcessor.from_pretrained(base)
    for number, adapter in enumerate(adapters):
        model.load_adapter(str(adapter), adapter_name=f"adapter_{number}")
    if adapters:
        model.set_adapter([f"adapter_{number}" for number in range(len(adapters))])
    answers = []
    for request in requests:
        images = [picture(number) for number in request.images]
        video = {}
        if request.frames:
            pixels, known = clip(request.frames)
            video = dict(videos=[pixels], video_metadata=[VideoMetadata(**known)], do_sample_frames=False)
        inputs = processor(text=[request.prompt], images=images or None, return_tensors="pt", **video)
        inputs.pop(
            "token_type_ids", None
        )  # with which Gemma 3 sees images whole; vLLM on a CPU lets it see them causally
        output = model.generate(
            **inputs,
            do_sample=False,
            eos_token_id=[],
            return_dict_in_generate=True,
            output_logits=True,
            **{"max_new_tokens": NEW_TOKENS, **kwargs},
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = torch.cat(output.logits).log_softmax(-1)
        answers.append(Answer(tokens, [logprobs[step, token].item() for step, token in enumerate(tokens)]))
    return answers


@contextlib.contextmanager
def engine(folder: Path, **kwargs: Any) -> Iterator[Any]:
    """vLLM on a folder, as small as it goes: so that prompts come in chunks and prefixes of a sentence are cached."""
    from vllm import LLM

    settings = dict(
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        block_size=32,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2, "video": {"count": 1, "num_frames": 8, "width": 24, "height": 24}},
        kv_cache_memory_bytes=256 << 20,
    )
    llm = LLM(str(folder), **{**settings, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@contextlib.contextmanager
def engine_inside(folder: Path, **kwargs: Any) -> Iterator[Any]:
    """An engine in this process, which is there in a few seconds."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv(
            "VLLM_CPU_OMP_THREADS_BIND", "nobind"
        )  # the threads of this process are left where they are
        with engine(folder, distributed_executor_backend="uni", **kwargs) as llm:
            yield llm


def loras(folder: Path, names: Sequence[str | None]) -> list[Any]:
    """vLLM's way to ask for some of the choices in a folder, or for none."""
    from vllm.lora.request import LoRARequest

    places = sorted(path for path in (folder / FOLDER).iterdir())
    by_name = {path.name: LoRARequest(path.name, number, str(path)) for number, path in enumerate(places, 1)}
    return [None if name is None else by_name[name] for name in names]


def ask_vllm(llm: Any, requests: Sequence[Request], lora_request: Any = None, **kwargs: Any) -> list[Answer]:
    """What the requests are answered, all at once, each with its LoRA or one for all."""
    from vllm import SamplingParams

    settings = dict(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    sampling = SamplingParams(**{**settings, **kwargs})
    prompts = []
    for request in requests:
        images = [picture(number) for number in request.images]
        data = {**({"image": images} if images else {}), **({"video": clip(request.frames)} if request.frames else {})}
        prompts.append({"prompt": request.prompt, **({"multi_modal_data": data} if data else {})})
    answers = []
    for result in llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora_request):
        tokens = list(result.outputs[0].token_ids)
        logprobs = [of_token[token].logprob for token, of_token in zip(tokens, result.outputs[0].logprobs)]
        answers.append(Answer(tokens, logprobs, result.num_cached_tokens))
    return answers

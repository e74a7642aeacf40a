"""The measurement: all methods in one process, taking turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ..attention.call import AttentionCall
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import find_vlm
from ..tokens.tap import VISUAL_MASK
from ..utils.packages import CACHE, attn_implementation
from .meters import describe_machine, free_bytes, import_seconds, peak_bytes, seconds
from .models import METHODS, pvm_config, structural_copy


Result = TypeVar("Result")
TEXT_BEFORE = 16  # tokens in front of the image


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        methods: Names from `METHODS`; the base is always among them.
        contexts: Lengths of the prompt, visual tokens included.
        visual_tokens: Tokens of the one image, which stands behind a few tokens of text.
        batch: Rows, all alike.
        new_tokens: Tokens decoded in a round.
        rounds: Rounds of decoding, after a token that does not count.
        prefills: Rounds of prefilling, after one that does not count.
        static_cache: Whether the KV cache has its full size from the start.
        compile: Whether decoding is compiled; on CUDA, into graphs. The cache is static then.
        seed: The seed of the embeddings.
    """

    methods: tuple[str, ...] = ("pvm", "pvm-naive", "dipe", "t-drs")
    contexts: tuple[int, ...] = (2048,)
    visual_tokens: int = 1024
    batch: int = 1
    new_tokens: int = 8
    rounds: int = 5
    prefills: int = 3
    static_cache: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods names {unknown}, but there are {', '.join(METHODS)}.")
        shortest = self.visual_tokens + TEXT_BEFORE + 1
        if not self.contexts or min(self.contexts) < shortest or self.visual_tokens < 1:
            raise ValueError(
                f"contexts is {list(self.contexts)}, but {self.visual_tokens} visual tokens need at least {shortest}."
            )
        for name in ("batch", "new_tokens", "rounds", "prefills"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 1 or more.")


@dataclass
class Measured:
    """What one method took at one length.

    Attributes:
        prefill_s: The time of each round, in seconds.
        decode_s: The median time of a token in each round, in seconds.
        prefill_bytes: The most memory that the prefill takes for tensors, the KV cache included.
        decode_bytes: The same for decoding one token.
        attention_prefill: Time of the changed attention of one layer over that of the kernel alone, of each round.
        attention_decode: The same for one token.
        left_out: Why nothing was measured.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    prefill_bytes: int = 0
    decode_bytes: int = 0
    attention_prefill: list[float] = field(default_factory=list)
    attention_decode: list[float] = field(default_factory=list)
    left_out: str | None = None


class Runner:
    """One method on a copy of the model that shares its weights.

    Args:
        model: The model, without adapters.
        name: The name of the method.
        context: Length of the prompt.
        settings: What is measured.
    """

    def __init__(self, model: nn.Module, name: str, context: int, settings: Settings):
        self.model: Any = structural_copy(model)
        METHODS[name].attach(self.model)
        self.step: Any = self.model
        self.settings, self.context = settings, context
        if settings.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.step = torch.compile(self.model, mode=mode, fullgraph=True)
        self.prompt = self._make_prompt(knows_images=name != "base")
        self.cache: Cache | None = None
        self.length = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _fresh_cache(self) -> Cache:
        settings = self.settings
        config = find_vlm(self.model).text_config
        if settings.static_cache or settings.compile:
            most = self.context + settings.new_tokens * (settings.rounds + 2)
            return StaticCache(config=config, max_cache_len=most)
        return DynamicCache(config=config)

    def _make_prompt(self, knows_images: bool) -> dict[str, torch.Tensor]:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        size = (settings.batch, self.context, find_vlm(self.model).text_config.hidden_size)
        embeds = torch.randn(size, generator=generator).mul_(0.02).to(self.device, self.model.dtype)
        prompt = {"inputs_embeds": embeds, "position_ids": self._positions(0, self.context)}
        if knows_images:
            prompt[VISUAL_MASK] = torch.zeros(size[:2], dtype=torch.bool, device=self.device)
            prompt[VISUAL_MASK][:, TEXT_BEFORE : TEXT_BEFORE + settings.visual_tokens] = True
        return prompt

    def prefill(self) -> None:
        """Read the prompt into a new cache."""
        self.cache, self.length = self._fresh_cache(), self.context
        self.model(**self.prompt, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        """One token more."""
        token = torch.full((self.settings.batch, 1), 7, device=self.device)
        positions = self._positions(self.length, self.length + 1)
        self.step(input_ids=token, position_ids=positions, **{CACHE: self.cache}, use_cache=True)
        self.length += 1

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=self.device).expand(self.settings.batch, -1)

    def overheard(self, forward: Callable[[], Result]) -> tuple[AttentionCall | None, Result]:
        """What the attention of the first layer that is changed is called with in a forward, and what that returns."""
        calls: list[AttentionCall] = []

        def observe(call: AttentionCall) -> None:
            if not calls and call.context.stages.get(call.module.layer_idx) is not None:
                calls.append(call)

        def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            context: VisualContext | None = kwargs.get(CONTEXT)
            if context is not None:
                context.observers.append(observe)

        handle = find_vlm(self.model).text_model.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            result = forward()
        finally:
            handle.remove()
        return calls[0] if calls else None, result


@torch.no_grad()
def measure(
    model: nn.Module, settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure prefill, decoding, memory and loading.

    Every method has a copy of the model with the same weights. In each round all take their turn, in changing order;
    what is compared was measured within one round.

    Args:
        model: A vision-language model from transformers.
        settings: What is measured.
        progress: Called with what comes next.

    Returns:
        What the JSON file holds: "machine", "model", "settings", "loading", and "contexts", each with `Measured` by
        method.
    """
    vlm, names = find_vlm(model), list(dict.fromkeys(("base", *settings.methods)))
    # Of one forward in Python, torch keeps a few compiled forms alone: here it is that of all methods.
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit * len(names)):
        results = [
            {"context": context, "methods": _measure_context(model, names, context, settings, progress)}
            for context in settings.contexts
        ]
    progress("loading")
    return {
        "machine": describe_machine(next(model.parameters()).device),
        "model": {
            "name": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "decoder_layers": len(vlm.layers),
            "hidden_size": vlm.text_config.hidden_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": attn_implementation(vlm.text_config),
        },
        "settings": asdict(settings),
        "loading": measure_loading(model),
        "contexts": results,
    }


def _measure_context(
    model: nn.Module, names: Sequence[str], context: int, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    device = next(model.parameters()).device
    measured = {name: Measured() for name in names}
    heads = find_vlm(model).text_config.num_attention_heads
    for name in names:
        needed = METHODS[name].whole_matrices * settings.batch * heads * context**2 * 4
        if needed > 0.9 * free_bytes(device):
            measured[name].left_out = f"needs {needed / 2**30:.0f} GiB"
    runners = {name: Runner(model, name, context, settings) for name in names if measured[name].left_out is None}
    # What comes first warms up, and is where memory is measured and attention is overheard.
    for name, runner in runners.items():
        progress(f"{context} tokens, {METHODS[name].title}: memory and attention")
        own = measured[name]
        call, own.prefill_bytes = runner.overheard(partial(peak_bytes, runner.prefill, device))
        own.attention_prefill = _attention_ratios(call, settings.prefills)
        if settings.compile:
            runner.decode()
        else:
            call, own.decode_bytes = runner.overheard(partial(peak_bytes, runner.decode, device))
            own.attention_decode = _attention_ratios(call, settings.rounds)
    for number in range(settings.prefills):
        for name in _in_turn(runners, number):
            progress(f"{context} tokens, {METHODS[name].title}: prefill {number + 1} of {settings.prefills}")
            measured[name].prefill_s.append(seconds(runners[name].prefill, device))
    for number in range(settings.rounds):
        for name in _in_turn(runners, number):
            progress(f"{context} tokens, {METHODS[name].title}: decoding, round {number + 1} of {settings.rounds}")
            times = [seconds(runners[name].decode, device) for _ in range(settings.new_tokens)]
            measured[name].decode_s.append(statistics.median(times))
    return {name: asdict(value) for name, value in measured.items()}


def _in_turn(runners: dict[str, Runner], number: int) -> Iterator[str]:
    """The first is not always the same: what comes first may find a cooler processor."""
    names = list(runners)
    shift = number % len(names)
    yield from (*names[shift:], *names[:shift])


def _attention_ratios(call: AttentionCall | None, rounds: int) -> list[float]:
    if call is None:
        return []
    device = call.query.device
    ratios = []
    for number in range(rounds + 1):
        kernel = seconds(call.run_kernel, device)
        changed = seconds(call.attend, device)
        if number:
            ratios.append(changed / kernel)
    return ratios


def measure_loading(model: nn.Module, rounds: int = 5) -> dict[str, float]:
    """What it takes to have a PVM adapter of the paper's proportions, in seconds: the medians of some rounds.

    Args:
        model: A vision-language model from transformers.
        rounds: How often each is done.
    """
    device = next(model.parameters()).device
    times: dict[str, list[float]] = {name: [] for name in ("attach", "first_forward", "next_forward", "load", "swap")}
    config = pvm_config(model)
    draw = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            attached = structural_copy(model)
            started = time.perf_counter()
            wrapped = PeftModel(attached, config)
            times["attach"].append(time.perf_counter() - started)
            token = torch.full((1, 1), 7, device=device)
            for name in ("first_forward", "next_forward"):
                times[name].append(seconds(partial(wrapped, input_ids=token), device))
            draw.append(_seconds_to_draw(wrapped))
            wrapped.save_pretrained(folder)
            times["load"].append(seconds(partial(wrapped.load_adapter, folder, "second"), device))
            for name in ("second", "default"):
                times["swap"].append(seconds(partial(wrapped.set_adapter, name), device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    import_peft, import_pvm = import_seconds()
    return {
        **medians,
        "draw_weights": statistics.median(draw),
        "import_peft": import_peft,
        "import_peft_pvm": import_pvm,
    }


def _seconds_to_draw(model: nn.Module) -> float:
    """How long it takes to draw as many random numbers as the adapter has: that is allocation, not attaching."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    for shape in shapes:
        torch.empty(shape).normal_()
    return time.perf_counter() - started

"""What runs in a measurement: one method, a prompt, and steps of decoding after it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ..attention.call import AttentionCall
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import find_vlm
from ..tokens.tap import VISUAL_MASK
from ..utils.packages import CACHE, cache_in
from ..utils.wrapping import Shadow
from .models import METHODS, structural_copy


Result = TypeVar("Result")
TEXT_BEFORE = 16  # tokens in front of the image
TOKEN = 7  # what all text consists of, where tokens are given


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        methods: Names from `METHODS`; the base is always among them.
        contexts: Lengths of the prompt, visual tokens included.
        visual_tokens: Tokens of the one image, which comes after a few tokens of text.
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

    @property
    def most_new_tokens(self) -> int:
        """For how many tokens after the prompt a static cache has room."""
        return self.new_tokens * (self.rounds + 2)


class Runner:
    """One method on a copy of the model that shares its weights.

    Args:
        model: The model, without adapters.
        name: The name of the method.
        context: Length of the prompt.
        settings: What is measured.
    """

    def __init__(self, model: nn.Module, name: str, context: int, settings: Settings):
        self.model: Any = structural_copy(model).requires_grad_(False)  # as PEFT does, also for the base by itself
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
            return StaticCache(config=config, max_cache_len=self.context + settings.most_new_tokens)
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
        self._read()

    def decode(self) -> None:
        """One token more."""
        self._go_on()

    def _read(self, cache: Cache | None = None) -> torch.Tensor:
        """What the model makes of the prompt: the logits of its last token, `(batch, 1, vocab_size)`."""
        self.cache, self.length = self._fresh_cache() if cache is None else cache, self.context
        return self.model(**self.prompt, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1).logits

    def _go_on(self) -> torch.Tensor:
        """The logits of one more token, likewise."""
        positions = self._positions(self.length, self.length + 1)
        output = self.step(input_ids=self._tokens(1), position_ids=positions, **{CACHE: self.cache}, use_cache=True)
        self.length += 1
        return output.logits

    def _tokens(self, number: int) -> torch.Tensor:
        return torch.full((self.settings.batch, number), TOKEN, device=self.device)

    def _positions(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=self.device).expand(self.settings.batch, -1)

    def overheard(self, forward: Callable[[], Result]) -> tuple[AttentionCall | None, Result]:
        """The call of attention in the first layer that is changed, and what the forward returns."""
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


class GenerateRunner(Runner):
    """Runs a method that acts only in `generate`, as `generate` runs it.

    A prefill is all that `generate` does before it chooses a token, such as reading the prompt once more for a second
    run. A step is a forward and what changes its scores, such as a step of the second run. The first run is the same
    as in `Runner`, so that what is beyond the base is the method's own.

    The vision tower is left out of all runs: wherever the prompt comes with its image, its embeddings are put in the
    place of its tokens and of pixels, which are zeros here.

    Args:
        model: The model, without adapters.
        name: The name of the method.
        context: Length of the prompt.
        settings: What is measured.

    Raises:
        NotImplementedError: Decoding is to be compiled.
        ValueError: The method cannot act on the model.
    """

    def __init__(self, model: nn.Module, name: str, context: int, settings: Settings):
        if settings.compile:
            raise NotImplementedError(
                f"{METHODS[name].title} acts in generate, and what it does there around the forwards is not compiled. "
                "Measure it without compile."
            )
        super().__init__(model, name, context, settings)
        tokens, visual = self._tokens(context), self.prompt[VISUAL_MASK]
        self.given = {
            "input_ids": tokens.masked_fill(visual, find_vlm(self.model).placeholder_ids["image"][0]),
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": torch.zeros(settings.batch, 3, 1, 1, dtype=self.model.dtype, device=self.device),
        }
        self.model.register_forward_pre_hook(self._embed, with_kwargs=True, prepend=True)
        # Else generate runs the vision tower itself, before any forward.
        Shadow(self.model, "_supports_mm_encoder_outputs", lambda: False)

    def _embed(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("pixel_values") is None:
            return args, kwargs
        others = {name: value for name, value in kwargs.items() if name not in ("input_ids", "pixel_values")}
        return args, {**others, **self.prompt}

    def prefill(self) -> None:
        """Have `generate` prepare the method, and read the prompt into a new cache."""
        settings = self.settings
        how: dict[str, Any] = {"cache_implementation": "static"} if settings.static_cache else {}
        self.model.generate(
            **self.given, **how, max_new_tokens=settings.most_new_tokens, do_sample=False, custom_generate=self._begin
        )

    def _begin(self, model: Any, input_ids: torch.Tensor, logits_processor: Any, **inputs: Any) -> torch.Tensor:
        """Takes the place of `generate`'s loop."""
        self.input_ids, self.processors = input_ids, logits_processor
        self.call = contextvars.copy_context()  # in which the method finds this call of generate
        self.processors(self.input_ids, self._read(cache_in(inputs))[:, -1].float())
        return input_ids

    def decode(self) -> None:
        """One token more, within the call of `generate` that has read the prompt."""
        self.call.run(self._step)

    def _step(self) -> None:
        self.input_ids = torch.cat([self.input_ids, self._tokens(1)], 1)
        self.processors(self.input_ids, self._go_on()[:, -1].float())


def runner_of(model: nn.Module, name: str, context: int, settings: Settings) -> Runner:
    """One method on a copy of the model, in `generate` if it acts only there.

    Args:
        model: The model, without adapters.
        name: The name of the method.
        context: Length of the prompt.
        settings: What is measured.

    Raises:
        NotImplementedError: The method cannot be measured like this.
        ValueError: It cannot act on the model.
    """
    return (GenerateRunner if METHODS[name].in_generate else Runner)(model, name, context, settings)

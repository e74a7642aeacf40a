"""Lets adapters that act in `generate` prepare before it begins, such as by a second run of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from ..tokens.context import VisualContext
from ..tokens.families import VisionLanguageModel
from ..tokens.positions import placeholder_mask
from ..utils.packages import CACHE_NAMES, cache_in, modalities_in
from ..utils.text import quoted
from ..utils.wrapping import Shadow


ATTRIBUTE = "_second_runs"  # the attribute of the model that holds its `GenerateRuns`
# Arguments of `generate` that do not reach the model, beside settings; and the cache, of which each run has its own.
OWN = {*inspect.signature(GenerationMixin.generate).parameters, *CACHE_NAMES, "tokenizer", "assistant_tokenizer"}


@dataclass(frozen=True, eq=False)
class Prompt:
    """What `generate` was given.

    Attributes:
        vlm: The model's parts.
        inputs: The keyword arguments that reach the model, without a cache. `input_ids` and `attention_mask` are among
            them, `(batch, seq_len)`.
        visual: Which tokens stand for images or videos, `(batch, seq_len)`, bool.
        num_cached: How many of them the given KV cache holds already.
    """

    vlm: VisionLanguageModel
    inputs: Mapping[str, Any]
    visual: torch.Tensor
    num_cached: int


def text_alone(prompt: Prompt, title: str) -> dict[str, Any]:
    """A prompt without its images: rows without placeholder tokens and padding, padded on the left again.

    Args:
        prompt: The prompt.
        title: The method's name, for the message.

    Returns:
        Keyword arguments for `generate`.

    Raises:
        ValueError: A row has no text.
    """
    kept = prompt.inputs["attention_mask"].bool() & ~prompt.visual
    lengths = kept.sum(1)
    if not bool(lengths.all()):
        raise ValueError(f"{title} leaves the images out, but a row of the prompt has nothing else. Add some text.")
    # Stable, so that what is left out moves to the left and the rest stays in order.
    order = kept.int().argsort(dim=1, stable=True)[:, -int(lengths.max()) :]
    mask = kept.gather(1, order)
    second = {"attention_mask": mask.long()}
    for name in ("input_ids", "token_type_ids"):
        if prompt.inputs.get(name) is not None:
            tokens = prompt.inputs[name].gather(1, order)
            second[name] = torch.where(mask, tokens, tokens[:, -1:])  # no placeholder is left, not even in padding
    return second


class InGenerate:
    """Base of the methods that act only in `generate`, and prepare for it. A plain forward is that of the base."""

    acts_in_forwards: ClassVar[bool] = False
    title: ClassVar[str]

    @classmethod
    def check_generates(cls, vlm: VisionLanguageModel, tuner: str) -> None:
        """Raise a ValueError that says why, if the `generate` of a model does not bring what is needed."""
        model = vlm.model
        if not isinstance(model, GenerationMixin):
            why = "has no generate"
        elif vlm.inner_generator is not None or vlm.family.image_mask:
            why = "does not give its language model the tokens that images stand for"
        else:
            return
        raise ValueError(f"{type(model).__name__} {why}, in which {tuner} would act.")

    def check_settings(self, settings: GenerationConfig, assistant: Any) -> None:
        """Raise a NotImplementedError if the method cannot act in a call of `generate`.

        Args:
            settings: As `generate` has completed them.
            assistant: The argument `assistant_model`.
        """

    def begin(self, run: Run, prompt: Prompt, settings: GenerationConfig) -> list[LogitsProcessor]:
        """Prepare for a call of `generate` with images. The adapter does not act in what this runs.

        Args:
            run: The call. What it is to have later goes into `Run.found`.
            prompt: What it was given.
            settings: As `generate` has completed them.

        Returns:
            What has to change the scores.
        """
        raise NotImplementedError


class GenerateHandle:
    """Has `generate` of a model ask a layer whether its adapters act, until `remove` is called.

    Args:
        layer: The layer, whose method is an `InGenerate`.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        model = layer.vlm.model
        self.runs: GenerateRuns = model.__dict__.get(ATTRIBUTE) or GenerateRuns(layer.vlm)
        self.runs.layers.append(layer)

    def remove(self) -> None:
        """Take the layer away; the last one gives the model its own `generate` back."""
        self.runs.layers.remove(self.layer)
        if not self.runs.layers:
            self.runs.remove()


class GenerateRuns:
    """Takes the place of a model's `generate`, and of the method that makes its logits processors.

    The first sees what the user gave, pixels included. The second has the scores changed before any other processor.

    Args:
        vlm: The model's parts.

    Attributes:
        layers: Those whose adapters may act.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self.vlm = vlm
        self.layers: list[Any] = []
        vars(vlm.model)[ATTRIBUTE] = self
        self._own_generate = Shadow(vlm.model, "generate", self._generate)
        self._own_processors = Shadow(vlm.model, "_get_logits_processor", self._get_logits_processor)

    def remove(self) -> None:
        """Give the model its own methods back."""
        self._own_generate.remove()
        self._own_processors.remove()
        del vars(self.vlm.model)[ATTRIBUTE]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.vlm.model
        acting = {name: layer.configs[name] for layer in self.layers for name in layer.acting()}
        if not acting:
            return self._own_generate(*args, **kwargs)
        if len(acting) > 1:
            raise NotImplementedError(
                f"The adapters {' and '.join(map(quoted, acting))} are active and both run the model on the prompt of "
                "generate once more, which one adapter can do. Choose one with set_adapter."
            )
        (config,) = acting.values()
        names = list(inspect.signature(type(model).generate).parameters)[1:]
        run = Run(self.vlm, config, {**dict(zip(names, args)), **kwargs})
        outer = _RUN.set(run)
        try:
            result = self._own_generate(*args, **kwargs)
        finally:
            _RUN.reset(outer)
        if not run.has_begun:
            raise NotImplementedError(
                f"generate of {type(model).__name__} did not go token by token with this model, so that "
                f"{config.title} did not act. Take the adapter off with unload(), or use other settings."
            )
        return result

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = self._own_processors(*args, **kwargs)
        # Without layers, whoever has patched the method since still calls this.
        if self.layers and (run := running(self.vlm.model)) is not None:
            processors[:0] = run.begin(kwargs["generation_config"], kwargs["model_kwargs"])
        return processors


class Run:
    """One call of `generate` in which an adapter acts.

    Args:
        vlm: The model's parts.
        config: The adapter's.
        given: The arguments of the call by name.

    Attributes:
        has_begun: Whether `generate` has asked for its processors.
        found: What the adapter has found for the forwards of this call. `None`: nothing.
    """

    def __init__(self, vlm: VisionLanguageModel, config: InGenerate, given: Mapping[str, Any]):
        self.vlm, self.config, self.given = vlm, config, given
        self.has_begun = False
        self.found: Any = None
        self._cache: Any = None

    def begin(self, settings: GenerationConfig, inputs: Mapping[str, Any]) -> list[LogitsProcessor]:
        """The processors that have to change the scores: none if no row of the batch has an image.

        Args:
            settings: As `generate` has completed them.
            inputs: Those of the model, as `generate` has completed them.

        Raises:
            NotImplementedError: The method cannot act in such a call.
        """
        self.has_begun, self._cache = True, cache_in(inputs)
        self.config.check_settings(settings, self.given.get("assistant_model"))
        prompt = self._prompt(settings, inputs)
        if not bool(prompt.visual.any()):
            return []
        outer = _RUN.set(None)
        try:
            return self.config.begin(self, prompt, settings)
        finally:
            _RUN.reset(outer)

    def has(self, context: VisualContext) -> bool:
        """Whether a forward is one of this call, and not of what else runs meanwhile, such as a logits processor."""
        return context.cache is self._cache

    def _prompt(self, settings: GenerationConfig, inputs: Mapping[str, Any]) -> Prompt:
        given = {name: value for name, value in self.given.items() if name not in OWN and not hasattr(settings, name)}
        input_ids = given.setdefault("input_ids", self.given.get("inputs"))
        if input_ids is None or given.get("inputs_embeds") is not None:
            raise NotImplementedError(
                f"{self.config.title} needs the tokens of the prompt to run the model on them a second time. Give "
                "generate input_ids, without inputs_embeds."
            )
        cache, mask = cache_in(inputs), given.get("attention_mask")
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        if input_ids.shape[1] <= num_cached or (mask is not None and mask.shape[1] != input_ids.shape[1]):
            raise NotImplementedError(
                f"{self.config.title} runs the model a second time on the whole conversation, but generate was given "
                f"{input_ids.shape[1]} tokens beside a KV cache of {num_cached}. Give it all input_ids, those in the "
                "cache included."
            )
        if mask is None:  # generate has made one, unless no token is padding
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask[:: len(mask) // len(input_ids)]
            given["attention_mask"] = mask
        # A placeholder that brings no features is text.
        modalities = self.vlm.placeholder_ids if num_cached else modalities_in(given)
        token_ids = {token_id for modality in modalities for token_id in self.vlm.placeholder_ids[modality]}
        visual = placeholder_mask(input_ids, sorted(token_ids)) & mask.bool()
        return Prompt(self.vlm, given, visual, num_cached)


def running(model: Any) -> Run | None:
    """The call of a model's `generate` in which an adapter acts, from within it."""
    run = _RUN.get()
    return run if run is not None and run.vlm.model is model else None


_RUN: ContextVar[Run | None] = ContextVar("the call of generate that is running", default=None)

"""A method that changes the scores of `generate` is one class: its configuration, which says what a second run of the
model is given, and what the logits of the two runs make.

While an adapter acts, `generate` runs the model twice for each token. A plain forward is that of the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from ..tokens.families import VisionLanguageModel
from ..tokens.positions import placeholder_mask
from ..utils.packages import CACHE_NAMES, cache_in, logits_processors, modalities_in
from ..utils.text import quoted
from .branch import Branch
from .without_parameters import (
    LayerWithoutParameters,
    TunerWithoutParameters,
    WithoutParameters,
    make_tuner,
    no_weights,
)


ATTRIBUTE = "_second_runs"  # of the model, on which those of its `generate` stand
# Arguments of `generate` that do not reach the model, beside settings; and the cache, of which each run has its own.
OWN = {*inspect.signature(GenerationMixin.generate).parameters, *CACHE_NAMES, "tokenizer", "assistant_tokenizer"}
TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


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


@dataclass
class LogitsMethod(WithoutParameters):
    """Base of the methods that contrast the logits of two runs in `generate`: a subclass is a whole method.

    A subclass has a name, `method`, fields made by `setting`, `second_prompt` and `scores`. Rows without an image are
    left alone, to the bit. See `WithoutParameters` for what its docstring says.

    Args:
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    acts_in_forwards: ClassVar[bool] = False

    init_weights: bool = no_weights()

    def second_prompt(self, prompt: Prompt) -> dict[str, Any]:
        """What the second run reads: keyword arguments for `generate`, without settings and without a cache.

        Args:
            prompt: What the first run reads.

        Raises:
            NotImplementedError: It cannot be made.
        """
        raise NotImplementedError

    def scores(self, logits: torch.Tensor, other: torch.Tensor, num_generated: int) -> torch.Tensor:
        """The scores of the next token.

        Args:
            logits: Of the first run, `(batch, vocab_size)`, fp32.
            other: Of the second run, the same.
            num_generated: How many tokens this call of `generate` has added to the prompt.

        Returns:
            `(batch, vocab_size)`.
        """
        raise NotImplementedError

    @classmethod
    def tuner(cls) -> type[LogitsMethodTuner]:
        return logits_tuner(cls)


class LogitsMethodLayer(LayerWithoutParameters):
    """A child of the text model that has `generate` run the model a second time."""

    method_cls: ClassVar[type[LogitsMethod]]

    def new_hooks(self) -> list[Any]:
        return [GenerateHandle(self)]


class LogitsMethodTuner(TunerWithoutParameters):
    """Base of the tuners that `logits_tuner` makes."""

    method_cls: ClassVar[type[LogitsMethod]]

    def resolve(self, config: Any) -> Any:
        model = self.vlm.model
        if not isinstance(model, GenerationMixin):
            why = "has no generate"
        elif self.vlm.inner_generator is not None or self.vlm.family.image_mask:
            why = "does not give its language model the tokens that images stand for"
        else:
            return config
        raise ValueError(f"{type(model).__name__} {why}, in which {self.method_cls.tuner_name()} would act.")


def logits_tuner(method_cls: type[LogitsMethod]) -> type[LogitsMethodTuner]:
    """The tuner of a method: the same class each time it is asked for."""
    return make_tuner(method_cls, LogitsMethodTuner, LogitsMethodLayer, "change the scores of generate")


class GenerateHandle:
    """Has `generate` of a model ask a layer whether its adapters act, until it is removed.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: LogitsMethodLayer):
        self.layer = layer
        model = layer.vlm.model
        self.runs: SecondRuns = model.__dict__.get(ATTRIBUTE) or SecondRuns(layer.vlm)
        self.runs.layers.append(layer)

    def remove(self) -> None:
        """Take the layer away; the last one gives the model its own `generate` back."""
        self.runs.layers.remove(self.layer)
        if not self.runs.layers:
            self.runs.remove()


class SecondRuns:
    """Stands in the place of a model's `generate`, and of what makes its logits processors.

    The first sees what the user gave, pixels included. The second has the scores changed before any other processor.

    Args:
        vlm: The model's parts.

    Attributes:
        layers: Those whose adapters may act.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self.vlm = vlm
        self.layers: list[LogitsMethodLayer] = []
        self._shadows = {
            ATTRIBUTE: self,
            "generate": self._generate,
            "_get_logits_processor": self._get_logits_processor,
        }
        vlm.model.__dict__.update(self._shadows)

    def remove(self) -> None:
        """Give the model its own methods back."""
        for name in self._shadows:
            del self.vlm.model.__dict__[name]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.vlm.model
        acting = {name: layer.configs[name] for layer in self.layers for name in layer.acting()}
        if not acting:
            return type(model).generate(model, *args, **kwargs)
        if len(acting) > 1:
            raise NotImplementedError(
                f"The adapters {' and '.join(map(quoted, acting))} are active and both decide the scores of generate, "
                "which one adapter can do. Choose one with set_adapter."
            )
        (config,) = acting.values()
        names = list(inspect.signature(type(model).generate).parameters)[1:]
        run = Run(self.vlm, config, {**dict(zip(names, args)), **kwargs})
        outer = _RUN.set(run)
        try:
            result = type(model).generate(model, *args, **kwargs)
        finally:
            _RUN.reset(outer)
        if not run.has_begun:
            raise NotImplementedError(
                f"generate of {type(model).__name__} went another way than token by token with this model, so that "
                f"{config.title} did not act. Take the adapter off with unload(), or use other settings."
            )
        return result

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        model: Any = self.vlm.model
        processors = logits_processors(model, *args, **kwargs)
        run = _RUN.get()
        if run is not None and run.vlm.model is model:
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
    """

    def __init__(self, vlm: VisionLanguageModel, config: LogitsMethod, given: Mapping[str, Any]):
        self.vlm, self.config, self.given = vlm, config, given
        self.has_begun = False

    def begin(self, settings: GenerationConfig, inputs: Mapping[str, Any]) -> list[LogitsProcessor]:
        """What has to change the scores: nothing where no row has an image.

        Args:
            settings: As `generate` has completed them.
            inputs: Those of the model, as `generate` has completed them.

        Raises:
            NotImplementedError: The method cannot act in such a call.
        """
        self.has_begun = True
        mode = settings.get_generation_mode(self.given.get("assistant_model"))
        if mode not in TOKEN_BY_TOKEN:
            raise NotImplementedError(
                f"{self.config.title} changes the scores of one token after another, greedily or by sampling, which "
                f"{mode.value} does not do. Use num_beams=1, without assistant_model and prompt_lookup_num_tokens."
            )
        prompt = self._prompt(settings, inputs)
        has_image = prompt.visual.any(1)
        if not bool(has_image.any()):
            return []
        outer = _RUN.set(None)
        try:
            branch = Branch(self.vlm.model, self.config.second_prompt(prompt), settings)
        finally:
            _RUN.reset(outer)
        has_image = has_image.repeat_interleave(settings.num_return_sequences)
        return [SecondRunProcessor(self.config, branch, has_image, prompt.visual.shape[1])]

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
            mask = torch.ones_like(input_ids) if mask is None else mask[:: settings.num_return_sequences]
            given["attention_mask"] = mask
        # A placeholder that brings no features is text.
        modalities = self.vlm.placeholder_ids if num_cached else modalities_in(given)
        token_ids = {token_id for modality in modalities for token_id in self.vlm.placeholder_ids[modality]}
        visual = placeholder_mask(input_ids, sorted(token_ids)) & mask.bool()
        return Prompt(self.vlm, given, visual, num_cached)


_RUN: ContextVar[Run | None] = ContextVar("the call of generate that is running", default=None)


class SecondRunProcessor(LogitsProcessor):
    """Changes the scores of each token by what a second run gives for it.

    Args:
        config: The method.
        branch: The second run, which has read its prompt.
        has_image: Which rows have an image, `(batch,)`, bool: the others are left alone.
        prompt_length: How many tokens the first run has read.
    """

    def __init__(self, config: LogitsMethod, branch: Branch, has_image: torch.Tensor, prompt_length: int):
        self.config, self.branch, self.has_image = config, branch, has_image
        self.prompt_length = self.expected = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        num_tokens = input_ids.shape[1]
        if num_tokens != self.expected:
            raise NotImplementedError(
                f"{self.config.title} follows generate one token at a time, but is asked about {num_tokens} tokens "
                f"where {self.expected} come next. Do not use assisted decoding or a decoding loop that goes back."
            )
        if num_tokens > self.prompt_length:
            self.branch.step(input_ids[:, -1:])
        self.expected += 1
        changed = self.config.scores(scores, self.branch.logits, num_tokens - self.prompt_length)
        return torch.where(self.has_image[:, None], changed, scores)

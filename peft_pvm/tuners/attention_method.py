"""A method that changes attention is one class: its configuration, which says what stages it adds to a layer.

`attention_tuner` makes the rest of such a class, the tuner and its layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..attention.attention_check import AttentionCheck
from ..attention.dispatch import SteeringHandle, steerable_attentions
from ..attention.rotation import ROTARY_FUNCTIONS, has_rotary_function
from ..attention.stages import LayerStages, Stage
from ..tokens.blocks import layer_input
from ..tokens.context import CONTEXT, VisualContext, dropped_keywords
from ..tokens.families import VisionLanguageModel
from ..utils.text import quoted
from .ffn_hooks import has_embeddings
from .last_logits import LastLogits
from .one_by_one import OneByOne
from .without_parameters import LayerMethod, LayerWithoutParameters, TunerWithoutParameters, make_tuner


@dataclass(frozen=True)
class SteeredLayer:
    """A decoder layer whose attention a method can change.

    Attributes:
        layer_idx: Its index.
        rotary: The rotary embedding that it uses; `None` in a layer that does not rotate queries and keys.
        layer_type: Its type, for a rotary embedding that tells types apart.
    """

    layer_idx: int
    rotary: nn.Module | None
    layer_type: str | None


@dataclass
class AttentionMethod(LayerMethod):
    """Base of the methods that change attention and have no parameters: a subclass is a whole method.

    A subclass has a name, `method`, fields made by `setting`, and `stages`. See `WithoutParameters` for what its
    docstring says.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the method's own choice, which
            is all that it can act on unless the method says otherwise.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    rotates: ClassVar[bool] = False  # whether it rotates queries or keys itself
    reads_layer_inputs: ClassVar[bool] = False  # what its layers are called with, by `enter`
    reads_while_off: ClassVar[bool] = False  # also while the adapter is off, for when it is switched on
    reads_embeddings: ClassVar[bool] = False  # those of visual tokens
    multiplies_scores: ClassVar[bool] = False  # so that a score below 0 goes the other way
    reads_logits: ClassVar[bool] = False  # of the forward before, by what `LastLogits` notes of them

    def stages(self, layer: SteeredLayer) -> Stage | Sequence[Stage]:
        """What it does to the attention of a layer: nothing, one stage or several.

        Called in every forward, for each layer that it acts on.
        """
        raise NotImplementedError

    def fitted_to(self, vlm: VisionLanguageModel) -> AttentionMethod:
        """This configuration with what depends on the model filled in. Raises a ValueError if it does not fit it."""
        return self

    def enter(
        self, vlm: VisionLanguageModel, layer_idx: int, context: VisualContext, hidden_states: torch.Tensor
    ) -> None:
        """Take in what one of its layers is called with, before its attention runs.

        Args:
            vlm: The model's parts.
            layer_idx: The layer.
            context: What is known of its tokens.
            hidden_states: `(batch, seq_len, hidden_size)`.
        """
        raise NotImplementedError

    def acts_in(self, context: VisualContext) -> bool:
        """Whether it does anything in a forward: in every one, unless the method says otherwise."""
        return True

    @classmethod
    def layers_on(cls, vlm: VisionLanguageModel) -> list[int]:
        """The layers of a model that the method can act on.

        Raises:
            ValueError: There is none, or one that is not known well enough; the message says why.
        """
        if cls.reads_logits and (vlm.head is None or not vlm.generators):
            raise ValueError(
                f"{type(vlm.model).__name__} has no head that makes logits, which {cls.tuner_name()} reads."
            )
        attentions = steerable_attentions(vlm, cls.tuner_name())
        for layer_idx, attention in attentions.items():
            rotates = cls.rotates and vlm.rotary is not None and vlm.rotates(attention)
            if rotates and not has_rotary_function(attention):
                raise ValueError(
                    f"{type(attention).__name__} (decoder layer {layer_idx} of {type(vlm.model).__name__}) rotates by "
                    f"none of {ROTARY_FUNCTIONS}, of which {cls.tuner_name()} needs one."
                )
        return list(attentions)

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        """Have a forward keep what the method needs later, even while no adapter is active."""

    @classmethod
    def tuner(cls) -> type[AttentionMethodTuner]:
        return attention_tuner(cls)


class AttentionMethodLayer(LayerWithoutParameters):
    """A child of the text model that tells each forward what to do to the attention of which layers.

    Args:
        vlm: The model's parts.
    """

    method_cls: ClassVar[type[AttentionMethod]]

    def __init__(self, vlm: VisionLanguageModel):
        super().__init__(vlm)
        self.layers = {
            layer_idx: SteeredLayer(layer_idx, vlm.rotary_of(layer_idx), vlm.layer_type(layer_idx))
            for layer_idx in self.method_cls.layers_on(vlm)
        }
        self._unchecked = set(self.layers)
        self._has_embeddings = not self.method_cls.reads_embeddings

    def new_hooks(self) -> list[Any]:
        start = self.vlm.text_model.register_forward_pre_hook(self._start_forward, with_kwargs=True)
        attentions = self.vlm.self_attentions
        checks = map(self._new_check, sorted(self._unchecked))
        hooks = [start, *map(SteeringHandle, attentions.values()), *checks, *self._new_entry_hooks()]
        if not self.method_cls.acts_in_forwards:
            hooks.append(OneByOne(self.vlm, self.method_cls.title, self.acting))
        return [*hooks, LastLogits(self.vlm, self.acting)] if self.method_cls.reads_logits else hooks

    def _new_entry_hooks(self) -> list[Any]:
        if not self.method_cls.reads_layer_inputs:
            return []
        layers = self.vlm.layers
        return [
            layers[layer_idx].register_forward_pre_hook(functools.partial(self._enter, layer_idx), with_kwargs=True)
            for layer_idx in self.layers
        ]

    def _enter(self, layer_idx: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context, acting = kwargs.get(CONTEXT), self.acting()
        if context is None or context.refusal is not None:
            return
        reading = [self.configs[name] for name in (self.configs if self.method_cls.reads_while_off else acting)]
        reading = [config for config in reading if layer_idx in config.layers_among(list(self.layers))]
        if not reading:
            return
        try:
            hidden_states = layer_input(args, kwargs, context.batch_size, self.vlm.text_config.hidden_size)
        except NotImplementedError:
            if acting:
                raise
            return
        for config in reading:
            config.enter(self.vlm, layer_idx, context.tail(hidden_states.shape[1]), hidden_states.detach())

    def _new_check(self, layer_idx: int) -> AttentionCheck:
        layer, attention = self.layers[layer_idx], self.vlm.self_attentions[layer_idx]
        passed = functools.partial(self._unchecked.discard, layer_idx)
        rotates = self.method_cls.rotates
        return AttentionCheck(attention, layer.rotary, layer.layer_type, rotates, self.acting, passed)

    def _start_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = cast(VisualContext, kwargs[CONTEXT])
        self.method_cls.start_forward(context)
        for adapter_name in self.acting():
            context.check_keys()
            if not self._has_embeddings:
                model = type(self.vlm.model).__name__
                self._has_embeddings = has_embeddings(context, model, "Take it off with unload()")
            if self.configs[adapter_name].acts_in(context):
                self._add_stages(context, adapter_name)

    def _add_stages(self, context: VisualContext, adapter_name: str) -> None:
        config = self.configs[adapter_name]
        for layer_idx in config.layers_among(list(self.layers)):
            stages = config.stages(self.layers[layer_idx])
            for stage in [stages] if isinstance(stages, Stage) else stages:
                context.stages.setdefault(layer_idx, LayerStages()).add(stage, adapter_name, layer_idx)
                context.await_layer(layer_idx, dropped_keywords)


class AttentionMethodTuner(TunerWithoutParameters):
    """Base of the tuners that `attention_tuner` makes."""

    method_cls: ClassVar[type[AttentionMethod]]

    def steerable_layers(self) -> list[int]:
        """The layers that the method can act on: see `AttentionMethod.layers_on`."""
        return self.method_cls.layers_on(self.vlm)

    def resolve(self, config: Any) -> Any:
        layers = self.steerable_layers()
        wrong = [layer_idx for layer_idx in config.layers_to_transform or () if layer_idx not in layers]
        if wrong:
            raise ValueError(
                f"{type(config).__name__}.layers_to_transform names layers {quoted(wrong)}, but on "
                f"{type(self.model).__name__} the method can act on layers {quoted(layers)} only."
            )
        return config.fitted_to(self.vlm)


def attention_tuner(method_cls: type[AttentionMethod]) -> type[AttentionMethodTuner]:
    """The tuner of a method: the same class each time it is asked for."""
    return make_tuner(method_cls, AttentionMethodTuner, AttentionMethodLayer, "act on attention")

"""A method that changes the output of FFNs is one class: its configuration, which says what becomes of an output.

`ffn_tuner` makes the rest of such a class, the tuner and its layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import VisionLanguageModel
from ..utils.text import quoted
from .block_check import BlockCheck
from .ffn_hooks import FFNCall, FFNHooks, ffns_missed, has_embeddings
from .in_generate import GenerateHandle, InGenerate
from .without_parameters import LayerMethod, LayerWithoutParameters, TunerWithoutParameters, make_tuner


@dataclass(frozen=True, eq=False)
class FFNStep:
    """One FFN on which an adapter acts, in one forward.

    Attributes:
        vlm: The model's parts.
        layer_idx: Index of the decoder layer.
        context: What is known of its tokens, `seq_len` of them.
        entering: The residual stream before the layer, `(batch, seq_len, hidden_size)`. `None` where gradient
            checkpointing runs the layer again: what it decides is to be handed on before.
        ffn_input: What the FFN read, likewise.
        output: What the FFN returned, likewise.
        handed_on: What this adapter has handed on in this forward, by layer index: see `VisualContext.handed_on`.
    """

    vlm: VisionLanguageModel
    layer_idx: int
    context: VisualContext
    entering: torch.Tensor | None
    ffn_input: torch.Tensor
    output: torch.Tensor
    handed_on: dict[int, Any]


@dataclass
class FFNMethod(LayerMethod):
    """Base of the methods that change what FFNs return and have no parameters: a subclass is a whole method.

    A subclass has a name, `method`, fields made by `setting`, and `changed`. See `WithoutParameters` for what its
    docstring says. It is given the FFN's own output, also where another adapter adds to it.

    Args:
        layers_to_transform: Indices of the decoder layers it acts on (or one). `None`: the method's own choice.
        init_weights: Without effect: there are no weights. PEFT expects the field.
    """

    reads_embeddings: ClassVar[bool] = False  # whether it reads those of visual tokens

    def changed(self, step: FFNStep) -> torch.Tensor | None:
        """What the FFN's output becomes, `(batch, seq_len, hidden_size)`; `None`: it stays."""
        raise NotImplementedError

    @classmethod
    def check_model(cls, vlm: VisionLanguageModel) -> None:
        """Raise a ValueError that says why, if the method cannot act on a model."""

    @classmethod
    def tuner(cls) -> type[FFNMethodTuner]:
        return ffn_tuner(cls)


class FFNMethodLayer(LayerWithoutParameters):
    """A child of the text model that changes what the FFNs of some layers return.

    Args:
        vlm: The model's parts.
    """

    method_cls: ClassVar[type[FFNMethod]]

    def __init__(self, vlm: VisionLanguageModel):
        super().__init__(vlm)
        self._unchecked = set(range(len(vlm.layers))) if not vlm.block.has_streams else set()
        self._has_embeddings = not self.method_cls.reads_embeddings
        self._missed = functools.partial(ffns_missed, self.method_cls.tuner_name())
        self._layers_of: dict[str, list[int]] = {}

    def new_hooks(self) -> list[Any]:
        hooks: list[Any] = [self.vlm.text_model.register_forward_pre_hook(self._start_forward, with_kwargs=True)]
        depths = list(range(len(self.vlm.layers)))
        # Not asked for in each forward: that would search the model once for each layer.
        self._layers_of = {name: config.layers_among(depths) for name, config in self.configs.items()}
        for layer_idx in sorted({layer_idx for layers in self._layers_of.values() for layer_idx in layers}):
            acts = functools.partial(self._acting_in, layer_idx)
            # First: what others put beside the FFN is added to what it becomes.
            hooks.append(FFNHooks(self.vlm, layer_idx, acts, self._change, before_others=True))
            if layer_idx in self._unchecked:
                passed = functools.partial(self._unchecked.discard, layer_idx)
                hooks.append(BlockCheck(self.vlm.layers[layer_idx], self.vlm.block, acts, passed))
        return [*hooks, GenerateHandle(self)] if issubclass(self.method_cls, InGenerate) else hooks

    def _acting_in(self, layer_idx: int) -> list[str]:
        return [name for name in self.acting() if layer_idx in self._layers_of[name]]

    def _start_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context: VisualContext = kwargs[CONTEXT]
        for adapter_name in self.acting():
            context.check()
            for layer_idx in self._layers_of[adapter_name]:
                context.await_layer(layer_idx, self._missed)
            if not self._has_embeddings:
                model, what_works = type(self.vlm.model).__name__, "Take it off with unload()"
                self._has_embeddings = has_embeddings(context, model, what_works)

    def _change(self, call: FFNCall) -> torch.Tensor | None:
        layer_idx = call.layer_idx
        names = self._acting_in(layer_idx)
        if not names:
            return None
        call.context.reached(layer_idx, self._missed)
        if call.context.memory.is_empty:
            return None
        output, ffn_input = call.output, call.ffn_input
        entering = None if call.entering is None else call.entering.to(output.device)
        changed = None
        for name in names:
            handed_on = call.context.handed_on.setdefault((self.method_cls.method, name), {})
            context = call.context.tail(output.shape[1])
            step = FFNStep(self.vlm, layer_idx, context, entering, ffn_input, output, handed_on)
            changed = self.configs[name].changed(step)
            output = output if changed is None else changed
        return output


class FFNMethodTuner(TunerWithoutParameters):
    """Base of the tuners that `ffn_tuner` makes."""

    method_cls: ClassVar[type[FFNMethod]]

    def resolve(self, config: Any) -> Any:
        vlm, name = self.vlm, type(config).__name__
        if vlm.block.ends_with_sum:  # the block, too, may raise
            raise ValueError(
                f"The FFNs of {type(vlm.model).__name__} return the residual stream with their output in it, so that "
                f"{name} cannot change only that."
            )
        self.method_cls.check_model(vlm)
        depth = len(vlm.layers)
        if too_deep := [layer_idx for layer_idx in config.layers_to_transform or () if layer_idx >= depth]:
            raise ValueError(
                f"{name}.layers_to_transform names layers {quoted(too_deep)}, but the text model has only {depth} "
                f"layers (0 to {depth - 1})."
            )
        return config


def ffn_tuner(method_cls: type[FFNMethod]) -> type[FFNMethodTuner]:
    """The tuner of a method: the same class each time it is asked for."""
    return make_tuner(method_cls, FFNMethodTuner, FFNMethodLayer, "change what FFNs return")

"""Hooks on the FFN of a decoder layer: an adapter adds a branch beside it or changes its output, in any model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..tokens.blocks import DecoderBlock
from ..tokens.context import CONTEXT, VisualContext, dropped_keywords
from ..tokens.families import VisionLanguageModel
from ..tokens.tap import this_thread


@dataclass(frozen=True, eq=False)
class FFNCall:
    """What the FFN of a decoder layer was given in a forward, and what it returned.

    Attributes:
        context: What this forward knows about its tokens.
        layer_idx: Index of the decoder layer.
        layer: The decoder layer.
        block: Its shape.
        entering: What the layer was given, `(batch, seq_len, hidden_size)`: the residual stream before it, or several.
            `None` where gradient checkpointing runs the layer again.
        normed: What the norm before the FFN was given, likewise.
        norm_output: What that norm returned, likewise. `None` if the layer has already let go of it.
        attention: What attention returned in a parallel block, likewise.
        output: What the FFN adds to the stream, likewise.
    """

    context: VisualContext
    layer_idx: int
    layer: nn.Module
    block: DecoderBlock
    entering: torch.Tensor | None
    normed: torch.Tensor
    norm_output: torch.Tensor | None
    attention: torch.Tensor | None
    output: torch.Tensor

    @property
    def stream(self) -> torch.Tensor:
        """The residual stream after self-attention, `(batch, seq_len, hidden_size)`."""
        return self.normed if self.attention is None else self.normed + self.attention

    @property
    def ffn_input(self) -> torch.Tensor:
        """What the FFN reads, `(batch, seq_len, hidden_size)`: computed once more where the layer did not keep it."""
        if self.block.reads_stream:
            return self.normed
        if self.norm_output is not None:
            return self.norm_output
        return self.block.norm(self.layer).forward(self.normed)  # without hooks, which are for the layer's own call


class FFNHooks:
    """Has an adapter act on the FFN of one decoder layer, until `remove` is called, like the handle of a hook.

    Args:
        vlm: The model's parts.
        layer_idx: Index of the decoder layer.
        acts: Whether the adapter acts now.
        change: Gives the FFN's output that takes the place of `FFNCall.output`. `None`: it stays.
        before_others: Whether it comes before the hooks that are there, so that it is given the FFN's own output.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        layer_idx: int,
        acts: Callable[[], Any],
        change: Callable[[FFNCall], torch.Tensor | None],
        before_others: bool = False,
    ):
        self.layer_idx = layer_idx
        self.acts = acts
        self.change = change
        self.layer, self.block = vlm.layers[layer_idx], vlm.block
        # What the hooks of one forward hand on, by thread: a server may run several conversations on one model. The
        # decoder layer itself holds all of it until it adds up its output: nothing outlives it, however it ends.
        self._in_flight: dict[int, dict[str, weakref.ref[Any]]] = {}
        mixer = self.block.token_mixer(self.layer)
        self._handles = [
            self.layer.register_forward_pre_hook(self._take_entering, with_kwargs=True),
            mixer.register_forward_pre_hook(self._take_context, with_kwargs=True),
            self.block.norm(self.layer).register_forward_pre_hook(self._take_normed),
            self.block.norm(self.layer).register_forward_hook(self._take_norm_output),
        ]
        if self.block.is_parallel:
            self._handles.append(mixer.register_forward_hook(self._take_attention))
        self._before_others = before_others
        self._follow_ffn_end()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_flight": {}}  # what a failed forward has left points nowhere, and is not pickled

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in (*self._handles, self._ffn_handle):
            handle.remove()

    def _follow_ffn_end(self) -> None:
        self._ffn_end = getattr(self.layer, self.block.ffn_end)
        self._ffn_handle = self._ffn_end.register_forward_hook(self._act, prepend=self._before_others)

    def _take_entering(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(self.layer, self.block.ffn_end) is not self._ffn_end:  # OPT's is a linear layer: LoRA wraps it
            self._ffn_handle.remove()
            self._follow_ffn_end()
        self._hand_on("entering", args[0] if args else kwargs["hidden_states"])

    # The others run within the forward of the decoder layer, also when gradient checkpointing runs it again: in this
    # order, but in a parallel block the norm comes first.

    def _take_context(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        context = kwargs.get(CONTEXT)
        if context is not None:
            self._hand_on("context", context)
        elif self.acts():
            raise dropped_keywords([self.layer_idx], type(self.layer).__name__)

    def _take_normed(self, module: nn.Module, args: tuple) -> None:
        self._hand_on("normed", args[0])

    def _take_norm_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._hand_on("norm_output", output)

    def _take_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        # Parallel block: the stream after attention exists only as a sum that the layer forms at its end.
        self._hand_on("attention", output[0] if isinstance(output, tuple) else output)

    def _hand_on(self, name: str, thing: Any) -> None:
        self._in_flight.setdefault(this_thread(), {})[name] = weakref.ref(thing)

    def _act(self, module: nn.Module, args: tuple, output: Any) -> Any:
        handed = {name: reference() for name, reference in self._in_flight.pop(this_thread(), {}).items()}
        needed = ("context", "normed", "attention") if self.block.is_parallel else ("context", "normed")
        if any(handed.get(name) is None for name in needed):
            return None  # if the adapter was to act, it is missed when the forward ends
        # A mixture of experts may return its router's logits as well. OPT puts the tokens of all rows in one list.
        own = output[0] if isinstance(output, tuple) else output
        context = cast(VisualContext, handed["context"])
        states = [*map(handed.get, ("entering", "normed", "norm_output", "attention")), own]
        by_row = (_by_row(each, context) for each in states)
        changed = self.change(FFNCall(context, self.layer_idx, self.layer, self.block, *by_row))
        if changed is None:
            return None
        changed = changed.view_as(own)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _by_row(tensor: Any, context: VisualContext) -> Any:
    return tensor if tensor is None or tensor.dim() > 2 else tensor.unflatten(0, (context.batch_size, -1))


def has_embeddings(context: VisualContext, model: str, what_works: str) -> bool:
    """Whether a forward has embeddings of visual tokens to read: without images, that cannot be said. Waits for the
    device.

    Args:
        context: Of the forward.
        model: The name of the model's class.
        what_works: What to do with a model that has none.

    Raises:
        NotImplementedError: There are images, but nothing is in the input embeddings.
    """
    if context.visual_mask is None or torch.compiler.is_compiling():
        return False
    if not context.derived("embeddings", lambda: bool(context.memory.embeddings.any())):
        raise NotImplementedError(
            f"{model} does not put the features of images into the input embeddings of its text model: at its visual "
            "tokens these are 0, or there are none, because the features enter inside the layers or the text model "
            f"reads the pixels itself. The adapter has nothing to remember of them. {what_works}."
        )
    return True


def ffns_missed(name: str, layers: list[int], model: str) -> NotImplementedError:
    """The error for decoder layers in which an adapter was to act and did not."""
    return NotImplementedError(
        f"{name} did not act in decoder layers {layers} of {model}: a layer, or its attention, norm or FFN, was "
        "replaced after the adapter was attached (by fused kernels, for instance), or was not called, or not in the "
        "order attention, norm, FFN. Replace modules first and attach the adapter then."
    )

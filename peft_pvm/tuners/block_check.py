"""A check, made once, that a decoder layer adds its FFN to the residual stream as adapters assume.

What an adapter puts beside the FFN, or makes of its output, is added to the stream after attention where the FFN's
output is. So the output of the layer must be the sum of both, times a number at most, or a later module of the layer
must read that sum, as in Gemma 4 with inputs by layer or in the AltUp of Gemma 3n. That is tried on a few tokens of
the first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..tokens.blocks import DecoderBlock
from ..tokens.tap import this_thread
from ..utils.packages import is_tuner_child


FEW = 4  # tokens
FIT = 0.9  # of the numbers must agree: a few may suffer from rounding
SMALL = 0.02  # of what the FFN adds


class BlockCheck:
    """Checks a decoder layer when an adapter first acts on its FFN, and then removes itself.

    It has a method `remove`, like the handle of a hook.

    Args:
        layer: The decoder layer.
        block: Its shape.
        acts: Whether an adapter acts now.
        passed: Called when the layer has passed the check.
    """

    def __init__(self, layer: nn.Module, block: DecoderBlock, acts: Callable[[], Any], passed: Callable[[], None]):
        self.acts = acts
        self.passed = passed
        self.ffn_scale = block.ffn_scale
        # What the layer must add up, by thread. If a forward ends before, a few numbers are left.
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._num_parts = 3 if block.is_parallel else 2
        self._added_up = slice(1, None) if block.ends_with_sum else slice(None)
        self._layer, self._ffn_end = layer, block.ffn_end
        self._is_over = False
        self._note_ffn()
        self._handles = [
            block.norm(layer).register_forward_pre_hook(self._start),
            *(module.register_forward_pre_hook(self._read) for module in _inside(layer)),
            layer.register_forward_hook(self._compare),
        ]
        if block.is_parallel:
            self._handles.append(block.token_mixer(layer).register_forward_hook(self._note))

    def remove(self) -> None:
        """Stop checking."""
        self._is_over = True  # also for a forward of another thread that is about to start
        for handle in (self._ffn_handle, *self._handles):
            handle.remove()
        self._handles, self._parts = [], {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy. PyTorch cannot copy the handle of a hook whose module is gone, such as that of a former LoRA."""
        alive = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        return {**vars(self), "_handles": alive}

    def _start(self, module: nn.Module, args: tuple) -> None:
        if self.acts() and not self._is_over and not torch.compiler.is_compiling():
            # Last again, to note what all adapters make of the FFN's output, also those that were attached later.
            self._ffn_handle.remove()
            self._note_ffn()
            self._parts[this_thread()] = [_last(args[0], min(FEW, args[0].shape[1]))]

    def _note_ffn(self) -> None:
        self._ffn_handle = getattr(self._layer, self._ffn_end).register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        if parts := self._parts.get(this_thread()):
            parts.append(self.ffn_scale * _last(output, len(parts[0])))

    def _read(self, module: nn.Module, args: tuple) -> None:
        parts = self._parts.get(this_thread(), [])
        if len(parts) != self._num_parts or not args or not isinstance(args[0], torch.Tensor) or args[0].dim() < 2:
            return
        if self._is_sum(args[0], parts):
            self._pass()

    def _compare(self, layer: nn.Module, args: tuple, output: Any) -> None:
        parts = self._parts.pop(this_thread(), [])
        # With fewer parts, the adapter did not act either, which the forward's end tells. Of what is not finite, a sum
        # shows nothing: the next forward is checked.
        if len(parts) == self._num_parts and not _drops_out(layer) and all(part.isfinite().all() for part in parts):
            if not self._is_sum(output, parts):
                raise NotImplementedError(
                    f"{type(layer).__name__} does not return the sum of its residual stream after attention and of "
                    "what its FFN returns, so that an adapter there would not be added to what it reads. Take it "
                    "off with unload(); the methods that change only attention work. A row in "
                    "peft_pvm/tokens/blocks.py can say where the two are in these layers."
                )
            self._pass()

    def _is_sum(self, output: Any, parts: list[torch.Tensor]) -> bool:
        return _is_sum(_last(output, len(parts[0])), parts[self._added_up])

    def _pass(self) -> None:
        self.passed()
        self.remove()


def _drops_out(layer: nn.Module) -> bool:
    """Whether dropout changes what is added to the stream, so that the sum cannot be seen before evaluation."""
    dropout = getattr(layer, "dropout", 0.0)  # a module, or the rate of a function
    return layer.training and bool(getattr(dropout, "p", dropout))


def _inside(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a decoder layer, at any depth."""
    for child in layer.children():
        if not is_tuner_child(child):
            yield from child.modules()


def _last(output: Any, num_tokens: int) -> torch.Tensor:
    """A copy of the last tokens, whatever is returned with them, `(num_tokens, hidden_size)`."""
    states = output[0] if isinstance(output, tuple) else output
    return states.detach().flatten(0, -2)[-num_tokens:].clone()


def _is_sum(output: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether an output is a multiple of the sum of some parts, but for rounding. Waits for the device."""
    if output.shape != parts[0].shape or not output.is_floating_point():
        return False
    rounding = 4 * torch.finfo(output.dtype).eps
    output, *parts = (tensor.float() for tensor in (output, *parts))
    stacked = torch.stack(parts)
    total, size = stacked.sum(0), stacked.abs().sum(0)
    scale = (output * total).sum() / total.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    allowed = (rounding * size + SMALL * parts[-1].abs()) * scale.abs()
    return bool(((output - scale * total).abs() <= allowed).float().mean() >= FIT)

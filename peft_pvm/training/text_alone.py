"""Decoder layers and a head that compute only the text, in training steps in which nothing depends on visual tokens.

Where all images are hidden, no text token attends to a visual token, in any layer. So the hidden states of visual
tokens reach the loss in one way only: by labels of the tokens after them. Without such labels, each decoder layer is
given the tokens of text, without padding, and its output is put back among zeros. What lies between the layers stays
as it is: masks, rotations and features that enter at later layers are those of whole rows of the batch. The head does
the same.

A layer that is called with something of each token that is not known here computes all tokens, as in any other step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from ..methods.pvm.layer import PVMLayer
from ..tokens.context import CONTEXT, VisualContext
from ..tokens.families import VisionLanguageModel
from ..tokens.positions import scatter_rows, select_rows
from ..tokens.tap import by_name, is_active, this_thread
from ..utils.packages import attn_implementation


IGNORED = -100  # the label of a token without a loss
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Other arguments of layers with an entry for each token, and how many axes come after that of the tokens.
BY_TOKEN = {"position_embeddings": 1, "position_ids": 0}
HIDDEN_STATES = "hidden_states"
MASK = "attention_mask"


def labels_of(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The labels that a model is called with, where it is asked for nothing but the loss and logits.

    Args:
        kwargs: The keyword arguments of its forward.

    Returns:
        `(batch, seq_len)`, int64, or `None`.
    """
    return None if any(kwargs.get(name) for name in OUTPUTS) else kwargs.get("labels")


def needs_text_alone(vlm: VisionLanguageModel, context: VisualContext, labels: torch.Tensor | None) -> bool:
    """Whether nothing reads what visual tokens and padding become in a training forward. Waits for the device.

    Args:
        vlm: The model's parts.
        context: Of the forward, with its `hidden_rows`.
        labels: As `labels_of` gives them.
    """
    if labels is None or context.visual_mask is None or labels.shape != context.visual_mask.shape:
        return False
    if any(getattr(config, name, False) for config in (vlm.model.config, vlm.text_config) for name in OUTPUTS):
        return False
    has_loss = F.pad(labels[:, 1:] != IGNORED, (0, 1)).to(context.device)  # a token's logits are for the next one
    text = context.real_text()
    return (
        context.hidden_rows is not None
        and bool(context.hidden_rows.all())
        and not bool((has_loss & ~text).any())
        and 0 < int(text.sum(1).max()) < context.seq_len
        and all(_reads_embeddings(layer) for layer in vlm.model.modules() if is_active(layer))
    )


def _reads_embeddings(layer: nn.Module) -> bool:
    """Whether a layer's adapters act on text, and on what the vision tower made of the images."""
    if not isinstance(layer, PVMLayer):
        return False
    branches = [branch for name in layer.acting() for branch in layer.pvm_branches[name]]
    return all(branch.config.memory_source == "embeddings" for branch in branches)


def layers_for_text(vlm: VisionLanguageModel) -> list[nn.Module]:
    """The decoder layers that can compute only the text.

    Attention with more inside than projections and norms may choose among the keys of all tokens, and a convolution
    looks at neighbours: both read visual tokens that are hidden, and then none can. Attention that does not rotate may
    count the tokens.

    Args:
        vlm: The model's parts.
    """
    attentions = vlm.self_attentions
    if any(_has_more_inside(attention) or _convolves(vlm.layers[idx]) for idx, attention in attentions.items()):
        return []
    return [vlm.layers[layer_idx] for layer_idx, attention in attentions.items() if vlm.rotates(attention)]


def _has_more_inside(attention: nn.Module) -> bool:
    parts = [part for part in attention.children() if not isinstance(part, BaseTunerLayer)]
    return any(any(part.children()) or any(p.dim() > 2 for p in part.parameters()) for part in parts)


def _convolves(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d) for module in layer.modules())


class TextAlone:
    """Has a decoder layer compute only the text if its context has a `text_alone`.

    It has a method `remove`, like the handle of a hook.

    Args:
        vlm: The model's parts.
        layer: The decoder layer.
    """

    def __init__(self, vlm: VisionLanguageModel, layer: nn.Module):
        self.config = vlm.text_config
        self._handles = [  # within these, other hooks see only the text
            layer.register_forward_pre_hook(self._take_out, with_kwargs=True, prepend=True),
            layer.register_forward_hook(self._put_back, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    # The garbage collector may remove these hooks while torch goes through a module's hooks. They then get no kwargs.

    def _take_out(self, module: nn.Module, args: tuple, kwargs: Any = None) -> tuple[tuple, dict[str, Any]] | None:
        context: VisualContext | None = None if kwargs is None else kwargs.get(CONTEXT)
        if context is None or context.text_alone is None:
            return None
        inputs, text = by_name(module, args, kwargs), context.text_alone
        if not self._are_known(inputs, context, text):
            return None
        hidden_states = _text_of(inputs[HIDDEN_STATES], text)
        taken = {**inputs, HIDDEN_STATES: hidden_states, CONTEXT: text}
        taken[MASK] = _once(text, MASK, inputs[MASK], functools.partial(self._mask_of, text))
        for name in BY_TOKEN.keys() & inputs.keys():
            rows_of = functools.partial(tree_map, functools.partial(_rows_of, text, BY_TOKEN[name]))
            taken[name] = _once(text, name, inputs[name], rows_of)
        names = inspect.signature(module.forward).parameters
        return tuple(taken[name] for name, _ in zip(names, args)), {name: taken[name] for name in kwargs}

    def _put_back(self, module: nn.Module, args: tuple, kwargs: Any, output: Any = None) -> Any:
        context: VisualContext | None = None if output is None else kwargs.get(CONTEXT)
        own = output[0] if isinstance(output, tuple) else output
        if context is None or context.slots is None or own.shape[1] != context.seq_len:
            return None  # of several blocks, one has done it
        whole = _whole(own, context)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    @property
    def _is_flash(self) -> bool:
        return "flash" in attn_implementation(self.config)

    def _are_known(self, inputs: dict[str, Any], context: VisualContext, text: VisualContext) -> bool:
        """Whether all arguments of a layer can be cut to the text."""
        if inputs.get("position_embeddings") is None or MASK not in inputs:
            return False
        rest = {name: value for name, value in inputs.items() if name not in (*BY_TOKEN, HIDDEN_STATES, MASK, CONTEXT)}
        return (
            inputs[HIDDEN_STATES].shape[:-1] == (context.batch_size, context.seq_len)
            and all(
                _is_by_token(leaf, context, behind)
                for name, behind in BY_TOKEN.items()
                for leaf in tree_leaves(inputs.get(name))
            )
            and self._knows_mask(inputs[MASK], context, text)
            and all(_is_of_no_token(leaf) for leaf in tree_leaves(rest))
        )

    def _knows_mask(self, mask: Any, context: VisualContext, text: VisualContext) -> bool:
        if self._is_flash:  # it counts the tokens of a window, and makes its own mask of padding
            return getattr(self.config, "sliding_window", None) is None
        if mask is None:  # so that there is no padding to hide
            return bool((text.own_slots() >= 0).all())
        return isinstance(mask, torch.Tensor) and mask.shape[2:] == (context.seq_len, context.seq_len)

    def _mask_of(self, text: VisualContext, mask: torch.Tensor | None) -> torch.Tensor | None:
        is_real = text.own_slots() >= 0
        if self._is_flash:
            return is_real
        if mask is None:
            return None
        index = _index(text).to(mask.device)
        pairs = mask.take_along_dim(index[:, None, :, None], 2).take_along_dim(index[:, None, None], 3)
        hidden = ~is_real[:, None, None].to(mask.device)
        return pairs.masked_fill(hidden, 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


class TextAloneAtHead:
    """Has the head compute the logits of only the text, and sets the others to 0.

    It has a method `remove`, like the handle of a hook.

    Args:
        vlm: The model's parts.
    """

    def __init__(self, vlm: VisionLanguageModel):
        self._awaited: dict[int, VisualContext] = {}  # the text of the forward that is running, by thread
        self._taken: dict[int, VisualContext] = {}
        self._handles: list[RemovableHandle] = []
        if vlm.head is not None:
            self._handles.append(vlm.head.register_forward_pre_hook(self._take_out, prepend=True))
            self._handles.append(vlm.head.register_forward_hook(self._put_back))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def expect(self, text: VisualContext | None) -> None:
        """Say which tokens the forward that is beginning in this thread computes. `None`: all."""
        self._awaited.pop(this_thread(), None)  # of a forward that did not come so far
        if text is not None:
            self._awaited[this_thread()] = text

    def _take_out(self, head: nn.Module, args: tuple) -> tuple | None:
        self._taken.pop(this_thread(), None)  # of a call that failed
        text = self._awaited.pop(this_thread(), None)
        if text is None or not args or args[0].shape[:-1] != (text.batch_size, text.whole_length):
            return None  # of several blocks, one has done it; or the caller wants the logits of some tokens
        self._taken[this_thread()] = text
        return (_text_of(args[0], text), *args[1:])

    def _put_back(self, head: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor | None:
        text = self._taken.pop(this_thread(), None)
        return None if text is None else _whole(logits, text)


def _is_by_token(leaf: Any, context: VisualContext, behind: int) -> bool:
    if leaf is None:
        return True
    is_long_enough = isinstance(leaf, torch.Tensor) and leaf.dim() >= behind + 2
    sizes = (1, context.batch_size)
    return is_long_enough and leaf.shape[-1 - behind] == context.seq_len and leaf.shape[-2 - behind] in sizes


def _is_of_no_token(leaf: Any) -> bool:
    """A number, a setting or nothing: no KV cache, and no tensor but for a scalar."""
    return leaf.dim() == 0 if isinstance(leaf, torch.Tensor) else isinstance(leaf, (bool, int, float, str, type(None)))


def _text_of(hidden_states: torch.Tensor, text: VisualContext) -> torch.Tensor:
    return select_rows(hidden_states, _index(text).to(hidden_states.device))


def _rows_of(text: VisualContext, behind: int, tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    index = _index(text).to(tensor.device)
    index = index.reshape(*[1] * (tensor.dim() - 2 - behind), *index.shape, *[1] * behind)
    return tensor.take_along_dim(index, -1 - behind)


def _once(text: VisualContext, name: str, value: Any, make: Callable[[Any], Any]) -> Any:
    """What is made of an argument of a layer: once for layers in a row that are given the same tensors."""
    made: dict[str, tuple[list[Any], Any]] = text.derived("made of arguments", dict)
    leaves = tree_leaves(value)
    known = made.get(name)
    if known is None or len(known[0]) != len(leaves) or any(a is not b for a, b in zip(known[0], leaves)):
        made[name] = leaves, make(value)
    return made[name][1]


def _whole(rows: torch.Tensor, text: VisualContext) -> torch.Tensor:
    """What was computed of the text, among zeros: `(batch, seq_len, ...)` to `(batch, whole_length, ...)`."""
    return scatter_rows(rows, text.own_slots().to(rows.device), text.whole_length)


def _index(text: VisualContext) -> torch.Tensor:
    """Where the text is, `(batch, seq_len)`. After the end of a shorter row, its first token is repeated."""
    slots = text.own_slots()
    return text.derived("index", lambda: torch.where(slots >= 0, slots, slots[:, :1]).clamp(min=0))

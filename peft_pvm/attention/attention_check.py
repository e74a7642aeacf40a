"""A check, made once, that an attention module computes as adapters assume.

Adapters assume that the module computes the same with and without them as long as none acts, and that its output
depends only on queries, keys, values, the mask and what else `AttentionCall` knows. Adapters that rotate queries and
keys also assume that the rotation is the last change to them, and that it comes from the rotary embedding that they
use. All of this is tested on a few tokens of the first forward, the rotation also at other positions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache

from ..tokens.context import CONTEXT, VisualContext
from ..tokens.tap import by_name
from ..utils.packages import attn_implementation
from .call import AttentionCall, Output, base_kernel
from .reference import ReferenceStages
from .rotation import Tables, inverse, rotate, rotation_tables, unit


FEW = 4  # tokens
FURTHER = 128  # positions, so that most channels turn
TABLES = "position_embeddings"  # the keyword by which a module is given the rotations of its tokens
NAMED = ("hidden_states", TABLES)  # cut separately


class AttentionCheck:
    """Checks an attention module when an adapter first acts on it, and then removes itself.

    It has a method `remove`, like the handle of a hook.

    Args:
        attention: The module.
        rotary: What rotates its queries and keys. `None`: nothing, so that they must not depend on positions.
        layer_type: The type of its layer, for a rotary embedding that tells types apart.
        rotates: Whether the adapters rotate them too.
        acts: Whether an adapter acts now.
        passed: Called when the module has passed the check.
    """

    def __init__(
        self,
        attention: Any,
        rotary: nn.Module | None,
        layer_type: str | None,
        rotates: bool,
        acts: Callable[[], Any],
        passed: Callable[[], None],
    ):
        self.rotary = rotary
        self.layer_type = layer_type
        self.rotates = rotates
        self.acts = acts
        self.passed = passed
        self._handle = attention.register_forward_pre_hook(self._check_once, with_kwargs=True)

    def remove(self) -> None:
        """Stop checking."""
        self._handle.remove()

    def _check_once(self, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        context: VisualContext | None = kwargs.get(CONTEXT)
        if torch.compiler.is_compiling() or context is None or not self.acts() or _is_told_of_rows(attention):
            return
        context.check()
        named = by_name(attention, args, kwargs)
        if not _is_as_without_adapters(attention, named):
            fault = "computes something else than without an adapter while none acts"
            raise _refusal(attention, fault, "would change the model even when it is off", "beside the FFN may work")
        if self.rotates and (fault := self._fault_of_rotation(attention, named)):
            raise _refusal(
                attention, fault, "would rotate them wrongly", "that do not rotate queries and keys may work"
            )
        context.observers.append(functools.partial(self._check_output, attention))

    def _check_output(self, attention: Any, call: AttentionCall) -> None:
        if call.module is not attention:
            return
        if not _makes_its_output(call):
            fault = "computes attention from more than queries, keys, values and a mask (from attention sinks perhaps)"
            raise _refusal(attention, fault, "would leave that out", "beside the FFN may work")
        self.passed()
        self.remove()

    @torch.no_grad()
    def _fault_of_rotation(self, attention: Any, kwargs: dict[str, Any]) -> str:
        """What differs from what adapters assume of queries and keys; "" if nothing does."""
        given = kwargs.get(TABLES)
        if given is None:
            return "" if self.rotary is None else f"is given no {TABLES} for its queries and keys"
        states = kwargs["hidden_states"][:1, -FEW:]
        given = _of_last_tables(given, states.shape[1])
        if self.rotary is None:
            here, there = (_caught(attention, states, tables, kwargs) for tables in (given, inverse(given)))
            agrees = _agree
        else:
            positions = kwargs[CONTEXT].noted()[0][:1, -states.shape[1] :].to(states.device)
            by_positions = [
                rotation_tables(self.rotary, moved, self.layer_type)
                for moved in (positions, positions + FURTHER, torch.full_like(positions, FURTHER))
            ]
            if not _agree(given, by_positions[0]):
                return "is given other rotations of queries and keys than the text model's rotary embedding makes"
            further = _like(by_positions[1], given)
            here, there = (_caught(attention, states, tables, kwargs) for tables in (given, further))

            def agrees(one: torch.Tensor, other: torch.Tensor) -> bool:
                return _agree(rotate(attention, one, unit(by_positions[2])), other)

        queries, keys = zip(here, there)
        if agrees(*queries) and (torch.equal(*keys) or agrees(*keys)):  # another layer's keys are checked there
            return ""
        return "changes queries or keys after their rotation, or does not rotate them by its rotary embedding"


def _is_told_of_rows(attention: nn.Module) -> bool:
    """Whether PEFT's layers in a module have hooks that give them something of every row, or token, of this batch.

    PEFT puts these on for the length of a forward with `adapter_names`, or with an aLoRA.
    """
    layers = (module for module in attention.modules() if isinstance(module, BaseTunerLayer))
    return any(layer._forward_pre_hooks_with_kwargs for layer in layers)


def _refusal(attention: Any, fault: str, consequence: str, others: str) -> NotImplementedError:
    where = f"{type(attention).__name__} (decoder layer {attention.layer_idx})"
    return NotImplementedError(
        f"{where} {fault}, so that the adapter {consequence}. Take it off with unload(); adapters {others}."
    )


@torch.no_grad()
def _is_as_without_adapters(attention: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a module that looks up a steered kernel computes the same as with its own config, if no adapter acts."""
    known = all(name in (*CUT, *NAMED) for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    is_wrapped = "forward" in vars(attention)  # by accelerate, which may have its weights on the disk
    if not known or is_wrapped or attn_implementation(attention.config) == "flex_attention":  # it would compile anew
        return True
    states = kwargs["hidden_states"][:1, -FEW:]
    arguments = _for_last(kwargs, states.shape[1])
    arguments.pop(CONTEXT)
    if TABLES in kwargs:
        tables = kwargs[TABLES]
        arguments[TABLES] = None if tables is None else _of_last_tables(tables, states.shape[1])
    plain = copy.copy(attention)
    plain.config = attention.config.config
    outputs = []
    for module in (attention, plain):
        with _same_dropout():
            outputs.append(module.forward(states, **arguments)[0].nan_to_num())  # rows of padding may see no key
    return torch.equal(*outputs)


def _same_dropout() -> AbstractContextManager[None]:
    """Restore the random number generators of all devices at the end of a block."""
    return torch.random.fork_rng(range(torch.cuda.device_count()))


class _Caught:
    """Takes the place of a layer's stages, and keeps the queries and keys that it is given."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def attend(self, call: AttentionCall) -> Output:
        self.states.extend((call.query, call.key))
        batch, heads, num_queries, _ = call.query.shape
        return call.value.new_zeros(batch, num_queries, heads, call.value.shape[-1]), None


def _caught(attention: Any, states: torch.Tensor, tables: Tables, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The queries and keys that a module makes of some states, without a cache and without any other effect."""
    caught = _Caught()
    context = VisualContext(None)
    context.stages[attention.layer_idx] = caught
    others = _for_last(kwargs, states.shape[1])
    with _same_dropout():
        attention.forward(states, **{**others, TABLES: tables, CONTEXT: context})
    if not caught.states:
        raise _refusal(
            attention,
            "does not look up its kernel in transformers' AttentionInterface: it, or a part of it, was replaced after "
            "the adapter was attached",
            "does not act on it",
            "that are attached afterwards are told at once whether they can act",
        )
    return caught.states


@torch.no_grad()
def _makes_its_output(call: AttentionCall) -> bool:
    """Whether the kernel computes, for the last queries, what `AttentionCall` knows of: plain attention.

    In fp32 at least: in half precision, the rounding of large scores would be more than what is looked for.
    """
    if call.kernel not in ("eager", "sdpa"):  # others cannot be given a part of the mask, and have no more to compute
        return True
    num_queries = call.query.shape[2]
    last = slice(max(num_queries - FEW, 0), num_queries)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (states.to(dtype) for states in (call.query[:, :, last], call.key, call.value))
    visible, mask = call.visibility.mask(last), call.visibility.bias(last)
    if visible is not None:
        mask = torch.zeros_like(visible, dtype=dtype) if mask is None else mask.to(dtype)
        mask = mask.masked_fill(~visible, torch.finfo(dtype).min)
    kwargs = {name: _of_queries(value, num_queries, last) for name, value in call.kwargs.items()}
    kwargs["dropout"] = 0.0
    few = replace(call, query=query, key=key, value=value, attention_mask=mask, kwargs=kwargs)
    output = base_kernel(call.kernel, call.module)(query, key, value, mask, **kwargs)[0]
    return _agree(output, ReferenceStages().attend(few)[0])


def _of_queries(value: Any, num_queries: int, part: slice) -> Any:
    """An argument of a kernel. If it has an entry for each query, as a bias does, only those of some queries."""
    is_by_query = isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[-2] == num_queries
    return value[..., part, :] if is_by_query else value


def _for_last(kwargs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The other arguments of a module, cut to the last tokens of the first row of the batch, without a cache."""
    arguments: dict[str, Any] = {"attention_mask": None}
    for name, value in kwargs.items():
        if name in CUT and value is not None:
            arguments[name] = CUT[name](value, num_tokens)
        elif name not in NAMED and not isinstance(value, torch.Tensor | Cache):
            arguments[name] = value
    return arguments


def _of_few(mask: Any, num_tokens: int) -> torch.Tensor | None:
    """The mask for a few tokens, if the module itself may read it. Other masks are read only by the kernel."""
    if not isinstance(mask, torch.Tensor):
        return None
    return mask[:1, :, -num_tokens:, -num_tokens:] if mask.dim() == 4 else mask.new_ones(1, num_tokens)


# By keyword: how an argument is cut to a few tokens.
CUT: dict[str, Callable[[Any, int], Any]] = {
    "attention_mask": _of_few,
    "conv_mask": _of_few,
    # No keys come before these tokens. The tables rotate them, not these positions.
    "position_ids": lambda ids, num_tokens: torch.arange(num_tokens, device=ids.device).expand(*ids.shape[:-2], 1, -1),
    # Of all queries and keys, for a bias.
    "relative_distance": lambda distances, num_tokens: distances[-num_tokens:, -num_tokens:],
    # Keys and values of other layers, in a copy: the module may write into it.
    "shared_kv_states": lambda states, num_tokens: {
        key: tuple(tensor[:1, :, -num_tokens:] for tensor in states[key]) for key in states
    },
    # The keys that an earlier layer has chosen.
    "prev_topk_indices": lambda indices, num_tokens: indices[:1, -num_tokens:].clamp(max=num_tokens - 1),
}


def _of_last_tables(tables: Tables, num_tokens: int) -> Tables:
    """The rotations of the last tokens of the first row of the batch."""
    return _mapped(tables, lambda table: table[..., :1, -num_tokens:, :])


def _mapped(tables: Tables, function: Callable[[torch.Tensor], torch.Tensor]) -> Tables:
    return function(tables) if isinstance(tables, torch.Tensor) else (function(tables[0]), function(tables[1]))


def _like(tables: Tables, others: Tables) -> Tables:
    """Tables in the dtype of others."""
    first = others if isinstance(others, torch.Tensor) else others[0]
    return _mapped(tables, lambda table: table.to(first.dtype))


def _agree(one: Any, other: Any) -> bool:
    """Whether tensors, or pairs of them, are equal but for rounding. Waits for the device."""
    if not isinstance(one, torch.Tensor):
        return all(map(_agree, one, other))
    if one.shape != other.shape:
        return False
    dtype = min(one.dtype, other.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    wide = torch.complex64 if one.is_complex() else torch.float32
    one, other = one.to(wide), other.to(wide)
    return bool((one - other).norm() <= max(1e-3, 2 * torch.finfo(dtype).eps) * one.norm())

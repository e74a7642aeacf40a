"""Rotating queries and keys by other positions than their own, with the model's own rotary embedding."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from .call import AttentionCall


FROM_NEIGHBOURS = "apply_rotary_pos_emb_interleave"  # takes neighbouring channels, and leaves them in halves
ROTARY_FUNCTIONS = ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb", "apply_rotary_emb", FROM_NEIGHBOURS)
Tables = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # complex numbers, or cosines and sines


def rotation_tables(rotary: nn.Module, position_ids: torch.Tensor, layer_type: str | None) -> Tables:
    """What `rotary` makes of some positions, in fp32.

    Its undecorated forward is called: scalings that follow the length of the sequence stay as the model's own call
    left them.

    Args:
        rotary: The text model's rotary embedding.
        position_ids: `(batch, seq_len, axes)`, integer; may be negative.
        layer_type: The type of layer to make them for, where `rotary` tells types apart.
    """
    by_axis = position_ids.movedim(-1, 0)
    arguments: dict[str, Any] = {"position_ids": by_axis if by_axis.shape[0] > 1 else by_axis[0]}
    rotary_cls: Any = type(rotary)
    forward, parameters = _undecorated(rotary_cls)
    if "layer_type" in parameters:
        arguments["layer_type"] = layer_type
    like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
    with torch.no_grad():
        return forward(rotary, like, **arguments)


def between(tables: Tables, start: int, stop: int | None) -> Tables:
    """The tables of the tokens from `start` to `stop`."""
    if isinstance(tables, torch.Tensor):
        return tables[..., start:stop, :]
    return tables[0][..., start:stop, :], tables[1][..., start:stop, :]


def may_scale(rotary: nn.Module, layer_type: str | None) -> bool:
    """Whether `rotary` may scale what it rotates, as YaRN and similar methods do."""
    if hasattr(rotary, "long_mscale"):  # PhiMoE has factors of its own
        return True
    name = "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"
    factor = getattr(rotary, name, getattr(rotary, "attention_scaling", None))
    return factor is None or factor != 1


def unit(tables: Tables, is_scaled: bool = True) -> Tables:
    """The tables without the factor by which they scale, if they do, so that they keep lengths."""
    if not is_scaled:
        return tables
    if isinstance(tables, torch.Tensor):
        return tables / tables.abs()
    length = (tables[0].square() + tables[1].square()).sqrt()
    return tables[0] / length, tables[1] / length


def inverse(tables: Tables, is_scaled: bool = True) -> Tables:
    """The tables that undo these, the factor by which they scale included, if they do."""
    if isinstance(tables, torch.Tensor):
        return tables.reciprocal() if is_scaled else tables.conj()
    if not is_scaled:
        return tables[0], -tables[1]
    length = tables[0].square() + tables[1].square()
    return tables[0] / length, -tables[1] / length


def rotate(attention: nn.Module, states: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate as the attention module does itself: by its own function, on halves, pairs or a part of the head.

    Args:
        attention: The attention module.
        states: Queries or keys, `(batch, heads, seq_len, head_dim)`.
        tables: Of `(..., batch, seq_len, channels)`.

    Returns:
        As `states`, in its dtype; computed in fp32 at least.
    """
    rotary_dim = getattr(attention, "qk_rope_head_dim", None)
    if rotary_dim is None:
        return _rotate(attention, states, tables)
    # Multi-head latent attention: only the last channels depend on positions.
    content, rotary = states.split([states.shape[-1] - rotary_dim, rotary_dim], -1)
    return torch.cat([content, _rotate(attention, rotary, tables)], -1)


def _rotate(attention: nn.Module, states: torch.Tensor, tables: Tables) -> torch.Tensor:
    """`rotate` for states whose channels are all given to the module's function."""
    wide = states if states.dtype == torch.float64 else states.float()
    if isinstance(tables, torch.Tensor):
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * tables.unsqueeze(1)).flatten(-2).to(states.dtype)
    # Persimmon hands its function the channels that it rotates, and no others.
    channels = getattr(attention, "rotary_ndims", wide.shape[-1])
    wide, rest = wide[..., :channels], wide[..., channels:]
    attention_cls: Any = type(attention)
    function, parameters = _rotary_function(attention_cls)
    if "x" in parameters:
        rotated = function(wide, *tables, unsqueeze_dim=1)
    elif "mrope_section" in parameters:  # Qwen2-VL before transformers 5.17 puts the axes together here
        sections = attention.config.rope_parameters["mrope_section"]  # type: ignore[union-attr, index]
        rotated, _ = function(wide, wide[:, :0], *tables, sections)
    else:
        rotated, _ = function(wide, wide[:, :0], *tables)  # it wants keys as well: none
    rotated = torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated
    return rotated.to(states.dtype)


def turned_by_matrix(call: AttentionCall, tables: Tables, key: tuple[Hashable, ...]) -> torch.Tensor:
    """Rotate the query of a step of decoding by one product with a matrix, which layers share.

    Args:
        call: A call with a single query.
        tables: The rotations, `(..., batch, positions, channels)`.
        key: Names these tables within this forward.

    Returns:
        Rotated by each of the positions, `(batch, heads, 1, positions * head_dim)`, in fp32 at least.
    """
    query, positions = call.query, (tables if isinstance(tables, torch.Tensor) else tables[0]).shape[-2]
    width, dtype = query.shape[-1], torch.promote_types(query.dtype, torch.float32)

    def make() -> torch.Tensor:
        basis = torch.eye(width, dtype=dtype, device=query.device).unsqueeze(1)
        return rotate(call.module, basis.expand(len(query), -1, positions, -1), tables).flatten(2)

    matrix = call.context.derived(("matrix", *key, type(call.module), width, dtype), make)
    with torch.autocast(query.device.type, enabled=False):  # autocast does not touch the rotation of a prompt
        return torch.bmm(query.squeeze(2).to(dtype), matrix).unsqueeze(2)


def has_rotary_function(attention: nn.Module) -> bool:
    """Whether the function by which an attention module rotates has a known name."""
    attention_cls: Any = type(attention)
    return _rotary_function(attention_cls)[0] is not None


# Both are asked for every layer of every forward.


@functools.cache
def _rotary_function(attention_cls: type) -> tuple[Any, tuple[str, ...]]:
    """The function, `None` if there is none, and the names of its parameters."""
    for cls in attention_cls.__mro__:
        namespace = vars(sys.modules[cls.__module__])
        for name in ROTARY_FUNCTIONS:
            if name in namespace:
                function = _of_halves(namespace[name]) if name == FROM_NEIGHBOURS else namespace[name]
                return function, tuple(inspect.signature(namespace[name]).parameters)
    return None, ()


def _of_halves(function: Any) -> Any:
    """A rotary function of neighbouring channels, for channels that an earlier rotation has left in halves."""

    def rotated(query: torch.Tensor, key: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        neighbours = (states.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2) for states in (query, key))
        return function(*neighbours, *tables)

    return rotated


@functools.cache
def _undecorated(rotary_cls: type) -> tuple[Any, tuple[str, ...]]:
    """The forward of a rotary embedding without its decorators, and the names of its parameters."""
    forward = inspect.unwrap(rotary_cls.forward)  # type: ignore[attr-defined]
    return forward, tuple(inspect.signature(forward).parameters)

"""A folder that vLLM serves, made of a base model and adapters, and what its config says of the adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from transformers import AutoConfig

from ...folders.adapter_file import PEFT_PREFIX, read_config
from ...folders.base_checkpoint import BaseCheckpoint
from ...methods.dipe import DIPEConfig
from ...methods.pvm import PVMConfig
from ...methods.pvm.checkpoints import check_shapes, read_adapter
from ...methods.pvm.merging import Tensors
from ...tokens.positions import PADDING, modalities, run_anchors, run_starts
from ...tuners.base import with_absent_fields
from ...utils.checks import layer_list
from ...utils.text import quoted
from .families import FAMILIES, TEXT_MODELS


FIELD = "peft_pvm"  # of the text config, where the adapters stand by method
# A model whose config has this field makes the positions of a prompt itself, which is where labels are attached. The
# field belongs to mRoPE; vLLM takes it for that beside a text model without mRoPE as well, which ignores it.
MAKES_POSITIONS = "mrope_section"
LEFT_OUT = ("base_model_name_or_path", "revision")  # where an adapter was trained may be a private path
WIDEST = 1024
# A query and a key of this size give a hidden token a score of -16384 * scaling, so a weight of exactly 0 beside any
# that is not hidden. It is small enough for every dtype that a cache may have, down to 8 bits.
HIDING = 128.0


def export_vllm(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    accept_causal: bool = False,
) -> Path:
    """Make a folder that `vllm serve` takes, where this package is installed beside vLLM.

    It holds a copy of the base's weights as they are, one more file with PVM's, and a config that names our class.

    Args:
        base: Folder or Hub id of a model of one of the `FAMILIES`.
        adapters: Folders or Hub ids, at most one of PVM and one of DIPE.
        output_dir: The folder.
        accept_causal: Take an adapter with `memory_visibility="sample"` as well. In vLLM a token sees the images
            before it, which is the same for images in front of the text.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The base has no safetensors checkpoint.
        NotImplementedError: Another base or method, DIPE by image, or an adapter that brings modules of the base.
        ValueError: Not our adapters, two of one method, or one that does not fit the base.
    """
    checkpoint = BaseCheckpoint(base)
    content = checkpoint.config
    base_config = _base_config(base, content)
    family = FAMILIES[base_config.model_type]
    by_method: dict[str, dict[str, Any]] = {}
    branch: Tensors = {}
    for adapter in adapters:
        config = read_config(adapter)
        if config.method in by_method:
            raise ValueError(f"{adapter} is a second adapter of {config.method}, but one model is served with one.")
        if isinstance(config, PVMConfig):
            branch = _pvm_weights(adapter, checkpoint, accept_causal)
        elif isinstance(config, DIPEConfig):
            for name, known in (("anchor", "run"), ("axes", "all")):
                if (value := getattr(config, name)) != known:
                    raise NotImplementedError(
                        f"{adapter} has {name}={quoted(value)}. In vLLM, DIPE knows {name}={known!r} only."
                    )
            num_layers = base_config.get_text_config().num_hidden_layers
            chosen = [] if config.layers_to_transform is None else layer_list(config, "None")
            if beyond := [index for index in chosen if index >= num_layers]:
                raise ValueError(f"{adapter} acts on layers {quoted(beyond)}, but {base} has {num_layers} layers.")
        else:
            raise NotImplementedError(f"{adapter} is an adapter of {config.method}. For vLLM there are PVM and DIPE.")
        by_method[config.method] = {
            name: value for name, value in config.to_dict().items() if value is not None and name not in LEFT_OUT
        }
    if not by_method:
        raise ValueError("No adapter is given. To serve the base alone, vLLM takes it as it is.")
    content["architectures"] = [family.architecture]
    if not family.makes_positions:
        content[MAKES_POSITIONS] = []
    content["text_config"][FIELD] = by_method
    return checkpoint.copy(output_dir, content, branch)


def _base_config(base: str | os.PathLike, content: dict[str, Any]) -> Any:
    """The base's, as transformers reads it, if vLLM serves such a model with our adapters."""
    found = content.get("model_type")
    if found not in FAMILIES:
        raise NotImplementedError(f"{base} is of type {quoted(found)}. For vLLM there are {', '.join(FAMILIES)}.")
    config = AutoConfig.for_model(**content)
    if (text_type := config.get_text_config().model_type) not in TEXT_MODELS:
        raise NotImplementedError(
            f"The text model of {base} is of type {quoted(text_type)}. For vLLM there are {', '.join(TEXT_MODELS)}."
        )
    return config


def _pvm_weights(adapter: str | os.PathLike, base: BaseCheckpoint, accept_causal: bool) -> Tensors:
    """By their names in the model."""
    config, tensors = read_adapter(adapter)
    if config.modules_to_save:
        raise NotImplementedError(
            f"{adapter} brings modules of the base, {quoted(config.modules_to_save)}. First save the base with them, "
            "and the adapter without."
        )
    if not accept_causal and any(part.memory_visibility == "sample" for part in config.parts()):
        raise ValueError(
            f"{adapter} lets a token see all images of its sample, also later ones. In vLLM it sees those before it, "
            "which is the same where images stand in front of the text. If yours do: --accept-causal."
        )
    check_shapes(adapter, tensors, [], config, base.config)
    return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}


def configs_of(text_config: Any) -> tuple[PVMConfig | None, DIPEConfig | None]:
    """The adapters' configurations, as `export_vllm` wrote them into a text config."""
    by_method = {name: with_absent_fields(fields) for name, fields in getattr(text_config, FIELD).items()}
    found = [PeftConfig.from_peft_type(**by_method[name]) if name in by_method else None for name in ("pvm", "dipe")]
    return found[0], found[1]


def acts_on(dipe: DIPEConfig, layer_idx: int) -> bool:
    """Whether DIPE acts on a decoder layer, which all rotate queries and keys in the families served."""
    return dipe.layers_to_transform is None or layer_idx in layer_list(dipe, "None")


POSITION_BITS, ANCHOR_SHIFT = 30, 32


def attach_labels(
    positions: torch.Tensor, delta: int, visual_mask: torch.Tensor, with_anchors: bool
) -> tuple[torch.Tensor, int]:
    """Label the positions of a prompt, and the constant that generated tokens get theirs by.

    Args:
        positions: The positions of the prompt, `(axes, seq_len)`, int64, each below 2^30.
        delta: What is added to the number of tokens before a generated token, to make its position.
        visual_mask: Which tokens of the prompt are visual, `(seq_len,)`, bool.
        with_anchors: Whether anchors are wanted. They take 64 bits.

    Returns:
        The same, labelled. Generated tokens are text and continue the last run, if that is text.
    """
    labelled = positions + (visual_mask.long() << POSITION_BITS)
    if not with_anchors:
        return labelled, delta
    seq_len = positions.shape[1]
    # One more token, the first that is generated, tells the anchor of them all.
    first = torch.cat([positions[0], positions.new_tensor([seq_len + delta])])[None]
    modality = modalities(torch.cat([visual_mask, visual_mask.new_zeros(1)])[None], None)
    starts = run_starts(modality, modality.new_tensor([PADDING]))
    anchors = run_anchors(starts, first, first.new_zeros(1))[0]
    return labelled + (anchors[:-1] << ANCHOR_SHIFT), delta + (int(anchors[-1]) << ANCHOR_SHIFT)


def detach_labels(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `attach_labels` put together, token by token.

    Args:
        positions: Labelled, `(axes, num_tokens)`, or of one axis `(num_tokens,)`, int64.

    Returns:
        Positions of the same shape, which tokens are visual `(num_tokens,)`, bool, and anchors `(num_tokens,)`, which
        are 0 where there are none.
    """
    first = positions if positions.dim() == 1 else positions[0]
    visual_mask = (first >> POSITION_BITS) & 1 == 1
    return positions & ((1 << POSITION_BITS) - 1), visual_mask, first >> ANCHOR_SHIFT


def supported_width(least: int, supports: Callable[[int], bool]) -> int:
    """The smallest head size that is wide enough and has a kernel.

    Args:
        least: What is needed.
        supports: Says whether there is a kernel for a head size.

    Raises:
        NotImplementedError: There is none.
    """
    for width in range(least, WIDEST + 1):
        if supports(width):
            return width
    raise NotImplementedError(f"This attention backend of vLLM has no kernel for heads of {least} channels or more.")


def visual_keys_only(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visual_mask: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to visual tokens alone, with keys and values for all: one more channel hides the others.

    A query with no visual token in sight reads the values of the hidden ones, which are 0.

    Args:
        query: `(num_tokens, heads, head_dim)`.
        key: `(num_tokens, kv_heads, head_dim)`.
        value: The same shape as `key`.
        visual_mask: `(num_tokens,)`, bool.
        width: The width of the returned heads, more than `head_dim`.

    Returns:
        Queries and keys of this width, and values, which keep theirs.
    """
    visual = visual_mask[:, None, None]
    head_dim = query.shape[-1]
    ask = F.pad(query.new_full((), HIDING).expand(*query.shape[:-1], 1), (0, width - head_dim - 1))
    hide = F.pad(key.new_full((), -HIDING).expand(*key.shape[:-1], 1), (head_dim, width - head_dim - 1))
    return (
        torch.cat([query, ask], -1),
        torch.where(visual, F.pad(key, (0, width - head_dim)), hide),
        value.masked_fill(~visual, 0),
    )


def anchored_across_modalities(
    query: torch.Tensor, anchored: torch.Tensor, key: torch.Tensor, visual_mask: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """DIPE's scores (arXiv 2603.10863): `anchored` meets the keys of the other modality, `query` those of its own.

    Keys are split by modality, `[text or 0, visual or 0]`; queries hold in each half what it is to be met with.

    Args:
        query: Rotated by their positions, `(num_tokens, heads, head_dim)`.
        anchored: Rotated by their anchors, as `query`.
        key: `(num_tokens, kv_heads, head_dim)`.
        visual_mask: `(num_tokens,)`, bool.
        width: The width of the returned heads, at least twice `head_dim`.

    Returns:
        Queries and keys of this width.
    """
    visual = visual_mask[:, None, None]
    head_dim = query.shape[-1]
    queries = torch.cat([torch.where(visual, anchored, query), torch.where(visual, query, anchored)], -1)
    keys = torch.cat([key.masked_fill(visual, 0), key.masked_fill(~visual, 0)], -1)
    spare = (0, width - 2 * head_dim)
    return F.pad(queries, spare), F.pad(keys, spare)

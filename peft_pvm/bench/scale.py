"""On paper: the bytes that a conversation keeps and a step of decoding reads, from the shapes alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from peft import PeftModel
from rich.table import Table
from transformers import Qwen3VLForConditionalGeneration

from ..families import find_vlm
from ..pvm.config import BranchShape
from ..terminal import Terminal
from .methods import pvm_config
from .models import PRESETS


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and of PVM at the paper's proportions.

    Attributes:
        weights: What a step of decoding reads of the base: all but the vision tower and the input embeddings.
        cache: Of the KV cache, for a token.
        pvm_weights: What it reads of PVM: all but the projections of the memory.
        projections: PVM's keys and values, for a visual token.
        embeddings: What is kept of a visual token to project it with another adapter.
    """

    weights: int
    cache: int
    pvm_weights: int
    projections: int
    embeddings: int

    def kept(self, context: int, visual_tokens: int) -> tuple[int, int, int]:
        """What a conversation keeps: KV cache, PVM's keys and values, embeddings."""
        return self.cache * context, self.projections * visual_tokens, self.embeddings * visual_tokens

    def read(self, context: int, visual_tokens: int, batch: int) -> tuple[int, int]:
        """What a step of decoding a batch reads: of the base, and of PVM beyond that."""
        base = self.weights + batch * self.cache * context
        return base, self.pvm_weights + batch * self.projections * visual_tokens


def footprint(preset: str, branches: int | None = None, bytes_of_a_number: int = 2) -> Footprint:
    """The footprint of one of `PRESETS`.

    Args:
        preset: Its name.
        branches: How many decoder layers have one, the first ones; by default as many as in the paper.
        bytes_of_a_number: 2 for bf16.

    Raises:
        ValueError: There is no such preset, or it has not so many layers.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    if branches is not None and not 1 <= branches <= PRESETS[preset].layers:
        raise ValueError(f"branches is {branches}, but {preset} has 1 to {PRESETS[preset].layers} decoder layers.")
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(PRESETS[preset].config())
        vlm, config = find_vlm(model), pvm_config(model)
        if branches is not None:
            config = dataclasses.replace(config, layers_to_transform=list(range(branches)))
        text, tied = vlm.text_config, PRESETS[preset].ties_embeddings
        read = sum(parameter.numel() for parameter in vlm.text_model.parameters())
        if not tied:  # a step reads the output layer, and of the input embeddings a row
            read += model.lm_head.weight.numel() - model.get_input_embeddings().weight.numel()
        wrapped = PeftModel(model, config)
    shape = BranchShape.of(config, text)
    own = [
        parameter.numel()
        for name, parameter in wrapped.named_parameters()
        if ".pvm_" in name and not any(f".pvm_{part}." in name for part in ("vision_reducer", "k_proj", "v_proj"))
    ]
    number = len(config.layer_indices)
    return Footprint(
        weights=bytes_of_a_number * read,
        cache=bytes_of_a_number * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim,
        pvm_weights=bytes_of_a_number * sum(own),
        projections=bytes_of_a_number * 2 * number * shape.num_key_value_heads * shape.head_dim,
        embeddings=bytes_of_a_number * text.hidden_size,
    )


def show_scale(
    preset: str,
    contexts: list[int],
    visual_tokens: list[int],
    batches: list[int],
    sequences: list[int],
    branches: int | None = None,
    bandwidth: float | None = None,
) -> None:
    """Print what conversations keep, and what steps read.

    Args:
        preset: One of `PRESETS`.
        contexts: Lengths of a conversation, visual tokens included.
        visual_tokens: How many of them are visual.
        batches: Conversations decoded in one step.
        sequences: Conversations kept at once.
        branches: As `footprint` takes them.
        bandwidth: What memory delivers, in GB a second, to tell times as well.

    Raises:
        ValueError: As `footprint`, or a number out of its range.
    """
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth is {bandwidth}, but must be a finite number above 0.")
    for name, numbers in {
        "contexts": contexts, "visual_tokens": visual_tokens, "batches": batches, "sequences": sequences
    }.items():  # fmt: skip
        if min(numbers) < 1:
            raise ValueError(f"{name} is {numbers}, but must be numbers of 1 or more.")
    if min(visual_tokens) >= max(contexts):
        raise ValueError(f"visual_tokens is {visual_tokens}, but must be below a context: those are {contexts}.")
    console, foot = Terminal(), footprint(preset, branches)
    console.print(
        f"{preset} in bf16. Of the base a step reads {foot.weights / 1e9:.2f} GB of weights, of PVM "
        f"{foot.pvm_weights / 1e6:.1f} MB. A token of the KV cache takes {foot.cache:,} bytes; of PVM a visual token "
        f"takes {foot.projections:,} bytes of keys and values and {foot.embeddings:,} of its embedding."
    )
    table = Table("Conversations", "tokens", "visual", "KV cache", "PVM's keys, values", "embeddings", "of the cache")
    for number in sequences:
        for context in contexts:
            for visual in visual_tokens:
                if visual < context:
                    kept = [number * part for part in foot.kept(context, visual)]
                    share = sum(kept[1:]) / kept[0]
                    sizes = map(_readable, kept)
                    table.add_row(f"{number:,}", f"{context:,}", f"{visual:,}", *sizes, f"{share:.2%}")
    console.print(table)
    times = () if bandwidth is None else ("base, ms", "PVM, ms")
    table = Table("Batch", "tokens", "visual", "the base reads", "PVM beyond that", "ratio", *times)
    for batch in batches:
        for context in contexts:
            for visual in visual_tokens:
                if visual < context:
                    base, pvm = foot.read(context, visual, batch)
                    row = [_readable(base), _readable(pvm), f"{1 + pvm / base:.4f}"]
                    if bandwidth is not None:
                        row += [f"{part / bandwidth / 1e6:,.1f}" for part in (base, pvm)]
                    table.add_row(f"{batch:,}", f"{context:,}", f"{visual:,}", *row)
    console.print(table)


def _readable(number: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(number, 1000)), len(units) - 1)
    return f"{number / 1000**power:.3g} {units[power]}"

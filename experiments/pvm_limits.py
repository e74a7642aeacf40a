"""What limits PVM: what its query knows, what its memory holds, and where its wrong answers come from."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from rich.table import Table

from peft_pvm.demo.mosaic import FIRST_QUERY, IMAGE_LENGTH, NUM_CELLS, Split, make_questions
from peft_pvm.demo.recall import TOKENS_PER_FORWARD
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.methods.pvm import PVMConfig
from peft_pvm.methods.pvm.layer import PVMLayer
from peft_pvm.tokens.context import VisualContext
from peft_pvm.utils.terminal import Bars, Terminal

from .fading import NUM_DIALOGUE


LENGTHS = (64, 256, 1024, 2048, 4096)


class Asked(NamedTuple):
    """What was seen of questions, one after the other.

    Attributes:
        cells: Which cell each asks for, `(questions,)`, int64.
        digits: The digit there, as a token, `(questions,)`, int64.
        is_right: Whether the answer was right, `(questions,)`, bool.
        embeddings: The raw visual embedding of the cell, `(questions, hidden_size)`.
        streams: By layer of a branch: the residual stream that its query is made from, `(questions, hidden_size)`.
        shares: By layer of a branch: the share of its retrieval that goes to the cell, the mean over heads,
            `(questions,)`.
    """

    cells: torch.Tensor
    digits: torch.Tensor
    is_right: torch.Tensor
    embeddings: torch.Tensor
    streams: dict[int, torch.Tensor]
    shares: dict[int, torch.Tensor]


@torch.no_grad()
def ask(model: torch.nn.Module, split: Split, distractor_length: int, rows: int, seed: int = 0) -> Asked:
    """Ask a model with one PVM adapter for all cells, and keep what its branches were given and where they looked.

    Args:
        model: The tiny model with the adapter, in eval mode.
        split: Where digits and text come from.
        distractor_length: Bytes of text between the mosaic and the first question.
        rows: Mosaics, with nine questions each.
        seed: Decides them.
    """
    layers = [module for module in model.modules() if isinstance(module, PVMLayer)]
    streams: dict[int, list[torch.Tensor]] = {layer.layer_idx: [] for layer in layers}
    retrievals: dict[int, list[torch.Tensor]] = {layer.layer_idx: [] for layer in layers}
    banks: list[torch.Tensor] = []

    def keep(layer: PVMLayer, module: torch.nn.Module, args: tuple[torch.Tensor, VisualContext]) -> None:
        hidden_states, context = args
        context = context.tail(hidden_states.shape[1])
        (branch,) = layer.pvm_branches[layer.active_adapters[0]]
        retrieval = branch.retrieval(hidden_states, context)
        assert retrieval is not None  # every row has an image
        streams[layer.layer_idx].append(hidden_states[:, -NUM_DIALOGUE::2].flatten(0, 1))
        retrievals[layer.layer_idx].append(retrieval[:, :, -NUM_DIALOGUE::2].mean(1).flatten(0, 1))
        if layer is layers[0]:
            banks.append(context.memory.embeddings.repeat_interleave(NUM_CELLS, 0))

    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(64, TOKENS_PER_FORWARD // (IMAGE_LENGTH + distractor_length + NUM_DIALOGUE)))
    cells, digits, is_right = [], [], []
    handles = [layer.register_forward_pre_hook(partial(keep, layer)) for layer in layers]
    try:
        with Bars() as bar:
            for start in bar.track(range(0, rows, at_once), description=f"{split}, {distractor_length} bytes"):
                batch = make_questions(split, min(at_once, rows - start), distractor_length, NUM_CELLS, generator)
                logits = model(**batch.inputs, use_cache=False).logits
                cells.append((batch.inputs["input_ids"][:, batch.inputs["logits_to_keep"]] - FIRST_QUERY).flatten())
                digits.append(batch.targets.flatten())
                is_right.append((logits.argmax(-1) == batch.targets).flatten())
    finally:
        for handle in handles:
            handle.remove()
    asked = torch.cat(cells)
    every = torch.arange(len(asked))
    return Asked(
        asked,
        torch.cat(digits),
        torch.cat(is_right),
        torch.cat(banks)[every, asked],
        {layer_idx: torch.cat(parts) for layer_idx, parts in streams.items()},
        {layer_idx: torch.cat(parts)[every, asked] for layer_idx, parts in retrievals.items()},
    )


def probe_accuracy(
    train_inputs: torch.Tensor, train_labels: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor
) -> float:
    """How often logistic regression, fitted on the first two, is right on the others."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train_inputs.mean(0), train_inputs.std(0) + 1e-6
    fitted = LogisticRegression(max_iter=2000).fit((train_inputs - mean) / deviation, train_labels)
    return float(fitted.score((inputs - mean) / deviation, labels))


def load_for_limits(adapter: str | os.PathLike) -> PeftModel:
    """The tiny model with a PVM adapter, in eval mode.

    Args:
        adapter: Folder of the adapter.

    Raises:
        ValueError: It is not a PVM adapter with one branch in a layer, or not one of the tiny model.
    """
    config = PeftConfig.from_pretrained(os.fspath(adapter))
    if not isinstance(config, PVMConfig) or len(config.parts()) > 1:
        raise ValueError(f"{adapter} must be an adapter of PVM with one branch in a layer.")
    return PeftModel.from_pretrained(load_tiny_vlm(), adapter).eval()


def show_limits(model: PeftModel, title: str, rows: int = 64, seed: int = 0) -> None:
    """Print what a PVM adapter of the tiny model has to go by, and what it makes of it.

    Args:
        model: As `load_for_limits` gives it.
        title: What the table says of it.
        rows: Rows of nine questions at every length, to fit the probes on and as many to test them on.
        seed: Decides the questions.
    """
    start = time.perf_counter()
    columns = [_column(model, length, rows, seed) for length in LENGTHS]
    title = f"{title}: {rows} x {NUM_CELLS} held-out questions"
    table = Table("After bytes of text", *map(str, LENGTHS), title=title)
    for row in columns[0]:
        table.add_row(row, *(f"{column[row]:.3f}" for column in columns))
    console = Terminal()
    console.print(table)
    console.print(
        "Known and readable: by logistic regression on training data. Found: a branch gives the cell asked for more "
        "than half of its retrieval.\n"
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.perf_counter() - start:.0f} s."
    )


def _column(model: torch.nn.Module, length: int, rows: int, seed: int) -> dict[str, float]:
    fitted, tested = ask(model, "train", length, rows, seed), ask(model, "test", length, rows, seed)
    column = {
        f"cell known to the query, layer {idx}": probe_accuracy(
            fitted.streams[idx], fitted.cells, tested.streams[idx], tested.cells
        )
        for idx in tested.streams
    }
    column["digit readable from its embedding"] = probe_accuracy(
        fitted.embeddings, fitted.digits, tested.embeddings, tested.digits
    )
    is_found = torch.stack(list(tested.shares.values())).amax(0) > 0.5
    for name, part in {
        "cell found": is_found,
        "right": tested.is_right,
        "right where found": tested.is_right[is_found],
        "right where not": tested.is_right[~is_found],
    }.items():
        column[name] = float(part.float().mean())
    return column

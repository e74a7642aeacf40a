"""Where a model looks when it is asked about its mosaic: by its own attention, and by PVM's."""

from __future__ import annotations

import torch
from torch import nn

from peft_pvm.demo.mosaic import FIRST_QUERY, NUM_CELLS, Split, make_questions
from peft_pvm.probe.observers import AttentionObserver, branches_observed, observed
from peft_pvm.tokens.families import find_vlm


NUM_DIALOGUE = 2 * NUM_CELLS - 1  # tokens: the questions, and the answers between them


@torch.no_grad()
def visual_mass(
    model: nn.Module, distractor_length: int, rows: int = 4, split: Split = "test", seed: int = 0
) -> list[float]:
    """Visual attention mass at the questions, with whatever adapters are attached.

    Args:
        model: The tiny model, in eval mode.
        distractor_length: Bytes of text between the mosaic and the first question.
        rows: Mosaics, with nine questions each.
        split: Where digits and text come from.
        seed: Decides them.

    Returns:
        For each layer, the mean over rows, questions and heads, from 0 to 1.
    """
    vlm = find_vlm(model)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(vlm.layers), dtype=torch.float64)
    for _ in range(rows):
        batch = make_questions(split, 1, distractor_length, NUM_CELLS, generator)
        observer = AttentionObserver(NUM_DIALOGUE)
        with observed(vlm, observer):
            model(**batch.inputs, use_cache=False)
        total += torch.stack([masses.visual[::2].double().mean() for _, masses in sorted(observer.masses.items())])
    return (total / rows).tolist()


@torch.no_grad()
def retrieved_mass(
    model: nn.Module, distractor_length: int, rows: int = 4, split: Split = "test", seed: int = 0
) -> dict[int, float]:
    """What share of PVM's retrieval goes to the cell that is asked for.

    Args:
        model: The tiny model with one PVM adapter, in eval mode.
        distractor_length: Bytes of text between the mosaic and the first question.
        rows: Mosaics, with nine questions each.
        split: Where digits and text come from.
        seed: Decides them.

    Returns:
        By layer index, the mean over rows, questions and heads, from 0 to 1; empty without PVM. Chance is 1/9.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[int, float] = {}
    for _ in range(rows):
        batch = make_questions(split, 1, distractor_length, NUM_CELLS, generator)
        cells = batch.inputs["input_ids"][0, batch.inputs["logits_to_keep"]] - FIRST_QUERY
        with branches_observed(model, NUM_DIALOGUE) as traces:
            model(**batch.inputs, use_cache=False)
        for (_, layer_idx), trace in traces.items():
            share = trace.retrieval[::2].gather(1, cells[:, None]).mean()
            total[layer_idx] = total.get(layer_idx, 0.0) + float(share) / rows
    return total

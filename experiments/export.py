"""A trained PVM adapter of the experiment as a folder to share: weights, configuration and model card."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import ModelCardData
from peft.utils import CONFIG_NAME

from peft_pvm.demo.mosaic import NUM_CELLS, load_material
from peft_pvm.folders.replacing import replacing
from peft_pvm.folders.writing import CARD_NAME
from peft_pvm.tuners.saving import save_adapter

from .markdown import HOME
from .runs import RECIPES, load_method
from .summary import Entry, Results


NEWLINE = "\n"


def export_adapter(
    recipe: str, seed: int, runs: str | os.PathLike, results: str | os.PathLike, out: str | os.PathLike
) -> Path:
    """Save the PVM adapter of one run as `PeftModel.from_pretrained` takes it, with a card that holds its results.

    Args:
        recipe: Key of `RECIPES`.
        seed: Of the training.
        runs: Folder of the trainings.
        results: Folder of the results.
        out: Folder to write to.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: It was not trained or not tested yet.
    """
    model = load_method("pvm", recipe, seed, runs)
    found = Results(results)
    entry, base = found.only("pvm", recipe, seed), found.only("base", None, 0)
    with replacing(out, entry=CONFIG_NAME) as staged:
        save_adapter(model, "pvm", staged)
        (staged / CARD_NAME).write_text(_card(recipe, seed, entry, base), encoding="utf-8")
    return Path(out)


def _card(recipe: str, seed: int, entry: Entry, base: Entry) -> str:
    used = RECIPES[recipe]
    data = ModelCardData(library_name="peft", license="apache-2.0", tags=["peft-pvm", "pvm", "vision-language"])
    digits, tested = len(load_material("train").labels), len(entry.runs[0]["one mosaic"][0].right)
    rows = [
        f"| {length:,} | {base.cell('one mosaic', length)} | {entry.cell('one mosaic', length)} |"
        for length in entry.keys("one mosaic")
    ]
    rounds = [
        f"| {number} | {base.cell('transcription', number)} | {entry.cell('transcription', number)} |"
        for number in (1, 2, 4, 8, 16, 28)
    ]
    return f"""---
{data.to_yaml()}
---

# PVM on the lab's tiny model

A Persistent Visual Memory ([arXiv 2605.00814](https://arxiv.org/abs/2605.00814)) for the tiny Qwen3-VL that ships with
[peft-pvm]({HOME}), with {entry.parameters:,} parameters. It is an example and of no use on any other model.

```python
import peft_pvm  # registers PVM with PEFT
from peft import PeftModel
from peft_pvm.demo.tiny_vlm import load_tiny_vlm

model = PeftModel.from_pretrained(load_tiny_vlm(), "adapters/pvm-tiny-vlm")
```

**Data**: mosaics of scikit-learn's handwritten digits ({digits} images to train with) and the text of Python's help
topics. Tests use other digits and texts, split by a hash of their content.

**Training**: the base is frozen.
{used}.
AdamW, learning rate {used.learning_rate} (the gates ten times that). Half of the steps ask about one mosaic, and a
quarter about two or three. In the remaining quarter, the model writes out all cells of one. Command:
`python -m experiments train --method pvm --recipe {recipe} --seed {seed}`.

**Results**: accuracy on held-out digits, ± standard error over {tested} rows of {NUM_CELLS} questions.

| Bytes of text between | Base | With this adapter |
|---:|---:|---:|
{NEWLINE.join(rows)}

The same while the model writes out its mosaic again and again. The image is given only once:

| Round | Base | With this adapter |
|---:|---:|---:|
{NEWLINE.join(rounds)}

Other seeds, controls of the same size, and what does not work are in [the results]({HOME}/blob/main/docs/results.md).
"""

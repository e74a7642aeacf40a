"""Adapters of the real base as folders to share: in bf16, with a model card that holds their results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from peft_pvm.folders.writing import CARD_NAME
from peft_pvm.tuners.saving import load_adapters, save_adapter

from ..markdown import HOME, table
from .runs import load_base
from .summary import AS_SAVED, TASKS, Results


NEWLINE = "\n"


def export_adapters(
    base: str | os.PathLike,
    sources: Sequence[str],
    trained_by: str,
    results: str | os.PathLike,
    out: str | os.PathLike,
) -> list[Path]:
    """Copy adapters that act together into a folder, rounded to bf16, each with a card.

    Args:
        base: Folder of the real base.
        sources: Folders of adapters. Each has its name in `out` as well.
        trained_by: The command, for the card.
        results: Folder of the results on the real base. Those of the adapters are found by their names, with `+`
            between. If saved ones of these names were tested, the card has their results, else those of the training.
        out: Folder to write to.

    Returns:
        The folders.

    Raises:
        FileNotFoundError: There is no such base or adapter, or there are no results.
        ValueError: Something cannot be read.
    """
    found, model = Results(results), load_base(base)
    names = load_adapters(model, sources)
    for name in names:
        model.peft_config[name].inference_mode = False  # it is saved with what acts beside it, rounded as well
    model.bfloat16()
    folders = [Path(out, Path(source).name) for source in sources]
    for name, folder in zip(names, folders):
        save_adapter(model, name, folder)
        (folder / CARD_NAME).write_text(_card(folders, folder, trained_by, found), encoding="utf-8")
    return folders


def _card(folders: Sequence[Path], folder: Path, trained_by: str, results: Results) -> str:
    """The card of one of the folders."""
    data = ModelCardData(library_name="peft", license="apache-2.0", tags=["peft-pvm", folder.name, "vision-language"])
    names = [str(other) for other in folders]
    others = [str(other) for other in folders if other != folder]
    beside = f" It has to be loaded together with {', '.join(others)}." if others else ""
    trained = "+".join(other.name for other in folders)
    is_saved = any(results.find(task, trained + AS_SAVED).runs for task in results.tasks)
    method = trained + AS_SAVED if is_saved else trained
    return f"""---
{data.to_yaml()}
---

# {folder.name} on the lab's real base

An adapter for [the real base of the lab]({HOME}/blob/main/docs/real-model.md), SmolLM2-135M-Instruct with a small
vision tower that reads mosaics of digits. It is an example and of no use on any other model.{beside}

<!-- not run in tests: needs the real base -->

```python
from peft_pvm import load_adapters
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("runs/real/base")  # from `make real-base`
load_adapters(model, {json.dumps(names)})
```

**Data**: mosaics of scikit-learn's handwritten digits and the text of Python's help topics. Tests use
other digits and texts, split by a hash of their content.

**Training**: `{trained_by}`, rounded to bf16.

**Results**, accuracy ± standard error over rows of nine questions, by tokens of text:

{NEWLINE.join(_results(results, method))}

Measured {"with these files" if is_saved else "before rounding"}.
`python -m experiments real-eval --base runs/real/base --adapter {"+".join(names)}` tests them.
`--task` chooses one of the other tasks. All methods get the same rows. See
[all results]({HOME}/blob/main/docs/results.md), including what does not work.
"""


def _results(results: Results, method: str) -> list[str]:
    tasks = [task for task in results.tasks if results.find(task, method).runs]
    lengths = sorted({length for task in tasks for length in results.find(task, method).lengths})
    rows = [
        (f"{TASKS.get(task, task)}: {entry.title}", *map(entry.shown, lengths))
        for task in tasks
        for entry in (results.find(task, "base"), results.find(task, method))
    ]
    return table(("", *(f"{length:,}" for length in lengths)), rows)

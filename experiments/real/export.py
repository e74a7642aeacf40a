"""Adapters of the real base as folders to share: in bf16, with a model card that holds their results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from peft_pvm.folders.data_file import holding, read_json
from peft_pvm.folders.writing import CARD_NAME
from peft_pvm.tuners.loading import load_adapters
from peft_pvm.tuners.saving import save_adapter

from ..markdown import HOME, table
from ..weights import RUN
from .evaluation import WRITING, hash_of_folder
from .methods import METHODS
from .runs import load_base, run_folder
from .summary import TASKS, Entry, Results, Run, Training


NEWLINE = "\n"


def export_adapters(
    base: str | os.PathLike,
    sources: Sequence[str],
    trained_by: str,
    results: str | os.PathLike,
    out: str | os.PathLike,
) -> list[Path]:
    """Copy adapters that act together into a folder, rounded to bf16, each with a card.

    A card shows only results of these adapters: of the exported files or else of the source files, which are
    recognized by their hashes, or else of the training that made the sources.

    Args:
        base: Folder of the real base.
        sources: Folders of adapters. Each has its name in `out` as well.
        trained_by: The command, for the card.
        results: Folder of the results on the real base.
        out: Folder to write to.

    Returns:
        The folders.

    Raises:
        FileNotFoundError: There is no such base or adapter, or there are no results.
        ValueError: Something cannot be read, or an adapter would overwrite a source or another one.
    """
    folders = _targets(sources, out)
    found, model = Results(results), load_base(base)
    names = load_adapters(model, sources)
    for name in names:
        model.peft_config[name].inference_mode = False  # it is saved with what acts beside it, rounded as well
    model.bfloat16()
    for name, folder in zip(names, folders):
        save_adapter(model, name, folder)
    runs, tested = _measured(found, sources, folders)
    for folder in folders:
        (folder / CARD_NAME).write_text(_card(folders, folder, trained_by, found, runs, tested), encoding="utf-8")
    return folders


def _targets(sources: Sequence[str], out: str | os.PathLike) -> list[Path]:
    """The folder for each adapter."""
    folders = [Path(out, Path(source).name) for source in sources]
    taken = set(map(os.path.realpath, sources))
    for source, folder in zip(sources, folders):
        place = os.path.realpath(folder)
        if place in taken:
            raise ValueError(
                f"The copy of {source} in {folder} would overwrite another adapter of this export, or a source. "
                "Choose another folder with --out, and export adapters of the same name one by one."
            )
        taken.add(place)
    return folders


def _measured(results: Results, sources: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, Run], str]:
    """The results of these adapters by task, none if they were not tested; and what was tested."""
    for tested, of in (("with these files", folders), ("before rounding", sources)):
        hashes = sorted(hash_of_folder(str(folder)) for folder in of)
        if runs := {run.task: run for run in results.runs if sorted(run.adapters) == hashes}:
            return runs, tested
    return {run.task: run for run in results.runs if _made(run, sources)}, "before rounding"


def _made(run: Run, sources: Sequence[str]) -> bool:
    """Whether a method was tested with the weights of the training that made these adapters, and all of them."""
    if run.training is None or run.method not in METHODS:
        return False
    folder = run_folder(Path(os.path.realpath(sources[0])).parent.parent, run.method, run.training.seed)
    made = {os.path.realpath(folder / adapter) for adapter in METHODS[run.method].adapters()}
    file = folder / RUN
    if made != set(map(os.path.realpath, sources)) or not file.is_file():
        return False
    with holding(file, "what python -m experiments real-train writes"):
        return Training.of(read_json(file)) == run.training


def _card(
    folders: Sequence[Path],
    folder: Path,
    trained_by: str,
    results: Results,
    runs: Mapping[str, Run],
    tested: str,
) -> str:
    """The card of one of the folders."""
    data = ModelCardData(library_name="peft", license="apache-2.0", tags=["peft-pvm", folder.name, "vision-language"])
    names = [str(other) for other in folders]
    others = [str(other) for other in folders if other != folder]
    beside = f"\nIt has to be loaded together with {', '.join(others)}." if others else ""
    return f"""---
{data.to_yaml()}
---

# {folder.name} on the lab's real base

An adapter for [the real base of the lab]({HOME}/blob/main/docs/real-model.md),
SmolLM2-135M-Instruct with a small vision tower that reads mosaics of digits. It is an example and of no use on any
other model.{beside}

<!-- not run in tests: needs the real base -->

```python
from peft_pvm import load_adapters
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("runs/real/base")  # from `make real-base`
load_adapters(model, {json.dumps(names)})
```

**Data**: mosaics of scikit-learn's handwritten digits and the text of Python's help topics. Tests use other digits and
texts, split by a hash of their content.

**Training**: `{trained_by}`,
rounded to bf16.

{NEWLINE.join(_results(results, runs, tested))}
`python -m experiments real-eval --base runs/real/base --adapter {"+".join(names)}`
tests them. `--task` chooses one of the other tasks. All methods get the same rows. See
[all results]({HOME}/blob/main/docs/results.md), including what does not work.
"""


def _results(results: Results, runs: Mapping[str, Run], tested: str) -> list[str]:
    """The lines about results, with a table of its own for the task that has other lengths."""
    if not runs:
        return ["**Results**: nothing has been measured yet."]
    asked = [runs[task] for task in results.tasks if task in runs and task != WRITING]
    lines = ["**Results**, accuracy ± standard error over rows of nine questions, by tokens of text:", ""]
    if asked:
        lines += [*_table(results, asked), ""]
    if WRITING in runs:
        lines += ["By tokens between image and round:", "", *_table(results, [runs[WRITING]]), ""]
    return [*lines, f"Measured {tested}."]


def _table(results: Results, runs: Sequence[Run]) -> list[str]:
    lengths = sorted({length for run in runs for length in run.accuracies})
    rows = [
        (f"{TASKS.get(run.task, run.task)}: {title}", *map(entry.shown, lengths))
        for run in runs
        for title, entry in (("base", results.find(run.task, "base")), ("adapted", Entry(run.method, (run,))))
    ]
    return table(("", *(f"{length:,}" for length in lengths)), rows)

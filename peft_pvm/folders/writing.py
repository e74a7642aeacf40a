"""Writes adapters whole or not at all, with a model card."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load, save_file

from ..utils.checks import is_text
from ..utils.text import code_span, markdown, plain
from .adapter_file import RESULTS_NAME, AdapterFile, SavedConfig
from .companions import KEY, Companion, as_note, method_of
from .data_file import OF_ADAPTERS, read_json, to_safetensors
from .replacing import is_staged, replacing, write_file


FORMER_LEFTOVERS = ".unfinished-*"  # beside the folder, from saves by earlier versions that were killed
FORMER_SAVE_SECONDS = 600  # after which nobody is still writing to one

CARD_NAME = "README.md"
PEFT_TEMPLATE = "# Model Card for Model ID"  # the heading of the card that PEFT leaves to be filled in
TEMPLATE = Path(__file__).with_name("card.md.jinja")  # Jinja2, which reads it, comes with torch
MARK = "<!-- Written by peft-pvm, again at every save. Delete this line to keep your changes. -->"
MOST_RESULTS = 1_000
RESULT_FIELDS = {"dataset", "metric", "value"}  # and "base", the base model's, if known


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Write an adapter so that its folder holds the old one or the new one, whenever the process dies.

    The same is true if several processes save into one folder. Adapters in sub-folders are each written whole by
    themselves. Other files in the folder are not touched, nor is a model card that a person wrote.

    Args:
        folder: The folder of the adapter.

    Yields:
        A folder of the same name, to write to. It holds copies of the model cards and results that are there already,
        which the new cards are made from.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    _remove_former_leftovers(folder)
    with replacing(folder, CONFIG_NAME, stays=is_written_by_a_person) as staged:
        copies: dict[Path, bytes] = {}
        for name in () if staged.samefile(folder) else (CARD_NAME, RESULTS_NAME):  # the same inside another save
            for file in filter(_is_text, (*folder.glob(name), *folder.glob(f"*/{name}"))):
                copy_of_it = staged / file.relative_to(folder)
                copy_of_it.parent.mkdir(exist_ok=True)
                copies[copy_of_it] = shutil.copyfile(file, copy_of_it).read_bytes()
        yield staged
        for path, content in copies.items():
            if path.is_file() and path.read_bytes() == content:
                path.unlink()
                if path.parent != staged and not any(path.parent.iterdir()):
                    path.parent.rmdir()


def write_adapter(
    folder: str | os.PathLike,
    config: PeftConfig,
    tensors: dict[str, torch.Tensor],
    companions: Sequence[Companion] = (),
) -> Path:
    """Save an adapter as PEFT does, whole or not at all. Ours bring a model card.

    Args:
        folder: Where to.
        config: Its configuration.
        tensors: Its tensors, by their keys in the file.
        companions: The adapters that it was trained together with.

    Returns:
        The folder.
    """
    with written_whole(folder) as staged:
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        saved = copy.copy(config)
        saved.inference_mode = True  # as PEFT saves it
        saved.save_pretrained(str(staged))
        note_companions(staged, saved, companions)
    return Path(folder)


def note_companions(folder: Path, config: PeftConfig, companions: Sequence[Companion]) -> None:
    """Write into a saved adapter what it was trained together with: into its weights file and its card.

    Args:
        folder: Where the adapter is saved. A pickle takes no note.
        config: Its configuration.
        companions: The adapters; if there are none, nothing is written.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not companions or not file.is_file():
        return
    with safe_open(file, framework="pt") as tensors:
        metadata = {**(tensors.metadata() or {}), KEY: as_note(companions)}
    file.write_bytes(to_safetensors(load(file.read_bytes()), metadata))
    write_card(config, folder)


def _remove_former_leftovers(folder: Path) -> None:
    folder = Path(os.path.realpath(folder))
    for leftover in folder.parent.glob(FORMER_LEFTOVERS):
        with contextlib.suppress(OSError):  # another user's, or gone already
            newest = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
            if (leftover / folder.name).is_dir() and newest < time.time() - FORMER_SAVE_SECONDS:
                shutil.rmtree(leftover)


def _is_text(path: Path) -> bool:
    """Whether something is a file that PEFT can read as a card."""
    try:
        return bool(path.is_file() and path.read_text(encoding="utf-8") is not None)
    except UnicodeDecodeError:
        return False


def write_card(config: PeftConfig, folder: str | os.PathLike) -> None:
    """Write an adapter's README.md, unless somebody has written one.

    What `results.json` in the folder holds goes into the card: a list of objects with `dataset`, `metric`, `value`
    and, if known, `base`, the base model's value. An adapter of another package gets a card only if it was trained
    together with others, as the card then says.

    Args:
        config: The adapter's configuration.
        folder: Where the adapter is saved.

    Raises:
        ValueError: The weights file is damaged; or `results.json` is not such a list, unless the adapter is just being
            saved, which gives a warning.
    """
    path = Path(folder) / CARD_NAME
    companions = AdapterFile(folder).companions()
    is_ours = isinstance(config, SavedConfig)
    if not (companions or is_ours) or is_written_by_a_person(path):
        return
    try:
        results = read_results(folder)
    except ValueError:
        if not is_staged(path):
            raise
        warnings.warn(  # an adapter is worth more than its card
            f"The model card is written without results: {RESULTS_NAME} in the adapter's folder is no list of objects "
            f"with {', '.join(sorted(RESULT_FIELDS))}. Correct it, and write the card again with `peft-pvm card`.",
            stacklevel=2,
        )
        results = []
    write_file(path, card_text(config, results, companions))


def is_written_by_a_person(path: Path) -> bool:
    """Whether a file is a model card that neither we nor PEFT have made."""
    if path.name != CARD_NAME or not path.is_file():
        return False
    card = path.read_text(encoding="utf-8", errors="replace")
    return PEFT_TEMPLATE not in card and MARK not in card


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """What `results.json` in a folder holds; nothing if there is none.

    Raises:
        ValueError: It is not a list of results.
    """
    path = Path(folder) / RESULTS_NAME
    if not path.is_file():
        return []
    results = read_json(path, OF_ADAPTERS)
    if not isinstance(results, list) or len(results) > MOST_RESULTS or not all(map(_is_result, results)):
        raise ValueError(
            f"{plain(path, 200)} must hold a list of objects with {', '.join(sorted(RESULT_FIELDS))} and maybe base: "
            f"names and numbers, at most {MOST_RESULTS} of them."
        )
    return results


def _is_result(result: Any) -> bool:
    return (
        isinstance(result, dict)
        and result.keys() - {"base"} == RESULT_FIELDS
        and all(is_text(result[name], 200) and result[name].strip() for name in ("dataset", "metric"))
        and all(_is_score(result[name]) for name in result.keys() & {"value", "base"})
    )


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def card_text(config: PeftConfig, results: list[dict[str, Any]], companions: Sequence[Companion] = ()) -> str:
    """The card: what the Hub reads, how to load the adapter, its configuration, what was measured.

    Args:
        config: The adapter's configuration. Only those of this package have their fields explained.
        results: As `read_results` returns them.
        companions: The adapters that it was trained together with.
    """
    base = plain(config.base_model_name_or_path or "", 200)
    here = "this folder or its Hub id"
    card = ModelCard.from_template(
        _card_data(config, base, results),
        template_path=str(TEMPLATE),
        mark=MARK,
        config=config,
        method=method_of(config),
        fields=_fields_of(config) if isinstance(config, SavedConfig) else [],
        base_on_hub=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.exists(base) else None,
        here=here,
        together=[*(f"the folder or Hub id of {plain(other.name, 100)}" for other in companions), here],
        companions=companions,
        results=results,
        code_span=code_span,
        markdown=markdown,
    )
    return str(card)


def _fields_of(config: SavedConfig) -> list[dataclasses.Field]:
    """The fields that are the method's own."""
    common = {field.name for field in dataclasses.fields(PeftConfig)} | {"init_weights", "format_version"}
    return [field for field in dataclasses.fields(config) if field.name not in common]


def _card_data(config: PeftConfig, base: str, results: list[dict[str, Any]]) -> ModelCardData:
    """What the Hub reads."""
    task = "image-text-to-text"
    method = method_of(config)
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=_slug(result["dataset"]),
            dataset_name=plain(result["dataset"]),
            metric_type=_slug(result["metric"]),
            metric_name=plain(result["metric"]),
            metric_value=result["value"],
        )
        for result in results
    ]
    return ModelCardData(
        library_name="peft",
        base_model=base or None,
        pipeline_tag=task,
        tags=["peft-pvm", method.lower(), *([f"base_model:adapter:{base}"] if base else [])],
        model_name=f"{method} adapter" if results else None,
        eval_results=evaluations or None,
    )


def _slug(name: str) -> str:
    """An identifier for a name in any script.

    Example:
        >>> _slug("MathVerse (mini)"), _slug("数学 验证"), _slug("!?")
        ('mathverse-mini', '数学-验证', 'unnamed')
    """
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-") or "unnamed"

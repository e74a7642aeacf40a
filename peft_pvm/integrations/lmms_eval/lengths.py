"""Runs tasks of lmms-eval with more and more text between image and question, for the base and for adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from peft import PeftConfig

from ...tuners.names import separate
from . import MISSING
from .report import score_rows


try:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import simple_parse_args_string
except ModuleNotFoundError as error:
    raise ImportError(f"{error}. {MISSING}") from error
from .models import MODELS, PREFIX, model_class


VERSIONS = ("lmms_eval", "torch", "transformers", "peft", "peft-pvm")
BASE = "base"
SET_HERE = {"adapter": "adapters (--adapter)", "distractor_tokens": "lengths (--lengths)"}  # among a model's arguments


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        model: One of `MODELS`.
        model_args: The arguments of lmms-eval's model, such as "pretrained=Qwen/Qwen3-VL-8B-Instruct", without
            `adapter` and `distractor_tokens`, which differ from run to run.
        tasks: Names of tasks or groups.
        lengths: Tokens of text between image and question; 0 for none.
        adapters: What is compared with the base: each a folder, a Hub id, or several with `+` between, which act
            together.
        seeds: Seeds of sampling, with one run for each. A task with greedy answers needs only one.
        include_path: Folder of further tasks.
        limit: Documents of each task; `None`: all.
        batch_size: Documents at a time.
        device: Such as "cuda" or "cpu"; `None`: lmms-eval's default.
        gen_kwargs: Changes to the generation settings of the tasks, such as "temperature=0.7".
    """

    model: str
    model_args: str
    tasks: Sequence[str]
    lengths: Sequence[int]
    adapters: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    gen_kwargs: str | None = None


def evaluate_lengths(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run lmms-eval for the base and for adapters, with every length of text.

    All run on the same texts. Each run loads the model anew, as lmms-eval does.

    Args:
        settings: What is evaluated.
        progress: Called with what runs next.
        keep: Called with the result so far after each run.

    Returns:
        What can be written as JSON: the settings, `versions`, `text` (what was put in, by run) and `scores`, rows of
        `adapter`, `length`, `seed`, `task`, `metric`, `value` and `stderr` (lmms-eval's, over documents, or `None`).
        Empty `scores` on other processes than the first.

    Raises:
        ValueError: A model, task or adapter that is not known, a length below 0, `model_args` that cannot be read or
            hold what is set here, or what a run refuses.
    """
    manager = _checked_tasks(settings)
    result: dict[str, Any] = {
        "model": f"{PREFIX}{settings.model}",
        "model_args": settings.model_args,
        "tasks": list(settings.tasks),
        "lengths": list(settings.lengths),
        "adapters": [BASE, *settings.adapters],
        "seeds": list(settings.seeds),
        "limit": settings.limit,
        "gen_kwargs": settings.gen_kwargs,
        "versions": {name: version(name) for name in VERSIONS},
        "text": [],
        "scores": [],
    }
    for adapter, length, seed in itertools.product(result["adapters"], settings.lengths, settings.seeds):
        progress(f"{adapter}, {length} tokens, seed {seed}")
        run = {"adapter": adapter, "length": length, "seed": seed}
        counts, results = _run(settings, manager, adapter, length, seed)
        result["text"].append({**run, "requests": len(counts), "tokens": sorted(set(counts))})
        if results is not None:  # all is gathered in the first process
            result["scores"] += [{**run, **row} for row in score_rows(results["results"])]
            keep(result)
    return result


def _checked_tasks(settings: Settings) -> TaskManager:
    """Refuse what would otherwise fail only after hours, and return the tasks."""
    model, adapters = settings.model, settings.adapters
    if model not in MODELS:
        raise ValueError(f"The model is {model!r}, but must be one of {', '.join(MODELS)}.")
    if min(settings.lengths) < 0:
        raise ValueError(f"The lengths are {list(settings.lengths)}, but must be 0 or more.")
    if BASE in adapters:
        raise ValueError(f"{BASE!r} is what the model without adapters is called here: give the folder as ./{BASE}.")
    for name in _argument_names(settings.model_args):
        if name in SET_HERE:
            raise ValueError(f"model_args (--model-args) holds {name}=, but that is set here: give {SET_HERE[name]}.")
    for source in (source for adapter in adapters for source in separate(adapter)):
        PeftConfig.from_pretrained(source)
    # Prompts that a task has for this model are found by lmms-eval's own name of it.
    manager = TaskManager(include_path=settings.include_path, model_name=model)
    if unknown := sorted(set(settings.tasks) - set(manager.all_tasks)):
        raise ValueError(f"lmms-eval has no tasks {unknown}: `lmms-eval tasks list` shows them all.")
    return manager


def _run(
    settings: Settings, manager: TaskManager, adapter: str, length: int, seed: int
) -> tuple[list[int], dict[str, Any] | None]:
    """How many tokens of text each request was given, and lmms-eval's results."""
    given = f"{settings.model_args},distractor_tokens={length}" + ("" if adapter == BASE else f",adapter={adapter}")
    options = {"batch_size": settings.batch_size, "device": settings.device}
    lm = model_class(settings.model).create_from_arg_string(given, options)
    results = simple_evaluate(
        model=lm,
        tasks=list(settings.tasks),
        task_manager=manager,
        limit=settings.limit,
        gen_kwargs=settings.gen_kwargs,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        log_samples=False,
    )
    return lm.distractor_counts, results


def _argument_names(model_args: str) -> list[str]:
    try:
        return list(simple_parse_args_string(model_args))
    except ValueError as error:
        raise ValueError(
            f"model_args (--model-args) is {model_args!r}, but must be name=value, separated by commas."
        ) from error

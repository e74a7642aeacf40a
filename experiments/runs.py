"""The runs of the experiment: train and test every method, seed by seed, and keep the results as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Qwen3VLForConditionalGeneration

from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.recall import recall, transcription
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import Recipe, train_adapter
from peft_pvm.env import environment
from peft_pvm.folders.data_file import read_json, write_json

from .base import fingerprint
from .checkpoint import CheckpointFile, is_finished
from .fading import retrieved_mass, visual_mass
from .methods import METHODS, attach, trained_parameters
from .weights import put_weights, save_run


RECIPES: dict[str, Recipe] = {
    "hidden-1024": Recipe(steps=400, hidden_steps=2000, max_distractor_length=1024),
    "plain-1024": Recipe(steps=1000, hidden_steps=0, max_distractor_length=1024),  # as many tokens
    "hidden-1024-long": Recipe(steps=1600, hidden_steps=1600, max_distractor_length=1024, lengths="uniform"),
    "plain-1024-long": Recipe(steps=2100, hidden_steps=0, max_distractor_length=1024, lengths="uniform"),
    "hidden-256": Recipe(steps=400, hidden_steps=2000, max_distractor_length=256),
    "plain-256": Recipe(steps=1000, hidden_steps=0, max_distractor_length=256),
}
MAIN_RECIPE = next(iter(RECIPES))
# Every method is trained under the main recipe; under the others PVM or its controls, where it tells something.
UNDER_OTHERS = {
    "plain-1024": ("lora", "mlp", "pvm"),
    "hidden-1024-long": ("pvm", "pvm+dipe"),
    "plain-1024-long": ("lora",),
    "hidden-256": ("pvm",),
    "plain-256": ("lora", "mlp"),
}
SEEDS = (0, 1, 2)
LENGTHS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
SEVERAL_IMAGES_LENGTHS = (0, 256, 1024)
WRITTEN_CELLS = 28 * NUM_CELLS


class Run(NamedTuple):
    """One training or test of the experiment.

    Attributes:
        method: Key of `METHODS`.
        recipe: Key of `RECIPES`; `None` for a method without training.
        seed: Of the training.
    """

    method: str
    recipe: str | None
    seed: int


def plan(
    methods: Sequence[str] | None = None, recipes: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[Run]:
    """The runs of the experiment, or a part of them. A run comes before those that use its weights.

    Args:
        methods: Keys of `METHODS`; `None`: all.
        recipes: Keys of `RECIPES`; `None`: all.
        seeds: Of the trainings; `None`: 0, 1 and 2.

    Raises:
        ValueError: An unknown method or recipe, or methods that are not trained under these recipes.
    """
    runs = []
    for name in methods or METHODS:
        method = _lookup(METHODS, name, "method")
        if not method.is_trained and method.weights_of is None:
            runs.append(Run(name, None, 0))
            continue
        for recipe in recipes or RECIPES:
            _lookup(RECIPES, recipe, "recipe")
            if recipe == MAIN_RECIPE or name in UNDER_OTHERS[recipe]:
                runs += [Run(name, recipe, seed) for seed in seeds or SEEDS]
    if not runs:
        raise ValueError(
            f"The experiment trains none of {', '.join(methods or METHODS)} under {', '.join(recipes or RECIPES)}; "
            f"all are trained under {MAIN_RECIPE}."
        )
    return runs


def run_folder(runs: str | os.PathLike, name: str, recipe: str | None, seed: int) -> Path:
    """The folder of one training."""
    return Path(runs) / str(recipe) / f"{name}-seed{seed}"


def train_method(name: str, recipe: str | None, seed: int, runs: str | os.PathLike, **changes: Any) -> Path:
    """Train one method. A finished training is not repeated, an interrupted one resumes.

    Args:
        name: A key of `METHODS` that is trained.
        recipe: A key of `RECIPES`.
        seed: Decides initial weights and questions.
        runs: Folder for everything that is trained.
        changes: Fields of the recipe to replace, such as fewer steps.

    Returns:
        The run's folder: the weights, and how they were made.

    Raises:
        ValueError: An unknown method or recipe, a method without a training of its own, or the folder holds another
            training.
    """
    method = _lookup(METHODS, name, "method")
    if not method.is_trained:
        raise ValueError(f"{name} has no training of its own.")
    used = replace(_lookup(RECIPES, recipe, "recipe"), seed=seed, **changes)
    folder = run_folder(runs, name, recipe, seed)
    base = fingerprint()
    if is_finished(folder, used, base):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = load_tiny_vlm()
    attach(model, method, seed)
    run = {"recipe": asdict(used), "base": base}
    adapters = {key: config.to_dict() for key, config in method.adapters().items()}
    checkpoint = CheckpointFile(folder / "checkpoint.safetensors", {**run, "adapters": adapters})
    train_adapter(model, used, checkpoint)
    save_run(folder, model, run)
    checkpoint.remove()
    return folder


def load_method(name: str, recipe: str | None, seed: int, runs: str | os.PathLike) -> Qwen3VLForConditionalGeneration:
    """The tiny model with a method on it and the weights of its training, in eval mode.

    Raises:
        FileNotFoundError: It was not trained yet.
        ValueError: An unknown method, or weights that do not fit it or were trained on another base.
    """
    method = _lookup(METHODS, name, "method")
    model = load_tiny_vlm()
    attach(model, method, seed)
    if trained_parameters(model):
        source = method.weights_of or name
        put_weights(model, run_folder(runs, source, recipe, seed), fingerprint(), f"train --method {source}")
    return model.requires_grad_(False).eval()


def evaluate_method(
    name: str, recipe: str | None, seed: int, runs: str | os.PathLike, results: str | os.PathLike, rows: int = 32
) -> Path:
    """Test one method and write its results. A finished test is not repeated.

    Args:
        name: A key of `METHODS`.
        recipe: A key of `RECIPES`; `None` for a method without training.
        seed: Of the training. All are asked the same.
        runs: Folder of the trainings.
        results: Folder for the results.
        rows: Rows of nine questions at every length.

    Returns:
        The result's file.

    Raises:
        FileNotFoundError: It was not trained yet.
        ValueError: An unknown method or recipe.
    """
    file = Path(results) / (f"{name}.json" if recipe is None else f"{name}.{recipe}.seed{seed}.json")
    if file.is_file():
        return file
    model = load_method(name, recipe, seed, runs)
    tested = {
        "one mosaic": {n: recall(model, n, rows, description=name) for n in LENGTHS},
        "two mosaics": {n: recall(model, n, rows, 2, description=name) for n in SEVERAL_IMAGES_LENGTHS},
        "three mosaics": {n: recall(model, n, rows, 3, description=name) for n in SEVERAL_IMAGES_LENGTHS},
        "transcription": dict(enumerate(transcription(model, WRITTEN_CELLS, rows, description=name), start=1)),
    }
    run: dict[str, Any] = {}
    source = METHODS[name].weights_of or name
    if recipe is not None:
        run = read_json(run_folder(runs, source, recipe, seed) / "run.json")
    result = {
        "method": name,
        "recipe": recipe,
        "seed": seed,
        "base": fingerprint(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - _base_parameters(),
        "training": run or None,
        # One digit a row: how many of its nine answers were right.
        "right of nine": {
            form: {str(key): "".join(map(str, accuracy.right)) for key, accuracy in by_key.items()}
            for form, by_key in tested.items()
        },
        "visual mass": {str(n): [round(mass, 6) for mass in visual_mass(model, n)] for n in LENGTHS},  # by layer
        "retrieved mass": {
            str(n): {str(layer_idx): round(mass, 6) for layer_idx, mass in retrieved_mass(model, n).items()}
            for n in LENGTHS
        },
        "environment": environment(),
    }
    write_json(file, result)
    return file


def _base_parameters() -> int:
    return sum(parameter.numel() for parameter in load_tiny_vlm().parameters())


def _lookup(table: dict[str, Any], name: str | None, what: str) -> Any:
    if name not in table:
        raise ValueError(f"There is no {what} {name!r}; there are {', '.join(table)}.")
    return table[name]

"""Combines several PVM adapters into one, from their configurations and tensors. No base model is needed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft.utils.merge_utils import dare_linear, ties

from ...folders.adapter_file import flaws
from ...folders.companions import NOTED, of_all
from ...utils.checks import LARGEST, is_number
from ...utils.text import listed, quoted
from .config import BRANCH_FIELDS, WEIGHTS, PVMConfig, weight_name


CombinationType = Literal["linear", "ties", "dare_linear", "cat"]
WEIGHT = re.compile(rf"\.pvm\.pvm_({'|'.join(WEIGHTS)})(?:_(\d+))?\.weight$")  # in a key: which one, of which branch

Tensors = dict[str, torch.Tensor]  # by their keys in the adapter's file


def combine(
    adapters: Sequence[tuple[PVMConfig, Tensors]],
    weights: Sequence[float],
    combination_type: CombinationType = "linear",
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    force: bool = False,
) -> tuple[PVMConfig, Tensors]:
    """Make one adapter from several of one base model.

    "linear" averages the weights, which means something only for adapters that started from the same initial ones.
    It takes adapters of one shape, as the next two do; "cat" takes any.
    "ties" and "dare_linear" are PEFT's, with the weights themselves as task tensors, as PEFT takes LoRA's factors;
    they apply to matrices, while norms and gates are averaged. "cat" puts the branches side by side, each gate times
    its weight: the new adapter adds exactly the weighted sum of what the others add, at the sum of their costs.

    Args:
        adapters: Configuration and tensors of each; `layers_to_transform` as indices.
        weights: One for each. For "linear" they must add up to 1.
        combination_type: "linear", "ties", "dare_linear" or "cat".
        density: The share of each matrix that "ties" and "dare_linear" keep, from 0 to 1.
        majority_sign_method: "total" or "frequency", of "ties".
        force: Average adapters that are not known to be of one lineage all the same.

    Returns:
        Configuration and tensors of the new adapter.

    Raises:
        ValueError: The adapters cannot be combined this way.
    """
    _check_given(adapters, weights, combination_type)
    if combination_type == "cat":
        return _finite(*_side_by_side(adapters, weights))
    configs = [config for config, _ in adapters]
    check_alike(configs)
    lineages = [config.lineage for config in configs]
    if not force and (None in lineages or len(set(lineages)) > 1):
        raise ValueError(
            "The adapters are not known to have started from the same initial weights (lineage: "
            f"{quoted(lineages)}), so that "
            'the same number means something else in each. Use combination_type="cat", which adds up what they do, '
            "or force=True."
        )
    _check_weights(weights, combination_type, density)
    combined = {}
    for key, first in adapters[0][1].items():
        shapes = {tuple(tensors[key].shape) for _, tensors in adapters}
        if len(shapes) > 1:
            raise ValueError(f"{key} has different shapes in the adapters, {quoted(sorted(shapes))}.")
        stacked = [tensors[key].float() for _, tensors in adapters]
        kind = "linear" if first.dim() < 2 else combination_type
        combined[key] = _merged(stacked, weights, kind, density or 0.0, majority_sign_method).to(first.dtype)
    config = _derived(configs, branches=configs[0].branches)
    config.lineage = lineages[0] if len(set(lineages)) == 1 else None
    return _finite(config, combined)


def _check_given(
    adapters: Sequence[tuple[PVMConfig, Tensors]], weights: Sequence[float], combination_type: CombinationType
) -> None:
    """Check what every way of combining adapters needs."""
    if combination_type not in get_args(CombinationType):
        raise ValueError(
            f"combination_type is {quoted(combination_type)}, but must be one of {get_args(CombinationType)}."
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"There are {len(adapters)} adapters and {len(weights)} weights; each adapter needs one.")
    if wrong := [weight for weight in weights if not is_number(weight)]:
        raise ValueError(f"The weights {quoted(wrong)} are not numbers from -{LARGEST} to {LARGEST}.")
    for config, tensors in adapters:
        others = config.modules_to_save or [key for key in tensors if not WEIGHT.search(key)]
        if others:
            raise ValueError(f"An adapter that also holds modules of the base ({quoted(others)}) cannot be combined.")
    widths = sorted(
        {tensor.shape[1] for _, tensors in adapters for key, tensor in tensors.items() if ".pvm_text_reducer" in key}
    )
    if len(widths) > 1:
        raise ValueError(f"The adapters are of base models of different widths, {widths}. Merge adapters of one base.")


def _check_weights(weights: Sequence[float], combination_type: CombinationType, density: float | None) -> None:
    """Check the numbers given to a way of combining other than "cat"."""
    if combination_type == "linear" and abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"The weights {quoted(list(weights))} add up to {sum(weights):g}, but must add up to 1, because they "
            'average. To scale what the adapters add, use combination_type="cat".'
        )
    if combination_type != "linear" and (density is None or not 0 <= density <= 1):
        raise ValueError(f"density is {quoted(density)}, but {combination_type!r} needs one from 0 to 1.")
    if sum(weights) == 0:
        raise ValueError(f"The weights {quoted(list(weights))} add up to 0.")


def _merged(
    tensors: list[torch.Tensor],
    weights: Sequence[float],
    combination_type: str,
    density: float,
    majority_sign_method: Literal["total", "frequency"],
) -> torch.Tensor:
    """One tensor made from those of all adapters."""
    if combination_type == "linear":
        total = sum(weights)
        return torch.stack([weight / total * tensor for weight, tensor in zip(weights, tensors)]).sum(0)
    scales = torch.tensor(list(weights), dtype=torch.float32)
    if combination_type == "ties":
        return ties(tensors, scales, density, majority_sign_method)
    return dare_linear(tensors, scales, density)


def _finite(config: PVMConfig, tensors: Tensors) -> tuple[PVMConfig, Tensors]:
    if problems := flaws(tensors.items()):
        raise ValueError(
            f"An adapter combined from these adapters and weights could not be loaded: {listed(problems)}"
        )
    return config, tensors


def check_alike(configs: Sequence[PVMConfig]) -> None:
    """Check that each weight has the same place in all adapters.

    Raises:
        ValueError: They differ in a field that decides it.
    """
    for field in (*BRANCH_FIELDS, "branches"):
        values = [getattr(config, field) for config in configs]
        if any(value != values[0] for value in values):
            raise ValueError(f"The adapters differ in {field}: {quoted(values)}.")


def _side_by_side(
    adapters: Sequence[tuple[PVMConfig, Tensors]], weights: Sequence[float]
) -> tuple[PVMConfig, Tensors]:
    branches: list[dict[str, Any]] = []
    combined: Tensors = {}
    for (config, tensors), weight in zip(adapters, weights):
        for key, tensor in tensors.items():
            if match := WEIGHT.search(key):
                name, number = match.group(1), int(match.group(2) or 0)
                new_key = f"{key[: match.start()]}.pvm.{weight_name(name, len(branches) + number)}.weight"
                combined[new_key] = tensor * weight if name == "gate" else tensor.clone()
        branches += [{field: getattr(part, field) for field in BRANCH_FIELDS} for part in config.parts()]
    return _derived([config for config, _ in adapters], branches), combined


def _derived(configs: Sequence[PVMConfig], branches: list[dict[str, Any]] | None) -> PVMConfig:
    derived = dataclasses.replace(configs[0], lineage=None, branches=branches)
    derived.target_modules = ()
    setattr(derived, NOTED, of_all(configs))
    return derived

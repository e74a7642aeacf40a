"""Adapters that were trained together: noted when one is saved, asked for when one is loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME
from torch import nn

from ..folders.adapter_file import PEFT_PREFIX, SOURCE, AdapterFile
from ..folders.companions import NOTED, Companion, fields_of, hash_of, method_of
from ..utils.text import listed, plain, quoted
from ..utils.wrapping import plain_name
from .active import acting_adapters, base_of
from .layers import tensors_of_others
from .names import FORM


def trained_with(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> tuple[Companion, ...]:
    """The adapters that belong to one that is about to be saved.

    Args:
        model: The model; wrapped by PEFT or not.
        adapter_name: The adapter's name.
        state_dict: The model's tensors; `None`: as they are on the model.

    Returns:
        Of an adapter that learns here, those that act beside it. Of one that was loaded to be used, those that its
        file spoke of.
    """
    attached: Any = model
    config = attached.peft_config[adapter_name]
    acting = acting_adapters(base_of(model))
    if config.inference_mode or adapter_name not in acting:
        return vars(config).get(NOTED, ())
    return tuple(_as_companion(model, name, state_dict) for name in acting if name != adapter_name)


def warn_of_missing(model: nn.Module, loaded: Mapping[str, AdapterFile]) -> None:
    """Warn if an adapter was loaded without those that it was trained together with, or beside others.

    Args:
        model: The model; wrapped by PEFT or not.
        loaded: The files of the adapters that were just loaded, by name.
    """
    attached: Any = model
    acting = acting_adapters(base_of(model))
    for adapter_name, file in loaded.items():
        try:
            companions = file.companions()
        except ValueError as error:
            warnings.warn(f"{error} The adapter was loaded without it.", stacklevel=3)
            continue
        vars(attached.peft_config[adapter_name])[NOTED] = companions
        others = [_as_companion(model, name) for name in acting if name != adapter_name] if companions else []
        if faults := list(filter(None, (_fault(companion, others) for companion in companions))):
            sources = [*(_source_of(companion, file) for companion in companions), file.folder]
            warnings.warn(
                f"The adapter {plain(file.folder, 200)} was trained together with {'; and with '.join(faults)}. So it "
                "computes something else than in its training. To load what belongs together, use "
                f"peft_pvm.load_adapters(model, {plain(sources)}) on the base model.",
                stacklevel=3,
            )


def _fault(companion: Companion, others: Collection[Companion]) -> str | None:
    """What is wrong about a companion, if no other adapter on the model is the same."""
    alike = [(companion.differences(other), other) for other in others if other.method == companion.method]
    if not alike:
        return f"{companion}, which does not act on this model"
    differences, other = min(alike, key=lambda pair: len(pair[0]))
    if not differences:
        return None
    return f"{companion}, but {quoted(other.name)} on this model has {listed(differences, ', ')}"


def _source_of(companion: Companion, file: AdapterFile) -> str:
    """Where a companion is, if it was saved next to the adapter."""
    folder = Path(file.folder)
    inside = folder.parent if companion.name == "default" else folder / companion.name
    for place in (inside, folder.parent / companion.name) if FORM.fullmatch(companion.name) else ():
        if place != folder and (place / CONFIG_NAME).is_file():
            return str(place)
    return f"<the folder of {companion.name}>"


def _as_companion(model: Any, name: str, state_dict: Mapping[str, torch.Tensor] | None = None) -> Companion:
    config = model.peft_config[name]
    source = vars(config).get(SOURCE)
    file = source.at_hand() if source is not None and config.inference_mode else None
    marker = f".{PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)}"
    weights = {}
    others = tensors_of_others(model, name)
    for key, tensor in (model.state_dict() if state_dict is None else state_dict).items():
        if plain_name(key) in others:
            continue
        before, _, after = f"{plain_name(key)}.".rpartition(f".{name}.")  # PEFT puts the name after the weight's
        own = f"{before}.{after}".removesuffix(".").removesuffix(".weight")
        if marker in own:
            weights[own.removeprefix(PEFT_PREFIX)] = tensor
    if file is not None:  # its numbers on the model may be rounded to the model's dtype
        saved = {
            key.removesuffix(".weight").removeprefix(PEFT_PREFIX): tensor
            for key, tensor in AdapterFile(os.path.dirname(file)).read()
        }
        if not any(_was_swapped(tensor, saved.get(key)) for key, tensor in weights.items()):
            weights = {key: saved[key] for key in weights}
    return Companion(name, method_of(config), fields_of(config), hash_of(weights) if weights else None)


def _was_swapped(tensor: torch.Tensor, saved: torch.Tensor | None) -> bool:
    """Whether a weight on a model is no longer what was loaded. Not if it is out of reach, sharded or offloaded."""
    if saved is None:
        return True
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.shape != saved.shape:
        return False
    return not torch.equal(tensor, saved.to(tensor))

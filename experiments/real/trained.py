"""What was trained for the real base as one file of a few MB, and the base made from it and the language model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import LlavaForConditionalGeneration

from peft_pvm.folders.data_file import holding
from peft_pvm.folders.replacing import write_file

from .language_model import LanguageModel
from .training import RealRecipe, lora_config, round_parameters
from .vlm import new_vlm


# One entry, since safetensors writes several in any order: the same training gives the same file.
NOTE = "real_base"
VISION = ("model.vision_tower.", "model.multi_modal_projector.")


def save_trained(model: PeftModel, language_model: LanguageModel, recipe: RealRecipe, path: str | os.PathLike) -> None:
    """Write vision tower, projector and LoRA in bf16, with the fingerprint of the language model that they fit.

    Args:
        model: What `train_real_base` returned.
        language_model: What it was trained on.
        recipe: How, for the reader.
        path: The file.
    """
    tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in _trained_tensors(model).items()}
    note = {"language model": language_model.fingerprint, "recipe": asdict(recipe)}
    write_file(path, save(tensors, metadata={NOTE: json.dumps(note)}))


def build_base(language_model: LanguageModel, path: str | os.PathLike) -> LlavaForConditionalGeneration:
    """Make the base: the language model after the trained tower and projector, the LoRA merged into it.

    Args:
        language_model: It stays as it is.
        path: A file that `save_trained` wrote.

    Returns:
        The base in bf16, in eval mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It was trained on another language model, or is damaged.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {path}. Train it first: python -m experiments train-real-base")
    with holding(path, "what save_trained writes"):
        with safe_open(path, framework="pt") as file:
            fits = json.loads((file.metadata() or {})[NOTE])["language model"]
        tensors = load_file(path)
    if fits != language_model.fingerprint:
        raise ValueError(
            f"{path} was trained on the language model {fits}, but this one is {language_model.fingerprint}. "
            "Take the language model that it was trained on, or train again: python -m experiments train-real-base"
        )
    vlm = new_vlm(language_model)
    model = get_peft_model(vlm, lora_config(), autocast_adapter_dtype=False)
    expected = {name: tensor.shape for name, tensor in _trained_tensors(model).items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{path} does not hold the tensors of the real base. It may be damaged: train it again.")
    seen = {name: tensors.pop(name) for name in list(tensors) if name.startswith(VISION)}
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if name in seen:
                parameter.copy_(seen[name])
    set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in tensors.items()})
    base = model.merge_and_unload()
    round_parameters(base)
    return base.eval()


def _trained_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    vlm = model.get_base_model()
    seen = {name: parameter.detach() for name, parameter in vlm.named_parameters() if name.startswith(VISION)}
    return {**seen, **get_peft_model_state_dict(model)}

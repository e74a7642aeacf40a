"""The model card of a saved adapter."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig


if TYPE_CHECKING:
    from .steering import SteeringConfig


PEFT_TEMPLATE = "# Model Card for Model ID"  # the heading of the card that PEFT leaves to be filled in
MARK = "<!-- Written by peft-pvm, again at every save. Delete this line to keep your changes. -->"


def write_card(config: SteeringConfig, folder: str | os.PathLike) -> None:
    """Write README.md for an adapter without parameters, unless somebody has written one.

    Args:
        config: The adapter's configuration.
        folder: Where the adapter is saved.
    """
    path = os.path.join(folder, "README.md")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            card = file.read()
        if PEFT_TEMPLATE not in card and MARK not in card:
            return
    ModelCard(card_text(config)).save(path)


def card_text(config: SteeringConfig) -> str:
    """The card: what the Hub reads, how to load the adapter, its configuration."""
    base = config.base_model_name_or_path
    tags = ["peft-pvm", config.method, *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(library_name="peft", base_model=base or None, tags=tags)
    common = {field.name for field in dataclasses.fields(PeftConfig)} | {"init_weights"}
    rows = [
        f"| `{field.name}` | `{getattr(config, field.name)}` |"
        for field in dataclasses.fields(config)
        if field.name not in common
    ]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        MARK,
        "",
        f"# {config.title}",
        "",
        config.summary,
        "",
        f"It has no parameters. Source: [arXiv {config.paper}](https://arxiv.org/abs/{config.paper}).",
        "",
        "```python",
        "import peft_pvm  # registers the method with PEFT",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(model, "this folder or its Hub id")',
        "```",
        "",
        "| Field | Value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)

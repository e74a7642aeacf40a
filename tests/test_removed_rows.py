"""A model whose row in a table of the package is missing is refused, and not wrong in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from forwards import logits
from methods_under_test import METHODS
from tiny_vlms import TinyVLM

from peft_pvm.tokens.blocks import BLOCKS
from peft_pvm.tokens.families import ATTENTION_NAMES, FAMILIES, ROTARY_NAMES, ROTATES


ROWS = [
    *((BLOCKS, row, "pvm") for row in BLOCKS),
    *((ROTATES, row, "dipe") for row in ROTATES),
    *((ROTARY_NAMES, row, "dipe") for row in ROTARY_NAMES),
    *((ATTENTION_NAMES, row, "tdrs") for row in ATTENTION_NAMES),
    *((FAMILIES, row, "tdrs") for row in FAMILIES),
]


@pytest.mark.filterwarnings("ignore:This prompt has placeholder tokens")
@pytest.mark.parametrize(("table", "row", "method"), ROWS, ids=[f"{method}-{row}" for _, row, method in ROWS])
def test_a_missing_row_is_noticed(table: dict[str, Any], row: str, method: str, monkeypatch: pytest.MonkeyPatch):
    """When the adapter is attached, or in the first forward. A form that does not need the row computes the same."""
    forms = [one.tiny for one in ARCHITECTURES.values() if one.tiny.is_there and row in types_of(one.tiny.config())]
    if not forms:
        pytest.skip("this transformers has no such type")
    prompt = "t4 v t3" if table is FAMILIES and forms[0].video else "t4 i t3 i t6"
    expected = [computed(tiny, method, prompt) for tiny in forms]
    monkeypatch.delitem(table, row)
    missing = [computed(tiny, method, prompt) for tiny in forms]
    assert None in missing
    assert all(now is None or torch.equal(now, before) for now, before in zip(missing, expected))


def computed(tiny: TinyVLM, method: str, prompt: str) -> torch.Tensor | None:
    """The logits with a method; `None` where it is refused."""
    model = tiny.build()
    try:
        return logits(METHODS[method].attach(model), tiny.inputs(model, prompt))
    except (ValueError, NotImplementedError):
        return None


def types_of(config: Any) -> set[str]:
    return {config.model_type, config.get_text_config().model_type}

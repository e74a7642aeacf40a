"""Adapter folders that earlier code saved load as they are, give the outputs they gave, and are saved alike.

`python tests/test_saved_before.py --write` wrote tests/data/saved/ with the code of commit 7a97acf. The adapters of
users look like that, so a failing test is no reason to write the folders again. The weights of the tiny model are not
stored: transformers 5.16.1 and 5.24.0 build it equal to the bit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import environment  # noqa: F401  # its settings act before PEFT is imported
import pytest
import torch
from forwards import PROMPTS, TOLERANCE, difference, logits
from methods_under_test import METHODS
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES
from transformers import PreTrainedModel


SAVED = Path(__file__).parent / "data" / "saved"
FAMILY = FAMILIES["qwen3_vl"]  # it has what can go wrong: mRoPE, DeepStack, grouped heads
CASES = {"pvm": dict(r=16, layers_to_transform=[0, 2]), "dipe": dict(layers_to_transform=[0, 1]), "tdrs": {}}
LOGITS = "logits.safetensors"
LAST = 4  # positions whose logits are stored


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """The last logits of a batch with padding and a row of text alone, `(batch, LAST, vocab_size)`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return logits(model, FAMILY.inputs(base, *PROMPTS))[:, -LAST:].contiguous()


def own_fields(folder: Path) -> dict[str, object]:
    """What the folder's configuration says of the method. PEFT's own fields differ between its versions."""
    of_peft = {field.name for field in fields(PeftConfig)} - {"peft_type"}
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: value for name, value in config.items() if name not in of_peft}


def write() -> None:
    for name, settings in CASES.items():
        torch.manual_seed(0)  # the lineage is of the weights as they are before `give_weight`
        model = METHODS[name].attach(FAMILY.build(), **settings)
        model.save_pretrained(SAVED / name)
        save_file({"logits": outputs(model)}, SAVED / name / LOGITS)


@pytest.fixture(params=CASES)
def folder(request) -> Path:
    return SAVED / request.param


@pytest.fixture
def base() -> PreTrainedModel:
    return FAMILY.build()


def test_it_gives_the_outputs_it_gave(folder: Path, base: PreTrainedModel):
    expected = load_file(folder / LOGITS)["logits"]
    assert difference(outputs(base), expected) > 1e-3, "the adapter would change nothing"
    assert difference(outputs(PeftModel.from_pretrained(base, folder).eval()), expected) < TOLERANCE


def test_it_is_saved_as_it_was(folder: Path, base: PreTrainedModel, tmp_path: Path):
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path)
    saved, before = own_fields(tmp_path), own_fields(folder)
    assert {name: saved[name] for name in before} == before  # fields that are new since have defaults
    old, new = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="Write tests/data/saved/ again.")
    parser.parse_args()
    write()

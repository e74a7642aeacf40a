"""The model card that is saved with an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, PVMConfig
from peft_pvm.cards import card_text


RESULTS = [
    {"dataset": "MathVerse (mini)", "metric": "accuracy", "value": 0.63, "base": 0.594},
    {"dataset": "POPE", "metric": "F1", "value": 0.8},
]


def save(config: PVMConfig | DIPEConfig, folder: Path, base: str = "") -> ModelCard:
    model = FAMILIES["llava"].build()
    model.name_or_path = base
    get_peft_model(model, config).save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_what_the_hub_reads(tmp_path: Path):
    card = save(PVMConfig(r=32), tmp_path, base="someone/some-vlm")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == "someone/some-vlm"
    assert card.data.tags == ["peft-pvm", "pvm", "base_model:adapter:someone/some-vlm"]


def test_what_a_person_reads(tmp_path: Path):
    text = save(PVMConfig(r=32), tmp_path, base="someone/some-vlm").text
    assert "# PVM: Persistent Visual Memory" in text
    assert "arxiv.org/abs/2605.00814" in text
    assert "| `r` | `32` | Width of the branch" in text
    assert "| `layers_to_transform` | `[1, 2]` |" in text
    assert "no parameters" not in text
    code = text.split("```python")[1].split("```")[0].strip().splitlines()
    assert [line for line in code if line] == [
        "import peft_pvm  # registers the method with PEFT",
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText",
        'model = AutoModelForImageTextToText.from_pretrained("someone/some-vlm")',
        'model = PeftModel.from_pretrained(model, "this folder or its Hub id")',
    ]


def test_a_base_that_only_this_disk_has_is_not_loaded_from_the_hub(tmp_path: Path):
    assert "AutoModel" not in save(PVMConfig(r=32), tmp_path, base=str(tmp_path)).text
    assert "It has no parameters" in save(DIPEConfig(), tmp_path / "other").text


def test_results_come_from_their_file(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    card = save(PVMConfig(r=32), tmp_path)
    assert "| MathVerse (mini) | accuracy | 0.594 | 0.63 |" in card.text
    assert "| POPE | F1 |  | 0.8 |" in card.text
    found = [(result.dataset_name, result.metric_name, result.metric_value) for result in card.data.eval_results]
    assert found == [("MathVerse (mini)", "accuracy", 0.63), ("POPE", "F1", 0.8)]
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"dataset": "POPE", "value": 1}]'])
def test_results_of_another_kind_are_refused(tmp_path: Path, content: str):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json (is not JSON|must hold a list)"):
        save(PVMConfig(r=32), tmp_path)


def test_the_same_bytes_from_the_same_adapter():
    assert card_text(PVMConfig(r=32), RESULTS) == card_text(PVMConfig(r=32), RESULTS)

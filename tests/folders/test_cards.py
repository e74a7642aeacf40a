"""The model card that is saved with an adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, LogBiasConfig, PVMConfig, add_adapters
from peft_pvm.folders.adapter_file import read_config
from peft_pvm.folders.companions import Companion
from peft_pvm.folders.writing import card_text, write_card
from peft_pvm.utils.text import LONGEST, plain


RESULTS = [
    {"dataset": "MathVerse (mini)", "metric": "accuracy", "value": 0.63, "base": 0.594},
    {"dataset": "POPE", "metric": "F1", "value": 0.8},
]


def save(config: PeftConfig, folder: Path, base: str = "") -> ModelCard:
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
    assert "It has no parameters" in save(DIPEConfig(max_distance=0), tmp_path / "other").text


def test_a_method_without_a_paper_names_none(tmp_path: Path):
    text = save(LogBiasConfig(), tmp_path).text
    assert "unpublished" in text
    assert "It has no parameters.\n" in text
    assert "arxiv.org" not in text


def test_results_come_from_their_file(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    card = save(PVMConfig(r=32), tmp_path)
    assert "| MathVerse (mini) | accuracy | 0.594 | 0.63 |" in card.text
    assert "| POPE | F1 |  | 0.8 |" in card.text
    found = [(result.dataset_name, result.metric_name, result.metric_value) for result in card.data.eval_results]
    assert found == [("MathVerse (mini)", "accuracy", 0.63), ("POPE", "F1", 0.8)]
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[1]",
        '[{"dataset": "POPE", "value": 1}]',
        '[{"dataset": ["POPE"], "metric": "F1", "value": 1}]',
        '[{"dataset": " ", "metric": "F1", "value": 1}]',
        '[{"dataset": "POPE", "metric": "F1", "value": NaN}]',
        '[{"dataset": "POPE", "metric": "F1", "value": "<b>1</b>"}]',
        '[{"dataset": "POPE", "metric": "F1", "value": true}]',
        f'[{{"dataset": "POPE", "metric": "F1", "value": {10**400}}}]',
        f'[{{"dataset": "{"P" * 10**6}", "metric": "F1", "value": 1}}]',
        "[" * 10**5 + "]" * 10**5,
        " " * 9 * 2**20,
    ],
    ids=lambda content: content[:60],
)
def test_results_of_another_kind_are_refused(tmp_path: Path, content: str):
    """Not when an adapter is saved: that is worth more than its card."""
    (tmp_path / "results.json").write_text(content)
    with pytest.warns(UserWarning, match=r"written without results: results\.json"):
        card = save(PVMConfig(r=32), tmp_path)
    assert not card.data.eval_results
    assert (tmp_path / "results.json").read_text() == content
    said = r"results\.json (is damaged or not JSON|must hold a list|is longer than)"
    with pytest.raises(ValueError, match=said) as refusal:
        write_card(read_config(tmp_path), tmp_path)
    assert len(str(refusal.value)) <= LONGEST


def test_what_is_no_text_stays_and_hinders_nothing(tmp_path: Path):
    """Files and folders of the names of a card and of results, here and below."""
    for folder in (tmp_path, tmp_path / "below"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "results.json").mkdir()
    (tmp_path / "below" / "results.json").symlink_to("nowhere")
    model = get_peft_model(FAMILIES["llava"].build(), PVMConfig(r=32))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (tmp_path / "below" / "README.md").read_bytes() == b"\xff\xfe"
    PeftModel.from_pretrained(FAMILIES["llava"].build(), tmp_path)


HOSTILE = {
    "HTML": "<script>alert(1)</script>",
    "a link": "[x](javascript:alert(1))",
    "a table": "a | b |\n| c",
    "code": "a ` b `` c ``` d",
    "front matter": "x\n---\n# A heading",
    "YAML": "{a: *b, !!python/object:c",
    "a terminal": "\x1b[2J\x1b]0;title\x07",
    "direction": "abc\u202edef",
    "a backslash": "a\\",
    "a surrogate": "a\ud800",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_names_are_only_text_in_a_card(case: str):
    hostile = HOSTILE[case]
    config = PVMConfig(r=32)
    config.base_model_name_or_path = hostile
    config.modules_to_save = [hostile]
    results = [{"dataset": hostile, "metric": hostile, "value": 0.5, "base": 0.25}]
    companion = Companion(hostile, hostile, {hostile: hostile}, None)
    text = card_text(config, results, [companion, dataclasses.replace(companion, weights=hostile)])
    card = ModelCard(text)
    assert text.encode().decode().isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}
    assert card.data.base_model == plain(hostile)
    assert card.data.eval_results[0].dataset_name == plain(hostile)
    assert card.data.eval_results[0].dataset_type
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    kinds = [child.type for token in tokens for child in token.children or ()]
    assert not [kind for kind in kinds if kind in ("link_open", "image", "em_open", "strong_open")][1:], "one is ours"
    html = [child.content for token in tokens for child in token.children or () if child.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}
    assert [token.content for token in tokens if token.type == "heading_open"] == [""]
    rows = "".join(token.type for token in tokens).split("tr_close")
    cells = [row.count("td_open") for row in rows]
    assert set(cells) <= {0, 3, 4}
    assert cells.count(4) == 1


def test_what_was_trained_together(tmp_path: Path):
    """Also in the card of a LoRA, which PEFT leaves to be filled in. A card that a person wrote stays."""
    model = FAMILIES["llava"].build()
    model.name_or_path = "someone/some-vlm"
    add_adapters(model, {"dipe": DIPEConfig(max_distance=7)})
    model = PeftModel(model, LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert "# LORA adapter" in card.text
    assert "| `dipe` | DIPE | `max_distance=7, " in card.text
    assert "load_adapters(model, ['the folder or Hub id of dipe', 'this folder or its Hub id'])" in card.text
    assert card.data.tags == ["peft-pvm", "lora", "base_model:adapter:someone/some-vlm"]
    of_dipe = (tmp_path / "dipe" / "README.md").read_text()
    assert "| `lora` | LORA | `weights " in of_dipe
    assert "| `max_distance` | `7` |" in of_dipe
    write_card(read_config(tmp_path / "dipe"), tmp_path / "dipe")
    assert (tmp_path / "dipe" / "README.md").read_text() == of_dipe
    (tmp_path / "lora" / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "lora" / "README.md").read_text() == "# Mine\n"


def test_names_in_any_script_keep_their_letters():
    results = [
        {"dataset": "数学 验证", "metric": "точность", "value": 1},
        {"dataset": "!?", "metric": "F1", "value": 2},
    ]
    found = ModelCard(card_text(PVMConfig(r=32), results)).data.eval_results
    assert [result.dataset_type for result in found] == ["数学-验证", "unnamed"]
    assert found[0].metric_type == "точность"
    assert found[0].dataset_name == "数学 验证"


def test_the_same_bytes_from_the_same_adapter():
    assert card_text(PVMConfig(r=32), RESULTS) == card_text(PVMConfig(r=32), RESULTS)

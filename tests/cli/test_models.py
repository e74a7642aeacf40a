"""peft-pvm models, and peft-pvm inspect of a base model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as T
from architectures import ARCHITECTURES
from commands import run
from tiny_vlms import FAMILIES

from peft_pvm.cli.work.models import NOT_TRIED, architectures
from peft_pvm.methods import METHODS


def test_all_models_are_shown():
    output = run("models")
    assert all(row["type"] in output for row in architectures())
    assert json.loads(run("models", "--json")) == architectures()


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("gemma3", ["gemma3"]),
        ("paligemma", ["paligemma", "paligemma"]),
        ("Gemma-3", ["gemma3"]),
        ("qwen3 vl", ["qwen3_vl", "qwen3_vl_moe"]),
        ("llama 3.2", ["mllama"]),
    ],
)
def test_models_are_found_by_type_and_by_name(name: str, types: list[str]):
    found = [row["type"] for row in json.loads(run("models", name, "--json"))]
    assert set(types) <= set(found)
    assert len(found) < len(architectures()) / 2
    if name in types:
        assert found == types, "other types contain its name"


@pytest.mark.parametrize(("name", "near"), [("Qwen3-LV", "Near to it: Qwen3-VL"), ("nothing like it", ""), ("-", "")])
def test_an_unknown_model_is_named(name: str, near: str):
    output = run("models", "--", name, fails=True)
    assert f"has the type {name!r}" in output
    assert near in output


def saved(config: T.PreTrainedConfig, folder: Path, **fields: str) -> Path:
    """A folder of a model without weights: nothing else is read."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def said(base: Path) -> dict[str, str]:
    return json.loads(run("inspect", "--base", base, "--json"))["methods"]


def test_what_works_on_a_base_model(tmp_path: Path):
    base = saved(FAMILIES["gemma3"].config(), tmp_path)
    assert said(base) == {method.config.method: "works" for method in METHODS}
    output = run("inspect", "--base", base)
    assert "gemma3 (Gemma 3)" in output
    assert "PVM, DIPE, T-DRS" in output


def test_what_only_a_forward_shows_is_in_the_table_of_the_tests(tmp_path: Path):
    found = said(saved(ARCHITECTURES["hunyuan_vl"].tiny.config(), tmp_path))
    assert found["pvm"] == "works"
    assert found["dipe"] == "refused: changes queries or keys after their rotation"


def test_what_is_found_on_the_model_itself_comes_first(tmp_path: Path):
    config = FAMILIES["llava"].config()
    config.text_config = T.Olmo2Config(**config.text_config.to_dict())
    found = said(saved(config, tmp_path))
    assert found["pvm"].startswith("refused: Nothing can be put beside the FFNs of LlavaForConditionalGeneration")
    assert found["dipe"] == "works"


def test_a_base_model_on_which_nothing_works(tmp_path: Path):
    base = saved(ARCHITECTURES["mllama"].tiny.config(), tmp_path)
    (reason,) = set(said(base).values())
    assert reason.startswith("refused: MllamaForConditionalGeneration (model_type 'mllama') looks at images by cross-")
    assert "PVM, DIPE, T-DRS, VAF, Log-bias" in run("inspect", "--base", base)


def test_a_type_that_is_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = saved(FAMILIES["llava"].config(), tmp_path)
    monkeypatch.setattr("peft_pvm.cli.work.models.architectures", list)
    assert set(said(base).values()) == {NOT_TRIED}
    assert "llava, which is not tested" in run("inspect", "--base", base)


def test_the_table_of_methods_says_what_each_changes_and_costs():
    wide, narrow = (run("methods", columns=columns) for columns in (300, 80))
    for method in METHODS:
        assert f"{method.changes}: {method.does}"[:40] in wide
        assert method.kernels[:20] in wide
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow


def test_no_model_with_images(tmp_path: Path):
    base = saved(T.LlamaConfig(), tmp_path)
    assert "must be a model that reads images" in run("inspect", "--base", base, fails=True)
    assert "Give an adapter, or a base model with --base" in run("inspect", fails=True)

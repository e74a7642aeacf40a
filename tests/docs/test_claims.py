"""What the pages say is tested is tested: each test that they name is there; what no other test holds is held here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fuzz.test_fuzz import FOLDERS
from methods_under_test import METHODS
from pages import REPOSITORY
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_vlms import FAMILIES, REPRESENTATIVE
from transformers import AutoModelForImageTextToText

from peft_pvm import DIPEConfig, TDRSConfig
from peft_pvm.folders.companions import fields_of
from peft_pvm.methods import METHODS as ALL_METHODS


PAGES = [
    REPOSITORY / "Makefile",
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "examples").rglob("*.yaml")),
]
CODE = ("peft_pvm", "experiments", "examples")
SOURCES = [path for folder in CODE for path in sorted((REPOSITORY / folder).rglob("*.py"))]
TESTS = {path: path.read_text() for path in (REPOSITORY / "tests").rglob("*.py")}
FUNCTIONS = {name for text in TESTS.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_test_that_is_named_is_there(page: Path):
    text = page.read_text()
    files = set(re.findall(r"\btests/[\w/]+(?:\.py)?", text))
    assert {name for name in files if not (REPOSITORY / name).exists()} == set()
    functions = set(re.findall(r"\btest_\w+", text)) - {path.stem for path in TESTS}
    assert functions <= FUNCTIONS


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "docs/how-to/new-method.md"])
def test_each_file_that_is_named_is_there(page: str):
    quoted = re.findall(r"`([\w./]+/[\w./]*)`", (REPOSITORY / page).read_text())
    named = {name for name in quoted if "my" not in name}  # what a reader is going to write
    roots = [REPOSITORY, REPOSITORY / "peft_pvm"]
    assert {name for name in named if not any((root / name).exists() for root in roots)} == set()


def test_pages_of_methods_have_one_order_of_sections():
    """As CONTRIBUTING.md lists it."""
    text = " ".join((REPOSITORY / "CONTRIBUTING.md").read_text().split())
    sections = re.findall(r'"(.+?)"', re.search(r"its sections are (.+?)\. ", text)[1])
    assert len(sections) == 7
    for page in (REPOSITORY / "docs" / "methods").glob("*.md"):
        assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == sections, page.name


def test_adapters_that_ship_have_the_defaults_of_their_methods():
    """Those without weights. Defaults that were chosen for one model, or that a model must give, have no folder."""
    folders = {path.parent for path in (REPOSITORY / "adapters").glob("*/adapter_config.json")}
    shipped = {folder.name: PeftConfig.from_pretrained(folder) for folder in folders}
    del shipped["pvm-tiny-vlm"]
    limited, published = shipped.pop("dipe-limited"), shipped.pop("dipe")
    assert fields_of(limited) == fields_of(DIPEConfig())
    assert fields_of(published) == fields_of(DIPEConfig(max_distance=0))
    for config in shipped.values():
        assert fields_of(config) == fields_of(type(config)()), config
    methods = {method.config.method for method in ALL_METHODS} - {"pvm", "dipe"}
    assert methods - {config.method for config in shipped.values()} == {"cai", "savaa", "var"}


def said(page: str, pattern: str) -> list[int]:
    """The numbers that a page gives, by a pattern with one group."""
    return [int(number.replace(",", "")) for number in re.findall(pattern, (REPOSITORY / page).read_text())]


def test_the_number_of_damaged_folders():
    assert said("docs/how-to/share.md", r"([\d,]+) damaged folders") == [FOLDERS * len(REPRESENTATIVE)]


def test_the_number_of_families():
    model_types = {tiny.config().model_type for tiny in FAMILIES.values()}
    assert said("CHANGELOG.md", r"for (\d+) families") == [len(model_types)]


@pytest.mark.parametrize("config", [DIPEConfig, TDRSConfig])
def test_methods_without_parameters_have_no_modules_to_save(config: type):
    """docs/peft.md, the row of `modules_to_save`."""
    with pytest.raises(TypeError, match="modules_to_save"):
        config(modules_to_save=["lm_head"])


def test_other_settings_are_not_loaded_under_a_name_that_is_taken(tmp_path: Path):
    """docs/methods/dipe.md and t-drs.md: PEFT would load weights alone."""
    for name in ("dipe", "tdrs"):
        METHODS[name].attach(FAMILIES["llava"].build(), layers_to_transform=[0]).save_pretrained(tmp_path / name)
        model = METHODS[name].attach(FAMILIES["llava"].build())
        with pytest.raises(ValueError, match="was saved with layers_to_transform"):
            model.load_adapter(str(tmp_path / name), "default")
        assert model.peft_config["default"].layers_to_transform is None


@pytest.mark.parametrize("method", ["pvm", "lora"])
def test_peft_does_not_load_onto_a_base_that_comes_with_layers_on_the_disk(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """docs/peft.md, the notes. If this fails, PEFT has learned it and the note can go."""
    monkeypatch.chdir(tmp_path)  # to which PEFT writes
    tiny = FAMILIES["qwen3_vl"]
    config = LoraConfig(target_modules=["q_proj"]) if method == "lora" else METHODS[method].config()
    get_peft_model(tiny.build(), config).save_pretrained(tmp_path / "adapter")
    model = tiny.build()
    model.save_pretrained(tmp_path / "base")
    leaves = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    device_map = {name: "disk" if ".language_model.layers.1." in name else "cpu" for name in leaves}
    base = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises((KeyError, NotImplementedError), match=r"lm_head|Cannot copy out of meta tensor"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")

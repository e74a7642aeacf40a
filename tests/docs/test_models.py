"""docs/models.md and the file that `peft-pvm models` reads say what the table of architectures says."""

from __future__ import annotations

import pytest
import transformers
from architectures import ARCHITECTURES, page, type_of


of_the_newest = pytest.mark.skipif(transformers.__version__ != page.NEWEST, reason="made with the newest transformers")


@of_the_newest
def test_the_file_of_the_package_is_what_the_table_says():
    assert page.as_json() == page.JSON.read_text(), "run `make generate`"


@of_the_newest
def test_the_page_is_what_the_table_says():
    written = page.PAGE.read_text()
    assert page.with_tables(written) == written, "run `make generate`"
    assert "| Qwen3-VL | `qwen3_vl` | yes | yes | yes | yes | sdpa, flash | yes |" in written
    assert written.index("| Llama 3.2 Vision | `mllama` |") > written.index("No method works on these")


@pytest.mark.parametrize("written", page.PAGES_WITH_METHODS)
def test_the_tables_of_methods_are_those_of_the_package(written: str):
    text = (page.REPOSITORY / written).read_text()
    assert page.with_methods(written) == text, "run `make generate`"
    assert "| **VAF** | in the text after the image, scores of visual keys are raised |" in text


def test_no_refusal_is_left_out():
    """The page does not show forms without a name of their own."""
    for name, row in ARCHITECTURES.items():
        if not row.known_as:
            assert row.refused == ARCHITECTURES[type_of(name)].refused, f"{name} needs a name for docs/models.md"

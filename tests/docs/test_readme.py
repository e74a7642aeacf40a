"""The README's tables, and the links of all pages and cards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import peft_pvm
from peft_pvm.methods import METHODS


REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
METADATA = (REPOSITORY / "pyproject.toml").read_text()
(HOME,) = re.findall(r'^Repository = "(.+)"$', METADATA, re.MULTILINE)


def test_the_models_that_it_names_work():
    named = README.partition("All methods work on, among others: ")[2].partition(".\n")[0]
    rows = json.loads((REPOSITORY / "peft_pvm" / "cli" / "architectures.json").read_text())
    works = [row["known_as"] for row in rows if {row[method] for method in ("pvm", "dipe", "tdrs")} == {"works"}]
    names = re.split(r",\s", named)
    assert len(names) > 10
    assert [name for name in names if not any(name in known_as for known_as in works)] == []


def test_every_page_of_a_method_is_in_the_table():
    links = re.findall(r"\[docs\]\((docs/methods/.+?)\)", README)
    pages = [page.relative_to(REPOSITORY).as_posix() for page in REPOSITORY.glob("docs/methods/*.md")]
    assert sorted(links) == sorted(pages)
    assert len(links) == len(METHODS)


def test_it_is_short():
    assert len(README.splitlines()) < 180


CARDS = sorted((REPOSITORY / "adapters").rglob("README.md"))
LINKING = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md")), *CARDS]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    """mkdocs checks links within docs/ as well, but not those from outside."""
    for target in links_of(page):
        in_main = target.removeprefix(f"{HOME}/blob/main/")
        if re.match(r"https?:", in_main):
            continue
        path, _, anchor = in_main.partition("#")
        start = page.parent if in_main == target else REPOSITORY
        linked = page if not path else (start / path).resolve()
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_cards_can_be_read_on_the_hub():
    assert [(card, link) for card in CARDS for link in links_of(card) if not link.startswith("https://")] == []


def test_the_repository_has_one_address():
    """RELEASING.md says how to set it."""
    settings = [path for path in (REPOSITORY / ".github").rglob("*.y*ml") if path.is_file()]
    files = [*LINKING, *settings, REPOSITORY / "CITATION.cff", REPOSITORY / "experiments" / "markdown.py"]
    text = METADATA + "".join(file.read_text() for file in files)
    addresses = re.findall(
        r"(?<=github\.com/)[\w.-]+/peft-pvm\b|(?<=shields\.io/github/license/)[\w.-]+/[\w.-]+", text
    )
    assert {f"https://github.com/{address}" for address in addresses} == {HOME}


def test_the_release_is_named_alike():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert newest.groups() == (citation["version"], citation["date-released"])
    assert peft_pvm.__version__ == citation["version"]

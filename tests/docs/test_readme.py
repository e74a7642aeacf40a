"""The README's tables and links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peft_pvm.methods import METHODS


REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


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


LINKING = [
    path for pattern in ("*.md", "docs/**/*.md", "adapters/**/README.md") for path in sorted(REPOSITORY.glob(pattern))
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    """mkdocs checks links within docs/ as well, but not those from outside."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target

"""The site of the documentation in a real browser: every page fits a phone and a desktop, light and dark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


pytest.importorskip("mkdocs", reason="the site needs the extra docs")
pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
from browsers import chromium, needs_chromium
from playwright.sync_api import Browser


REPOSITORY = Path(__file__).parents[2]
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--no-directory-urls", "--site-dir", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1400, "light")])
def test_pages_fit_the_window(site: Path, browser: Browser, width: int, scheme: str):
    """Tables and code scroll by themselves, and nothing is said on the console."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(180_000)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 30
    for path in pages:
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        inside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert inside == [width, width], path.relative_to(site)
    context.close()
    assert [text for text in said if "file://" not in text] == []

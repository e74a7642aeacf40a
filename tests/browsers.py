"""A real browser for tests: Chromium, driven by Playwright. Where either is missing, such tests are skipped."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest


pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
from playwright.sync_api import Browser, sync_playwright


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window, as long as the block runs."""
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=180_000)
        yield browser
        browser.close()

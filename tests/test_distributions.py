"""What `make dist` has built for PyPI: the files in it, and the page that PyPI makes of the README."""

from __future__ import annotations

import email
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
BUILT = os.environ.get("PEFT_PVM_TEST_DIST", "")
PACKAGE = {
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "peft_pvm").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
} | {"peft_pvm_cli.py"}

pytestmark = pytest.mark.skipif(not BUILT, reason="`make dist` builds what is tested here")


def built(pattern: str) -> Path:
    (file,) = (REPOSITORY / BUILT).glob(pattern)
    return file


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    return zipfile.ZipFile(built("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    beside = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    assert beside == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == PACKAGE
    assert "peft_pvm/py.typed" in PACKAGE


def test_the_source_distribution_holds_what_builds_the_wheel():
    with tarfile.open(built("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml", ".gitignore"}
    assert names == PACKAGE | beside


def test_links_and_pictures_work_on_pypi(wheel: zipfile.ZipFile):
    from readme_renderer import markdown

    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    message = email.message_from_bytes(wheel.read(metadata))
    page = markdown.render(message.get_payload(decode=True).decode())
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    home = dict(url.split(", ") for url in message.get_all("Project-URL"))["Repository"]
    version = message["Version"]
    files = [match[1] for link in links if (match := re.match(rf"{home}/(?:raw|blob)/v{version}/(.+)", link))]
    assert files == re.findall(r"\]\((?!https:)([^)]+)\)", (REPOSITORY / "README.md").read_text())
    pictures = re.findall(rf'src="{home}/raw/v{version}/(.+?)"', page)
    assert pictures == ["docs/figures/real.png"]

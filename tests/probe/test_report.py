"""What is saved: the same numbers, the same bytes, and a page that needs nothing else."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_vlms import FAMILIES

from peft_pvm.probe import ProbeResult


matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra lab")

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What a page consists of; an error where an element is not closed as it was opened."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def saved(result: ProbeResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `result`, in a folder that is not written to."""
    return result.save(tmp_path_factory.mktemp("report") / "new" / "folder")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_json_round_trip_and_the_same_bytes(result: ProbeResult, saved: Path, tmp_path: Path):
    """Also where the user's own style is another."""
    again = ProbeResult.load(saved.parent)
    assert again == result
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        again.save(tmp_path)
        assert matplotlib.rcParams["font.size"] == 30
    assert files(tmp_path) == files(saved.parent)
    assert sorted(files(tmp_path)) == [
        "divergence.png", "image-0.png", "layers.png", "logit-lens.png", "mass-by-layer.png", "probe.json",
        "report.html", "retrieval.png", "updates.png", "visual-mass.png",
    ]  # fmt: skip
    for name, content in files(tmp_path).items():
        if name.endswith(".png"):
            assert b"Software" not in content
            assert struct.unpack(">II", content[16:24]) > (200, 40) or name == "image-0.png"


def test_what_was_written_before_signs_were_looked_at_is_read(result: ProbeResult, saved: Path, tmp_path: Path):
    assert "<h2>Scores below 0</h2>" in saved.read_text()
    content = json.loads((saved.parent / "probe.json").read_text())
    for forward in content["forwards"]:
        for layer in forward["attention"]:
            assert len(layer.pop("scores_below_zero")) == len(result.token_ids)
    shutil.copytree(saved.parent, tmp_path / "old")
    (tmp_path / "old" / "probe.json").write_text(json.dumps(content))
    old = ProbeResult.load(tmp_path / "old")
    assert old.base.attention[0].scores_below_zero == []
    assert "Scores below 0" not in old.save(tmp_path / "again").read_text()


def test_json_tells_what_it_came_from(result: ProbeResult, saved: Path):
    text = saved.with_name("probe.json").read_text(encoding="utf-8")
    content = json.loads(text)
    for package in ("torch", "transformers", "peft", "peft-pvm"):
        assert content["environment"][package][0].isdigit()
    assert content["settings"]["sink_factor"] == 1.5
    assert content["prompt"] == result.prompt
    assert "NaN" not in text


def test_what_cannot_be_read_back_is_refused(result: ProbeResult, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"probe\.json"):
        ProbeResult.load(tmp_path)
    content = json.loads(result.to_json())
    (tmp_path / "probe.json").write_text(json.dumps({**content, "format_version": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="format_version 99"):
        ProbeResult.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, '{"format_version": 1}', '{"format_version": 1, "num_images": "x"}']
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(ValueError, match=r"probe\.json (is damaged|does not hold)"):
        ProbeResult.load(tmp_path)


def test_without_matplotlib_the_numbers_are_saved(
    result: ProbeResult, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("peft_pvm.utils.packages.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"has the numbers, but neither .* needs matplotlib, .* pip install '\.\[lab\]'"
    ):
        result.save(tmp_path)
    assert sorted(files(tmp_path)) == ["image-0.png", "probe.json"]
    monkeypatch.undo()
    ProbeResult.load(tmp_path).save(tmp_path)
    assert files(tmp_path) == files(saved.parent)


def test_the_page_parses_and_needs_nothing_else(result: ProbeResult, saved: Path):
    text = saved.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert ("meta", {"charset": "utf-8"}) in page.tags
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} loads {attributes.get(name)}"
        if tag == "img":
            assert attributes["alt"]
    assert "url(" not in text
    assert "@import" not in text
    assert tags.count("img") == 8  # seven pictures and the image
    # User text is text.
    assert result.prompt in page.text
    assert all(token in page.text for token in result.tokens)


def test_few_tokens_and_no_adapter_make_a_page(probed, tmp_path: Path):
    one = probed(FAMILIES["llava"].build(), max_new_tokens=1, generate_kwargs={"min_new_tokens": 1})
    Page(one.save(tmp_path / "one").read_text(encoding="utf-8"))
    without_lens = replace(one, forwards=[replace(one.base, lens=None)])
    without_lens.save(tmp_path / "two")
    assert "logit-lens.png" not in files(tmp_path / "two")


def test_the_page_opens_in_a_browser(saved: Path, tmp_path: Path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1000,3000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", saved.as_uri(),
    ]  # fmt: skip
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert "CONSOLE" not in finished.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000

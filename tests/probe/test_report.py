"""What is saved: the same numbers, the same bytes, and a page that needs nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_vlms import FAMILIES

from peft_pvm.probe import ProbeResult, verdict
from peft_pvm.probe.maps import STRONGEST, looks
from peft_pvm.probe.plots import draw
from peft_pvm.probe.report import Answer, answers, page
from peft_pvm.probe.words import percent


matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra lab")


VOID = {"meta", "link", "img", "br", "input"}


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
        "by-layer.svg", "by-token-and-layer.svg", "decay-by-layer.svg", "decay.svg", "divergence.svg", "image-0.png",
        "logit-lens.svg", "probe.json", "report.html", "sinks.svg", "updates.svg", "visual-mass.svg",
    ]  # fmt: skip
    for name, content in files(tmp_path).items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)


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
    "content", ["", "[" * 100_000, '{"format_version": 2}', '{"format_version": 2, "num_images": "x"}']
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(ValueError, match=r"probe\.json (is damaged|does not hold)"):
        ProbeResult.load(tmp_path)


def test_without_matplotlib_the_numbers_are_saved(
    result: ProbeResult, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("peft_pvm.utils.extras.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"has the numbers, but neither .* needs jinja2 and matplotlib, .* pip install '\.\[lab\]'"
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
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert "default-src 'none'" in text, "a browser is to load and run nothing"
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} loads {attributes.get(name)}"
        if tag == "img":
            assert attributes["alt"]
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    assert text.count("url(") == text.count("url(data:") + text.count("url(#")
    assert "@import" not in text
    assert all(token in page.text for token in result.tokens)


def test_no_text_of_others_becomes_markup(result: ProbeResult):
    """Prompt, tokens and model are text wherever they stand, also in attributes."""
    text = page(replace(result, model_name=result.prompt, environment={result.prompt: result.prompt}), [])
    assert result.prompt.startswith("<script>")
    assert "<script" not in text
    parsed = Page(text)
    assert parsed.text.count(result.prompt) > len(result.tokens)
    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "main", "header", "section", "div", "h1", "h2", "h3",
        "p", "span", "b", "dl", "dt", "dd", "fieldset", "legend", "label", "input", "figure", "figcaption", "img",
        "pre", "mark", "details", "summary", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert any(tag == "img" and "<script>" in (attributes["alt"] or "") for tag, attributes in parsed.tags)


def test_the_verdict_comes_first_and_names_adapters(result: ProbeResult, saved: Path):
    base, *others = result.forwards
    said = verdict(result)
    assert said[0].startswith(f"{percent(base.mean_mass[0])} of the base's attention reaches the image at the first")
    assert f", {percent(base.mean_mass[-1])} at the last;" in said[0]
    for forward in others:
        assert f"with {forward.label} {percent(forward.mean_mass[-1])}" in said[0]
        changed = percent(float(np.mean(np.array(forward.choice_ids) != base.choice_ids)))
        divergence = f"{np.mean(forward.kl_to_base):.2g} nats"
        if forward is others[0]:
            assert f"{forward.label} changes {changed} (mean KL {divergence})" in said[-1]
        else:
            assert f", {forward.label} {changed} ({divergence})" in said[-1]
    assert [forward.label for forward in others] == ["pvm + dipe", "pvm", "dipe"]
    text = Page(saved.read_text(encoding="utf-8")).text
    assert (
        max(text.index(sentence) for sentence in said) < text.index("Where it looks") < text.index("What it answers")
    )
    assert text.index("What it answers") < text.index("Curves") < text.index("Details")


def test_tokens_that_changed_are_marked(result: ProbeResult, saved: Path):
    changed = replace(
        result, base_token_ids=[1, 2, 3, 4], base_tokens=list("abcd"), token_ids=[9, 1, 3, 4, 5], tokens=list("iacde")
    )
    assert answers(changed) == [
        Answer("base", [("a", False), ("b", True), ("cd", False)]),
        Answer("pvm + dipe", [("i", True), ("acd", False), ("e", True)]),
    ]
    same = replace(result, base_token_ids=result.token_ids)
    assert answers(same) == [Answer("base and pvm + dipe, the same", [("".join(result.tokens), False)])]
    assert result.base_token_ids != result.token_ids
    assert "<mark>" in saved.read_text(encoding="utf-8")


def test_maps_lie_where_the_model_looks(result: ProbeResult):
    """Their opacity is the root of the attention, beside the most that any forward gives to a token without sinks."""
    from PIL import Image

    sinks = {sink for forward in result.forwards for layer in forward.attention for sink in layer.sinks}
    assert 0 < len(sinks) < result.num_visual_tokens
    rows = [[forward.mean_map, *forward.maps.values()] for forward in result.forwards]
    most = [max(np.delete(weights, list(sinks)).max() for weights in of_title) for of_title in zip(*rows)]
    found = looks(result)
    assert found.scales == pytest.approx(most)
    for weights_of, drawn_of in zip(rows, found.rows.values(), strict=True):
        for weights, drawn, scale in zip(weights_of, drawn_of, most, strict=True):
            opacity = np.array(Image.open(io.BytesIO(drawn.overlays[0].png)))[..., 3] / 255
            expected = STRONGEST * np.sqrt(np.minimum(np.array(weights) / scale, 1)).reshape(result.grids[0])
            assert np.abs(opacity - expected).max() < 1 / 255
            assert drawn.share == pytest.approx(sum(weights))


def test_nothing_is_shown_of_what_is_not_there(probed, tmp_path: Path):
    one = probed(FAMILIES["llava"].build(), max_new_tokens=1, generate_kwargs={"min_new_tokens": 1})
    text = one.save(tmp_path / "one").read_text(encoding="utf-8")
    Page(text)
    assert "Where PVM reads" not in text
    assert "<h3>Prompt</h3>" not in text
    assert "KL to the base" not in text.split("<details>")[0]
    assert sorted(files(tmp_path / "one")) == ["by-layer.svg", "logit-lens.svg", "probe.json", "report.html"]
    without_lens = replace(one, forwards=[replace(one.base, lens=None)])
    assert "logit-lens" not in [picture.name for picture in draw(without_lens)]


def test_the_page_fits_a_phone_in_a_browser(saved: Path, tmp_path: Path):
    """With everything unfolded, without a word on the console, and with the maps of the chosen token alone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    report = escape(saved.read_text(encoding="utf-8"))
    views = "".join(f'<iframe width="{width}" height="800" srcdoc="{report}"></iframe>' for width in (390, 1400))
    measure = """<script>onload = () => { for (const view of document.querySelectorAll("iframe")) {
        const page = view.contentDocument
        page.querySelectorAll("details").forEach(part => part.open = true)
        page.getElementById("at-1").click()
        const seen = [...page.querySelectorAll(".at")].filter(part => part.offsetParent).map(part => part.className)
        const {scrollWidth, clientWidth} = page.documentElement
        view.title = `${scrollWidth} in ${clientWidth}: ${[...new Set(seen)]}`
    } }</script>"""
    (tmp_path / "views.html").write_text(f"<!DOCTYPE html>{views}{measure}", encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "views.html").as_uri(),
    ]  # fmt: skip
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert "CONSOLE" not in finished.stderr
    assert re.findall(r'title="(\d.*?)"', finished.stdout) == ["390 in 390: at at-1", "1400 in 1400: at at-1"]

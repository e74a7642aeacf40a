"""The page of `peft-pvm app` in a real browser, on tiny models."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import typer


pytest.importorskip("gradio", reason="the page needs gradio, of the extra app")
pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
import gradio
from browsers import chromium, needs_chromium
from language_models import tiny_language_model
from playwright.sync_api import Browser, Locator, Page, expect
from processors import PROCESSORS
from tiny_vlms import FAMILIES

from experiments.real.vlm import new_vlm, save_vlm
from peft_pvm.cli.options import ModelOptions
from peft_pvm.cli.work import app as page_of_app
from peft_pvm.cli.work import asking
from peft_pvm.demo.cells import ask_in_turn, ask_in_words


BUSY = 180_000  # milliseconds: a machine may be
expect.set_options(timeout=BUSY)
pytestmark = needs_chromium
MARKUP = "ask ${document.title = 'run'} {{prompt}} <img src=x onerror=\"document.title = 'run'\"></iframe>"


@dataclass
class View:
    """The page in a window of the browser.

    Attributes:
        page: The page.
        said: What stood on the console, and which requests went elsewhere.
    """

    page: Page
    said: list[str] = field(default_factory=list)

    @property
    def question(self) -> Locator:
        return self.page.get_by_role("textbox", name="Question")

    def ask(self) -> None:
        self.page.get_by_role("button", name="Ask").click()

    def choose(self, label: str, value: str) -> None:
        """Type a value into a drop-down list."""
        box = self.page.get_by_label(label, exact=True)
        box.fill(value)
        box.press("Enter")
        box.press("Tab")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page, served as the command serves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setattr(gradio.Blocks, "block_thread", lambda self: None)
        yield f"http://127.0.0.1:{serve_somewhere()}"
    gradio.close_all()


def serve_somewhere(tries: int = 3) -> int:
    """The port of the page. gradio gives its server five seconds to start, and others may take the port meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        page_of_app.serve(ModelOptions("tiny", "cpu", "auto", None), "127.0.0.1", port)
    except (OSError, ValueError, typer.BadParameter):
        gradio.close_all()
        if tries == 1:
            raise
        return serve_somewhere(tries - 1)
    return port


@pytest.fixture(params=[(1400, "light"), (390, "dark")], ids=str)
def sized(request, browser: Browser, address: str) -> Iterator[View]:
    width, scheme = request.param
    yield from view(browser, address, width, scheme)


@pytest.fixture
def wide(browser: Browser, address: str) -> Iterator[View]:
    yield from view(browser, address, 1400, "light")


def view(browser: Browser, address: str, width: int, scheme: str) -> Iterator[View]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(BUSY)
    seen = View(context.new_page())
    seen.page.on("console", lambda message: seen.said.append(message.text))
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.on("request", lambda request: seen.said.append(request.url) if is_elsewhere(request.url) else None)

    def is_elsewhere(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    seen.page.goto(address)
    expect(seen.question).to_have_value(asking.ONLY_QUESTION)
    yield seen
    context.close()


def test_one_click_shows_what_the_base_forgets(sized: View):
    """And the page fits a phone, in the dark, loads nothing from elsewhere, and has nothing to say on the console."""
    page = sized.page
    sized.ask()
    heading = page.get_by_role("heading", name="Digits right: base 2 of 9, DIPE 9 of 9")
    expect(heading).to_be_visible()
    expect(page.get_by_role("textbox", name="DIPE")).to_have_value("2 4 7\n4 9 1\n9 5 4")
    report = page.frame_locator("iframe")
    expect(report.get_by_text("of the base's attention reaches the image at the first token")).to_be_visible()
    expect(report.get_by_role("heading", name="Attention on the image, token by token")).to_be_visible()
    for document in ("document", "document.querySelector('iframe').contentDocument"):
        page.wait_for_function(f"{document}.documentElement.scrollWidth == {document}.documentElement.clientWidth")
    page.wait_for_function(
        "(frame => frame.clientHeight == frame.contentDocument.documentElement.offsetHeight)"
        "(document.querySelector('iframe'))"
    )
    is_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for body in (page.locator("body"), report.locator("body")):
        brightness = sum(map(int, re.findall(r"\d+", body.evaluate("body => getComputedStyle(body).backgroundColor"))))
        assert (brightness < 150) == is_dark
    assert sized.said == []


def test_stop_stops_the_model(wide: View, monkeypatch: pytest.MonkeyPatch):
    """It shows where it looks while it writes, writes nothing more, and is free for the next question."""
    written = []
    put = asking._Stream.put

    def slow(self: asking._Stream, value: object) -> None:
        put(self, value)
        written.append(value)
        if len(written) < 8:
            time.sleep(0.3)  # it looks no oftener than five times a second
        else:
            self.stop.wait(BUSY / 1000)

    monkeypatch.setattr(asking._Stream, "put", slow)
    wide.ask()
    expect(wide.page.get_by_text("DIPE: writing ...")).to_be_visible()
    expect(wide.page.get_by_role("img", name="DIPE: where")).to_be_visible()
    curve = wide.page.locator(".live polyline")
    wide.page.wait_for_function("document.querySelector('.live polyline.c1').points.length > 2")
    wide.page.get_by_role("button", name="Stop").click()
    expect(wide.page.get_by_text("Stopped.")).to_be_visible()
    expect(curve.last).to_be_visible()  # what was seen stays
    monkeypatch.undo()
    count = len(written)
    assert count < 17
    wide.ask()
    expect(wide.page.get_by_role("heading", name="DIPE 9 of 9")).to_be_visible()
    assert len(written) <= count + 1
    assert wide.said == []


def test_what_is_wrong_is_said_without_a_traceback(wide: View, capfd: pytest.CaptureFixture):
    wide.choose("Model", "no/<b>such</b>-model")
    expect(wide.question).to_have_value("What is in the image?")
    wide.ask()
    expect(wide.page.get_by_text("no/<b>such</b>-model").last).to_be_visible()
    assert "Traceback" not in wide.page.content() + "".join(capfd.readouterr())
    assert wide.said == []


def test_files_of_the_machine_are_out_of_reach(address: str, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    for path in (tmp_path / "secret.txt", Path(__file__), "pyproject.toml"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{address}/gradio_api/file={path}")
    assert page_of_app.settings("127.0.0.1", 1)["share"] is False


def test_the_real_base_is_asked_what_it_can_answer(wide: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    language_model = tiny_language_model()
    save_vlm(new_vlm(language_model), language_model, tmp_path / "runs" / "real" / "base")
    monkeypatch.chdir(tmp_path)
    wide.choose("Model", "real")
    expect(wide.question).to_have_value(asking.ALL_CELLS)
    expect(wide.question).to_be_editable()
    wide.page.get_by_label("number input for Text between image and question").fill("0")
    wide.ask()
    expect(
        wide.page.get_by_role("heading", name=re.compile(r"Digits right: base \d of 9, DIPE \d of 9"))
    ).to_be_visible()
    expect(wide.page.frame_locator("iframe").get_by_text(asking.ALL_CELLS).first).to_be_visible()
    assert wide.said == []


def test_a_real_base_that_was_not_made_is_named(wide: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Make the base first: make real-base"):
        page_of_app.serve(ModelOptions("real", "cpu", "auto", None), "127.0.0.1", 0)
    wide.choose("Model", "real")
    expect(wide.question).to_have_value(asking.ALL_CELLS)
    wide.ask()
    expect(wide.page.get_by_text("Make the base first: make real-base").last).to_be_visible()


@pytest.mark.parametrize(("prompt", "seed", "counted"), [("", 3, True), (" Why?", 3, False), ("", None, False)])
def test_digits_in_words_are_counted_where_they_are_known(prompt: str, seed: int | None, counted: bool):
    """They are those of the mosaic that the page shows."""
    ((image, _, answer),) = ask_in_words(True, 1, 3)
    assert image.tobytes() == ask_in_turn(3).image.tobytes()
    answers = {"base": answer[:-1] + "x", "DIPE": answer}
    question = asking.Question("any", image, asking.ALL_CELLS + prompt, seed=seed)
    assert asking._digits_right(question, answers) == ({"base": 8, "DIPE": 9} if counted else {})


def test_another_model_and_markup_in_its_question(wide: View, tmp_path: Path):
    FAMILIES["llava"].build().save_pretrained(tmp_path)
    PROCESSORS["llava"]().save_pretrained(tmp_path)
    wide.choose("Model", str(tmp_path))
    expect(wide.question).to_have_value("What is in the image?")
    wide.question.fill(MARKUP)
    wide.page.get_by_label("Longest answer, in tokens").first.fill("3")
    wide.page.get_by_label("number input for Text between image and question").fill("0")
    wide.ask()
    expect(wide.page.frame_locator("iframe").get_by_text(MARKUP)).to_be_visible()
    assert wide.page.title() == "peft-pvm"
    assert wide.said == []

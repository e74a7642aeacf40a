"""The page of `peft-pvm app`, in Gradio. `asking` computes what it shows."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import typer

from ...compare.contenders import BASE
from ...demo.cells import ask_in_turn
from ...demo.mosaic import NUM_CELLS
from ...probe import ProbeResult
from ...probe.maps import panel
from ...probe.plots import draw
from ...probe.report import page as report_page
from ...utils.terminal import say
from ..options import REAL, REAL_BASE, TINY, ModelOptions, located
from ..refusals import is_refusal
from .asking import ALL_CELLS, METHODS, ONLY_QUESTION, Desk, Question, State
from .loading import check_device, check_fit


INTRODUCTION = """# Does it still look at the image?
A vision-language model sees an image, reads text that has nothing to do with it, and is then asked about the image.
Press **Ask** to see what it answers, by itself and with the methods that you choose, and how much it looks at the
image meanwhile."""
WAITING = "<p>Where the model looks, and how that changes from token to token, will be shown here.</p>"
TRAINED = "adapters/pvm-tiny-vlm"  # in a checkout
LONGEST_TEXT, LONGEST_ANSWER = 8192, 512  # tokens
LARGEST_UPLOAD = "20mb"
SECONDS_BETWEEN_LOOKS = 0.2  # at least; each has the image in it
PROMPTS = {TINY: ONLY_QUESTION, str(REAL_BASE): ALL_CELLS}  # of the lab's models
KEPT = 3600  # seconds that uploads stay on the disk
CSS = """
.gradio-container { max-width: 84rem !important; margin: auto }
.picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
.answers textarea { font-size: 1.25rem; font-variant-numeric: tabular-nums }
.report iframe { width: 100%; height: 40rem; border: 0; border-radius: .5rem; color-scheme: light }
.dark .report iframe { color-scheme: dark }
"""


def serve(of_model: ModelOptions, host: str, port: int) -> None:
    """Serve the page until somebody ends it.

    Args:
        of_model: The model that is chosen at first, and how models are loaded.
        host: The address to listen on.
        port: The port.
    """
    check_device(of_model.device)
    check_fit(dataclasses.replace(of_model, model=located(of_model.model)), [])
    try:
        socket.create_server((host, port)).close()
    except (OSError, TypeError, UnicodeError) as error:  # not all of them for what can be no host's name
        raise typer.BadParameter(f"{host}:{port} cannot be used: {error}.", param_hint=["--host", "--port"]) from error
    blocks = build(of_model)
    _, address, _ = blocks.launch(**settings(host, port), quiet=True, prevent_thread_lock=True)
    say(f"The app is at {address} until you press Ctrl+C.")
    blocks.block_thread()


def settings(host: str, port: int) -> dict[str, Any]:
    """How the page is launched: without a public link, and with no file of this machine in reach."""
    return dict(
        server_name=host,
        server_port=port,
        share=False,
        allowed_paths=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        footer_links=["gradio", "settings"],
        theme=gr.themes.Default(primary_hue="indigo"),
        css=CSS,
    )


class FrontDesk:
    """Takes questions from tabs of browsers to the desk, and answers back.

    Args:
        desk: Who answers.
    """

    def __init__(self, desk: Desk):
        self._desk = desk
        self._stops: dict[str | None, threading.Event] = {}  # of the questions that are being answered, by tab

    def answer(self, request: gr.Request, *asked: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        """What the page shows while a question is answered: what is being done, both answers, and where it looks.

        Args:
            request: Which tab asks.
            asked: The fields of a `Question`, in their order.

        Raises:
            gr.Error: It cannot be answered.
        """
        question = Question(*asked)
        if question.image is None:  # somebody has taken it out
            raise gr.Error("There is no image. Choose one, or draw a mosaic.", print_exception=False)
        stop = self._stops[request.session_hash] = threading.Event()
        drawn_at = -SECONDS_BETWEEN_LOOKS
        try:
            for state in self._desk.ask(question, stop):
                alone = gr.Textbox(state.answers.get(BASE, ""), label=BASE)
                adapted = gr.Textbox(
                    state.answers.get(question.acting, ""), label=question.acting, visible=bool(question.acting)
                )
                if state.result is not None:
                    report: Any = framed(state.result)
                elif state.looks is not None and time.monotonic() - drawn_at >= SECONDS_BETWEEN_LOOKS:
                    drawn_at = time.monotonic()
                    report = panel(state.looks.picture, state.looks.grids, state.looks.seen)
                else:
                    report = gr.skip()
                yield _said(state), alone, adapted, report
        except Exception as error:  # the browser shows all of them; a fault of ours leaves its traceback here too
            yield "", gr.skip(), gr.skip(), gr.skip()
            message = escape(str(error).strip() or type(error).__name__)
            raise gr.Error(message, duration=None, print_exception=not is_refusal(error)) from error
        finally:
            self._stops.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        """Stop the answer to a tab's question, if there is one."""
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()


def build(of_model: ModelOptions) -> gr.Blocks:
    """The page.

    Args:
        of_model: The model that is chosen at first, and how models are loaded.
    """
    desk = FrontDesk(Desk(of_model))
    with gr.Blocks(title="peft-pvm", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                asked = _fields(of_model.model)
                _, _, prompt, *_ = asked
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
                doing = gr.Markdown()
                with gr.Row(elem_classes="answers"):
                    alone = gr.Textbox(label=BASE, lines=3, interactive=False, min_width=200)
                    adapted = gr.Textbox(label="with methods", lines=3, interactive=False, min_width=200)
                report = gr.HTML(WAITING, elem_classes="report")
        gr.on(
            [ask.click, prompt.submit],
            desk.answer,
            asked,
            [doing, alone, adapted, report],
            show_progress="minimal",
            show_progress_on=doing,
            trigger_mode="always_last",  # somebody may ask again while the model stops
        )
        stop.click(desk.stop)
    return blocks


def _fields(first_model: str) -> list[Any]:
    """The fields of a `Question`, in their order."""
    seed = gr.State(0)
    image = gr.Image(
        ask_in_turn(0).image,
        label="Image",
        show_label=False,
        type="pil",
        format="png",  # what loses nothing
        height=260,
        sources=["upload", "clipboard"],
        elem_classes="picture",
    )
    mosaic = gr.Button("Another mosaic of digits", size="sm")
    text_tokens = gr.Slider(0, LONGEST_TEXT, 1024, step=128, label="Text between image and question, in tokens")
    prompt, length = suit(first_model)
    methods = gr.CheckboxGroup(list(METHODS), value=["DIPE"], label="Methods that need no training")
    adapters = gr.Dropdown(
        [TRAINED] if Path(TRAINED).is_dir() else [],
        label="Trained adapters",
        info="Folders, or ids on the Hugging Face Hub",
        multiselect=True,
        allow_custom_value=True,
    )
    model = gr.Dropdown(
        list(dict.fromkeys([TINY, *([REAL] if REAL_BASE.is_dir() else []), first_model])),
        value=first_model,
        label="Model",
        info=f"{TINY} or {REAL}, the lab's; a folder; or an id on the Hugging Face Hub",
        allow_custom_value=True,
    )
    mosaic.click(another_mosaic, None, [image, seed])
    image.input(lambda: None, None, seed)
    model.change(suit, model, [prompt, length], trigger_mode="always_last")
    return [model, image, prompt, text_tokens, methods, adapters, length, seed]


def another_mosaic() -> tuple[Any, int]:
    """A mosaic, and the seed that drew it."""
    seed = random.randrange(10**6)
    return ask_in_turn(seed).image, seed


def suit(model: str) -> tuple[gr.Textbox, gr.Slider]:
    """The fields for the prompt and for the longest answer as they suit a model. The tiny one takes neither."""
    is_tiny = model == TINY
    return (
        gr.Textbox(PROMPTS.get(located(model), "What is in the image?"), label="Question", interactive=not is_tiny),
        gr.Slider(1, LONGEST_ANSWER, 64, step=1, label="Longest answer, in tokens", visible=not is_tiny),
    )


def _said(state: State) -> str:
    if not state.right:
        return escape(state.doing)
    return "## Digits right: " + ", ".join(f"{name} {right} of {NUM_CELLS}" for name, right in state.right.items())


def framed(result: ProbeResult) -> str:
    """The probe's report in a frame of its own, in which nothing runs, as high as the report."""
    document = escape(report_page(result, draw(result)))
    fit = "new ResizeObserver(([{target}]) => this.style.height = `${target.offsetHeight}px`)"
    return (
        f'<iframe title="Report of the probe" sandbox="allow-same-origin" srcdoc="{document}" '
        f'onload="{fit}.observe(this.contentDocument.documentElement)"></iframe>'
    )

"""The work of `peft-pvm lab`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import LlavaForConditionalGeneration

from ...demo.for_trainers import make_chats, save_as_folder, write_chats
from ...demo.mosaic import Split
from ...demo.questions import Questions
from ...demo.recall import compare, load_models, run_demo
from ...demo.tiny_vlm import SHIPPED, load_tiny_vlm
from ...utils.terminal import say
from ..options import located
from ..refusals import reading
from .loading import check_readable


__all__ = ["chats", "recall", "run_demo", "save_base"]


def recall(adapters: list[str], base: Path | None, rows: int, seed: int) -> None:
    """Test a base of the lab, and each of some adapters on it."""
    base = base and Path(located(str(base)))
    check_readable(adapters)
    with reading("a base of the lab and adapters of it", base or SHIPPED, *adapters):
        models = load_models(adapters, base)
        questions = None
        if base is not None and isinstance(models["base"], LlavaForConditionalGeneration):
            questions = Questions.of(base)
    compare(models, rows, seed, questions)


def save_base(out: Path) -> None:
    """Write the tiny model as a folder."""
    save_as_folder(load_tiny_vlm(), out)
    say(out)


def chats(
    out: Path, form: Literal["messages", "prompts"], rows: int, max_length: int, split: Split, seed: int
) -> None:
    """Write questions on mosaics as a data set."""
    write_chats(make_chats(form, rows, max_length, split, seed), out)
    say(out)

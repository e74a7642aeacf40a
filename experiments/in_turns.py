"""Whether steps have become faster: an earlier commit and the code as it is, in two processes that take turns."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_pvm.env import environment
from peft_pvm.folders.replacing import write_file
from peft_pvm.utils.terminal import Bars
from peft_pvm.utils.text import markdown_table


REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("in_turns_worker.py")
METHODS = ("base", "pvm", "dipe", "t-drs", "vaf", "log-bias", "pai", "hgai", "cai", "var", "memvr")
CONTEXT, VISUAL_TOKENS = 1024, 512
TOKENS = 4  # of a round, of which the median counts


@dataclass(frozen=True)
class Shape:
    """A model of random weights.

    Attributes:
        preset: Of `peft-pvm bench`.
        layers: How many of its decoder layers it has.
        dtype: Of its weights, by torch's name.
    """

    preset: str
    layers: int
    dtype: str


SHAPES = {
    "tiny": Shape("tiny", 6, "float32"),
    "1b": Shape("1b-random", 4, "bfloat16"),
    "8b": Shape("8b-random", 1, "bfloat16"),
}


def measure(before: str, shapes: list[str], rounds: int, out: Path) -> dict[str, Any]:
    """Have both take turns, and write what was measured.

    Args:
        before: The earlier commit, as git names it.
        shapes: Names from `SHAPES`.
        rounds: How often each method of each is measured, after a round that does not count.
        out: The JSON file.

    Returns:
        What the file holds: "before" and "now" (commits, "-dirty" if files had changed since), "measured" (by shape,
        method and "prefill" or "decode", the seconds of each round before and now), "settings" and "environment".

    Raises:
        ValueError: git does not know the commit.
    """
    commit = _git("rev-parse", "--verify", f"{before}^{{commit}}")
    now_commit = _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    measured: dict[str, Any] = {}
    with checked_out(commit) as earlier, Bars() as progress:
        for shape in shapes:
            measured[shape] = {name: {"prefill": [], "decode": []} for name in METHODS}
            task = progress.add_task(shape, total=(rounds + 1) * len(METHODS))
            with _worker(earlier, SHAPES[shape]) as then, _worker(REPOSITORY, SHAPES[shape]) as now:
                for number in range(rounds + 1):
                    for name in METHODS:
                        for what, kept in measured[shape][name].items():
                            pair = _in_turn(then, now, f"{name} {what}", number)
                            kept.extend([pair] if number else [])
                        progress.advance(task)
    settings = dict(context=CONTEXT, visual_tokens=VISUAL_TOKENS, tokens=TOKENS, threads=torch.get_num_threads())
    shown = {name: vars(SHAPES[name]) for name in shapes}
    told = dict(settings=dict(settings, shapes=shown), environment=environment())
    found = dict(before=commit, now=now_commit, measured=measured, **told)
    write_file(out, json.dumps(found) + "\n")
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: by shape and method, the median time now over that before, of each round, with its spread.

    The spread is half the range between the quartiles. What the base has there is noise.
    """
    rows = []
    for shape, methods in found["measured"].items():
        for name, times in methods.items():
            row = [shape, name]
            for what in ("prefill", "decode"):
                then, now = (statistics.median(side) * 1000 for side in zip(*times[what], strict=True))
                lower, ratio, upper = statistics.quantiles([after / first for first, after in times[what]], n=4)
                row += [f"{then:,.1f}", f"{now:,.1f}", f"{ratio:.2f} ± {(upper - lower) / 2:.2f}"]
            rows.append(row)
    columns = [f"{what}{part}" for what in ("Prefill", "Decoding") for part in (" before, ms", " now, ms", ", ratio")]
    return "\n".join(markdown_table(["", "", *columns], rows))


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the repository as of a commit, as long as the block runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "earlier")
        _git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


@contextlib.contextmanager
def _worker(folder: Path, shape: Shape) -> Iterator[subprocess.Popen[str]]:
    settings = dict(methods=METHODS, contexts=[CONTEXT], visual_tokens=VISUAL_TOKENS, new_tokens=TOKENS)
    given = json.dumps(dict(vars(shape), settings=settings))
    command = [sys.executable, "-P", str(WORKER), given]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _in_turn(then: subprocess.Popen[str], now: subprocess.Popen[str], order: str, number: int) -> tuple[float, float]:
    """Seconds of one order before and now; which of the two comes first changes from round to round."""
    if number % 2:
        first = _ask(now, order)
        return _ask(then, order), first
    return _ask(then, order), _ask(now, order)


def _ask(worker: subprocess.Popen[str], order: str) -> float:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("The worker has no pipes.")
    worker.stdin.write(f"{order}\n")
    worker.stdin.flush()
    if not (answer := worker.stdout.readline()):
        raise RuntimeError(f"The worker ended at {order!r}. Its error is above.")
    return json.loads(answer)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()

"""Programs in processes of their own, which need not import what takes seconds: forks of a server that has.

Such a process has one thread, the settings of the tests, and nothing of what other tests did.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

import pytest


TESTS = Path(__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
CONTEXT = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if CONTEXT is not None:
    # What is not installed is left out.
    CONTEXT.set_forkserver_preload(
        ["environment", "peft_pvm", "tiny_vlms", "accelerate.commands.launch", "datasets", "trl.trainer.sft_trainer"]
    )


@dataclass
class Program:
    """A program that was started.

    Attributes:
        process: Its process.
        folder: Holds what it prints, in the files "out" and "errors".
    """

    process: multiprocessing.process.BaseProcess
    folder: tempfile.TemporaryDirectory

    @property
    def out(self) -> str:
        return Path(self.folder.name, "out").read_text()

    @property
    def errors(self) -> str:
        return Path(self.folder.name, "errors").read_text()


def start(program: str | Path, *arguments: object) -> Program:
    """Start Python with the file of a program, or with its text.

    Args:
        program: A path, or text.
        arguments: Of its command line.
    """
    folder = tempfile.TemporaryDirectory()
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths):
        ensure_running()
    process = CONTEXT.Process(target=_run, args=(program, list(map(str, arguments)), folder.name))
    process.start()
    return Program(process, folder)


def run(program: str | Path, *arguments: object) -> str:
    """As `start`, to its end.

    Returns:
        What it printed. It must not fail.
    """
    started = start(program, *arguments)
    started.process.join(timeout=600)
    started.process.kill()  # if it hangs
    started.process.join()
    assert started.process.exitcode == 0, started.out[-2000:] + started.errors[-6000:]
    return started.out


def _run(program: str | Path, arguments: list[str], folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})

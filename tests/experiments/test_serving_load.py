"""What a load test of vLLM's server says: its table, and that of the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

from experiments.serving_load import BASE, MEASURES, Server, table


# A process and one below it, which computes for half a second. Both wait then until their input ends.
COMPUTES = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\nsys.stdin.read()"
STARTS = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {COMPUTES!r}])"
REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "experiments" / "results" / "serving" / "load.json"


def measured(name: str, concurrent: int, number: int, factor: float) -> dict:
    numbers = dict.fromkeys(MEASURES, 100.0 * factor)
    return dict(name=name, concurrent=concurrent, round=number, cpu_ms=factor, memory=factor * 2**30, **numbers)


def test_ratios_are_those_of_the_same_round():
    """A machine that is slow in one round is slow for all: the base takes 1, 4 and 10, PVM twice as long each time."""
    rounds = [
        each
        for number, slow in enumerate((1, 4, 10))
        for each in (measured(BASE, 16, number, slow), measured("PVM", 16, number, 2 * slow))
    ]
    *_, of_base, of_pvm = table(rounds).splitlines()
    assert of_base == "| 16 | base | 400.0 | 400.0 | 400.0 | 4.0 | 4.00 |"
    assert of_pvm == "| 16 | PVM | 800.0 (2.00 x) | 800.0 (2.00 x) | 800.0 (2.00 x) | 8.0 (2.00 x) | 8.00 (2.00 x) |"


def test_the_processes_below_a_server_count_as_well():
    with subprocess.Popen([sys.executable, "-c", STARTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"done\n"
        server = Server("", psutil.Process(started.pid))
        computed, in_memory = server.cpu_seconds(), server.memory()
        of_the_first = server.process.memory_info().rss
    # The system drops what is below 10 ms, of the user's and of its own time of each of the two.
    assert 0.5 - 4 * 0.01 <= computed < 1.5
    assert in_memory > 1.5 * of_the_first


def test_the_documentation_shows_the_recorded_table():
    recorded = json.loads(RECORDED.read_text())["measured"]
    assert table(recorded) in (REPOSITORY / "docs" / "how-to" / "serve.md").read_text()

"""What a load test of vLLM's server says: its table, and that of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.serving_load import BASE, MEASURES, table


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


def test_the_documentation_shows_the_recorded_table():
    recorded = json.loads(RECORDED.read_text())["measured"]
    assert table(recorded) in (REPOSITORY / "docs" / "how-to" / "serve.md").read_text()

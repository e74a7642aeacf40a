"""The examples run. Trainings are cut short. Those for other packages have tests of their own."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from unittest import mock

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
OF_OTHERS = ("train_", "adapt_", "vlmevalkit")
EXTRAS = ("matplotlib", "sklearn", "rich")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRAS), reason="needs the extra lab"
)


@pytest.mark.parametrize(
    "example", sorted(path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith(OF_OTHERS))
)
def test_example(example, tmp_path, monkeypatch, capsys):
    from peft_pvm.demo import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [example])
    fit = train.fit
    with mock.patch.object(train, "fit", lambda model, groups, draw, steps, *rest: fit(model, groups, draw, 1, *rest)):
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir())

"""The examples run, also the notebook, with less to train and to test. Those for other packages have tests apart."""

from __future__ import annotations

import importlib.util
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
OF_OTHERS = ("train_", "adapt_", "vlmevalkit")
EXTRAS = ("matplotlib", "sklearn", "rich")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRAS), reason="needs the extra lab"
)


@pytest.mark.parametrize(
    "example",
    sorted(
        path.name
        for path in EXAMPLES.iterdir()
        if path.suffix in (".py", ".ipynb") and not path.name.startswith(OF_OTHERS)
    ),
)
def test_example(example, tmp_path, monkeypatch, capsys):
    from peft_pvm.demo import recall, train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [example])
    for name in ("recall", "transcription"):
        monkeypatch.setattr(recall, name, on_one_row(getattr(recall, name)))
    fit = train.fit
    with mock.patch.object(train, "fit", lambda model, groups, draw, steps, *rest: fit(model, groups, draw, 1, *rest)):
        if example.endswith(".ipynb"):
            exec(code_of(EXAMPLES / example), {})
        else:
            runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir())


def on_one_row(test: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, rows=1, **kwargs: test(*args, rows=1, **kwargs)


def code_of(notebook: Path) -> str:
    """The code of a notebook, which is saved without outputs, but for the commands of the notebook itself."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    install, *sources = ("".join(cell["source"]) for cell in cells)
    assert install.startswith('%pip install -q "peft-pvm[lab')
    return "\n".join(sources)

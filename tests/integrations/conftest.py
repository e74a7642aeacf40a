from __future__ import annotations

import sys

import pytest


@pytest.fixture
def without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval cannot be imported, whether it is there or not."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "lmms_eval":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for name in ("models", "lengths"):
        monkeypatch.delitem(sys.modules, f"peft_pvm.integrations.lmms_eval.{name}", raising=False)

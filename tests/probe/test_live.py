"""What is seen while a model writes is what the probe finds afterwards."""

from __future__ import annotations

import pytest
import torch
from forwards import TOLERANCE
from methods_under_test import METHODS
from peft import get_peft_model
from tiny_vlms import FAMILIES

from peft_pvm import M3IDConfig
from peft_pvm.probe.observers import Glance, Watcher, watched
from peft_pvm.tokens.families import find_vlm


class Streamer:
    """Asks a watcher for each token."""

    def __init__(self, watcher: Watcher):
        self.watcher = watcher
        self.glances: list[Glance | None] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.glances.append(self.watcher.glance())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("method", ["pvm", "dipe", "tdrs", "M3ID", None])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
def test_glances_are_what_the_probe_finds(family: str, method: str | None, probed):
    """From the second token of the answer on, whatever a method runs beside. Gemma 3 drops what its window leaves."""
    model = FAMILIES[family].build()
    if method == "M3ID":
        model = get_peft_model(model, M3IDConfig())
    elif method is not None:
        model = METHODS[method].attach(model)
    with watched(find_vlm(getattr(model, "get_base_model", lambda: model)())) as watcher:
        streamer = Streamer(watcher)
        result = probed(model, family, generate_kwargs={"min_new_tokens": 8, "streamer": streamer})
    found = result.forwards[-1]
    prompt, first, *glances = streamer.glances[: 1 + len(result.token_ids)]
    assert prompt is first is None
    assert [glance.share for glance in glances] == pytest.approx(found.mean_mass[1:], abs=TOLERANCE)
    assert found.mean_mass[-1] > 0.01
    for token in found.maps.keys() - {0}:
        assert glances[token - 1].weights == pytest.approx(found.maps[token], abs=TOLERANCE)


def test_watching_changes_nothing(probed):
    model = FAMILIES["qwen3_vl"].build()
    alone = probed(model, "qwen3_vl")
    with watched(find_vlm(model)):
        assert probed(model, "qwen3_vl").to_json() == alone.to_json()
    assert probed(model, "qwen3_vl").to_json() == alone.to_json()

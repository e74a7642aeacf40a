"""`peft-pvm scale --device`: what is counted, how it grows with the shape, and what becomes of it on a device."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from environment import on_a_cpu


pytest.importorskip("typer", reason="the command needs the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.bench import prediction
from peft_pvm.bench.models import PRESETS
from peft_pvm.bench.prediction import Device, Prediction, Traffic, check_predictions
from peft_pvm.bench.runners import Settings
from peft_pvm.cli.app import app


NAMES = ("pvm", "dipe", "cai")
CHAT = dict(context=4096, visual_tokens=1024)


@pytest.fixture(scope="module")
def large() -> Prediction:
    return Prediction(PRESETS["8b-random"], NAMES)


def test_what_takes_longer_decides():
    device = Device("", bandwidth=100.0, flops=1000.0, launch=0.01, kernel=0.001)
    assert device.seconds(10, read=50, multiplied=0, in_graph=False) == pytest.approx(0.5)
    assert device.seconds(90, read=50, multiplied=0, in_graph=False) == pytest.approx(0.9)
    assert device.seconds(10, read=50, multiplied=700, in_graph=False) == pytest.approx(0.7)
    assert device.seconds(90, read=50, multiplied=0, in_graph=True) == pytest.approx(0.59)
    waiting = dataclasses.replace(device, runs_ahead=False)
    assert waiting.seconds(90, read=50, multiplied=0, in_graph=False) == pytest.approx(1.4)


def test_traffic_is_told_apart_by_what_it_grows_with():
    shape, keys, visual = PRESETS["tiny"], prediction.NUM_KEYS, prediction.VISUAL_TOKENS
    traffic = Traffic(shape)
    cache, weight = torch.zeros(1, 2, keys, shape.head_dim), torch.zeros(shape.vocab_size, shape.hidden_size)
    row, image = torch.zeros(1, shape.heads, 1, keys), torch.zeros(1, visual, shape.hidden_size)
    traffic.look("cat", [cache[:, :, 1:], cache])
    traffic.look("mul", [row, row, torch.zeros(3, 5)])
    traffic.look("where", [torch.zeros(1, 1, 1, keys, dtype=torch.bool).expand(1, shape.heads, 1, keys)])
    traffic.look("bmm", [image, torch.zeros(1, shape.heads, 1, visual)])
    traffic.look("mm", [weight.t()])
    traffic.look("embedding", [weight])
    assert traffic.touched == {
        "cache": (2 * keys - 1) * 2 * shape.head_dim * 4,
        "rows": 2 * keys * shape.heads * 4 + keys,
        "images": visual * shape.hidden_size * 4,
        "visual rows": visual * shape.heads * 4,
        "head": shape.vocab_size * shape.hidden_size * 4,
    }


@on_a_cpu
def test_of_the_shape_that_is_counted_it_says_what_was_counted(large: Prediction):
    small = Prediction(PRESETS["tiny"], NAMES)
    for name in ("base", *NAMES):
        assert small.launches(name, in_graph=False) == small.steps[name, False].launches.total
    assert large.launches("base", in_graph=False) > 5 * small.launches("base", in_graph=False)


def test_the_base_reads_its_weights_and_its_cache_once(large: Prediction):
    for batch in (1, 64):
        expected, _ = large.foot.read(batch=batch, **CHAT)
        assert large.read("base", True, batch=batch, **CHAT) == pytest.approx(expected, rel=0.002)


def test_an_early_exit_reads_the_head_in_each_of_its_layers(large: Prediction):
    shape, beyond = large.shape, large.read("cai", True, batch=1, **CHAT) - large.read("base", True, batch=1, **CHAT)
    heads = large.layers["cai"] * 2 * shape.vocab_size * shape.hidden_size
    assert large.layers["cai"] == 18
    assert heads < beyond < 1.1 * heads


def test_what_grows_with_the_batch_and_what_does_not(large: Prediction):
    def beyond(name: str, batch: int) -> float:
        return large.read(name, False, batch=batch, **CHAT) - large.read("base", False, batch=batch, **CHAT)

    assert beyond("dipe", 64) == pytest.approx(64 * beyond("dipe", 1))
    assert beyond("pvm", 64) == pytest.approx(large.foot.pvm_weights + 64 * 1024 * large.foot.projections)


def test_constants_of_a_cpu_are_found_again(monkeypatch: pytest.MonkeyPatch):
    """Times made of known constants: what decides is found, and every prediction is what was made."""
    device = Device("", bandwidth=20e9, flops=math.inf, launch=12e-6, runs_ahead=False)
    made = {}

    def measured(shape, names, settings, progress):
        own = made[shape.title] = Prediction(shape, names, torch.float32)
        work = own.seconds(device, "base", False, settings.contexts[0], settings.visual_tokens, 1)
        times = {name: own.seconds(device, name, False, 512, 256, 1) for name in own.names}
        return {**times, "base": own.launches("base", False) * device.launch if shape is PRESETS["tiny"] else work}

    monkeypatch.setattr(prediction, "_measured", measured)
    found = check_predictions(["pvm"], Settings(methods=(), contexts=(512,), visual_tokens=256))
    assert (found["launch_us"], found["bandwidth_gb"]) == (pytest.approx(12), pytest.approx(20))
    assert len(found["shapes"]) == 2
    for methods in found["shapes"].values():
        assert methods["pvm"]["predicted"] == pytest.approx(methods["pvm"]["measured"])


def test_steps_are_measured(monkeypatch: pytest.MonkeyPatch):
    settings = Settings(methods=(), contexts=(90,), visual_tokens=40, rounds=1, new_tokens=1)
    said: list[str] = []
    taken = prediction._measured(PRESETS["tiny"], ["pvm"], settings, said.append)
    assert set(taken) == {"base", "pvm"}
    assert all(0 < time < 60 for time in taken.values())
    assert said[-1].endswith("round 1 of 1")


def run(*arguments: str):
    return CliRunner().invoke(app, ["scale", *arguments], env={"COLUMNS": "200"})


def test_the_command():
    arguments = "--device", "h100", "--method", "pvm", "--batch", "1,8"
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "Qwen3-VL-8B, H100 SXM, 80 GB, batch 8" in done.output
    assert "3,350 GB a second" in done.output
    written = json.loads(run(*arguments, "--json").stdout)
    assert (written["context"], written["visual_tokens"], list(written["batches"])) == (4096, 256, ["1", "8"])
    assert list(written["batches"]["8"]) == ["base", "pvm"]


def test_the_check(monkeypatch: pytest.MonkeyPatch):
    shapes = {"a shape": {"base": {"measured": 2.0, "predicted": 3.0}}}
    result = {"launch_us": 12.0, "bandwidth_gb": 20.0, "shapes": shapes}
    monkeypatch.setattr(prediction, "check_predictions", lambda names, settings, progress: result)
    done = run("--check")
    assert done.exit_code == 0, done.output
    assert "1.50" in done.output
    assert "12.0 us" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "'abacus' is not one of 'h100'"),
        (["--device", "h100", "--bandwidth", "3"], "It predicts times, so --bandwidth cannot be given"),
        (["--device", "h100", "--method", "vista"], "--method"),
        (["--device", "h100", "--context", "100"], "256 visual tokens are no part of 100"),
        (["--check", "--batch", "3"], "It has a prompt and shapes of its own, so --batch cannot be given"),
        (["--method", "pvm"], "'--method': It has an effect with --device or --check alone"),
    ],
)
def test_refusals(arguments: list[str], message: str):
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())

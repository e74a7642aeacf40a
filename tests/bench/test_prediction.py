"""`peft-pvm scale --device`: what is counted, how it grows with the shape, and what becomes of it on a device."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from environment import on_a_cpu
from pages import REPOSITORY


pytest.importorskip("typer", reason="the command needs the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.bench import prediction
from peft_pvm.bench.models import PRESETS, Shape, build_random
from peft_pvm.bench.prediction import (
    NUM_KEYS,
    PREDICTED,
    VISUAL_TOKENS,
    Device,
    Prediction,
    Traffic,
    check_predictions,
    compared,
    count_step,
)
from peft_pvm.bench.runners import Settings
from peft_pvm.cli.app import app


NAMES = ("pvm", "dipe", "cai", "memvr")
CHAT = dict(context=4096, visual_tokens=1024)
RESULTS = REPOSITORY / "experiments" / "results" / "bench"
COUNTED = dict(context=NUM_KEYS, visual_tokens=VISUAL_TOKENS, batch=1)
# Another small shape. Nothing about it is in the proportions of the tiny one.
OTHER = Shape("another", 8, 320, 832, 8, 2, 64, 700, False)


@pytest.fixture(scope="module")
def large() -> Prediction:
    return Prediction(PRESETS["8b-random"], NAMES)


@pytest.fixture(scope="module")
def other() -> tuple[Prediction, torch.nn.Module]:
    return Prediction(OTHER, PREDICTED), build_random(OTHER, dtype=torch.bfloat16)


def test_what_takes_longer_decides():
    device = Device("", memory=0.0, bandwidth=100.0, flops=1000.0, launch=0.01, kernel=0.001)
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
    traffic.look("bmm", [image, torch.zeros(1, shape.heads, 1, visual)], 300)
    traffic.look("bmm", [row, cache], 500)
    traffic.look("mm", [weight.t()], 20)
    traffic.look("mm", [torch.zeros(3, 5), torch.zeros(5, 3)], 1)
    traffic.look("embedding", [weight])
    assert traffic.touched == {
        "cache": (3 * keys - 1) * 2 * shape.head_dim * 4,
        "rows": 3 * keys * shape.heads * 4,
        "keys": keys,
        "images": visual * shape.hidden_size * 4,
        "visual rows": visual * shape.heads * 4,
        "head": shape.vocab_size * shape.hidden_size * 4,
    }
    assert traffic.multiplied == {"images": 300, "cache": 500, "head": 20, "else": 1}


@on_a_cpu
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("name", PREDICTED[1:])
def test_what_is_counted_on_one_shape_holds_for_another(
    name: str, in_graph: bool, other: tuple[Prediction, torch.nn.Module]
):
    """What is done once a step is taken as if it were done in each layer: in CAI, T-DRS and others, some bytes."""
    prediction, model = other
    base, own = (count_step(model, OTHER, which, in_graph) for which in ("base", name))
    assert prediction.launches(name, in_graph) == own.launches.total

    def beyond(predict: Callable[..., float]) -> float:
        return predict(name, in_graph, **COUNTED) - predict("base", in_graph, **COUNTED)

    of_base, multiplied = (sum(step.multiplied.values()) for step in (base, own))
    assert prediction.multiplied("base", in_graph, **COUNTED) == pytest.approx(of_base, rel=0.001)
    assert beyond(prediction.multiplied) == pytest.approx(multiplied - of_base, rel=0.02)
    if name != "pvm":  # whose weights are no part of what is counted
        touched = sum(own.touched.values()) - sum(base.touched.values())
        assert beyond(prediction.read) == pytest.approx(touched, rel=0.1)


@on_a_cpu
def test_of_the_shape_that_is_counted_it_says_what_was_counted(large: Prediction):
    small = Prediction(PRESETS["tiny"], NAMES)
    for name in ("base", *NAMES):
        assert small.launches(name, in_graph=False) == small.steps[name, False].launches.total
    assert large.launches("base", in_graph=False) > 5 * small.launches("base", in_graph=False)


def test_views_count_where_python_calls_them(large: Prediction):
    """All that Python calls takes its time, also what computes nothing. A graph has operations alone."""
    for name in ("base", *NAMES):
        names = [large.steps[name, in_graph].launches.names for in_graph in (False, True)]
        assert ["view" in launched for launched in names] == [True, False]


def test_products_of_the_base_are_those_of_its_weights_and_its_attention(large: Prediction):
    shape, context, batch = large.shape, CHAT["context"], 64
    attention = 4 * batch * context * shape.heads * shape.head_dim * shape.layers
    weights = 2 * batch * large.foot.weights / 2
    assert large.multiplied("base", True, batch=batch, **CHAT) == pytest.approx(weights + attention)


def test_an_early_exit_multiplies_the_head_in_each_of_its_layers(large: Prediction):
    shape = large.shape
    for name in ("cai", "memvr"):
        one, many = (
            large.multiplied(name, True, batch=batch, **CHAT) - large.multiplied("base", True, batch=batch, **CHAT)
            for batch in (1, 64)
        )
        heads = large.layers[name] * 2 * shape.vocab_size * shape.hidden_size
        assert heads < one < 1.1 * heads
        assert many == pytest.approx(64 * one)


def test_what_does_not_fit_is_told(large: Prediction):
    """Weights, 8.2 billion numbers in bf16, and a cache of 144 KiB a token."""
    held = large.held("base", batch=64, **CHAT)
    assert held == pytest.approx(2 * 8.19e9 + 64 * 4096 * 144 * 1024, rel=0.001)
    assert 1 < large.held("pvm", batch=64, **CHAT) / held < 1.02
    arguments = "--device", "4090", "--preset", "32b-random", "--context", "32768", "--batch", "64", "--method", "pvm"
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("does not fit: 615 GB of 24") == 1  # the base; PVM keeps more
    assert done.stdout.count("does not fit: ") == 2
    written = json.loads(run(*arguments, "--json").stdout)
    assert written["device"]["memory"] == 24e9
    assert [row["fits"] for row in written["batches"]["64"].values()] == [False, False]
    assert written["batches"]["64"]["base"]["held_gb"] == pytest.approx(615, abs=1)


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
    """Times made of known constants: these are found, and every prediction is what was made."""
    device = Device("", memory=math.inf, bandwidth=20e9, flops=math.inf, launch=12e-6, runs_ahead=False)

    def measured(shape, names, settings, progress):
        own = Prediction(shape, names, torch.float32)
        return {name: own.seconds(device, name, False, 512, 256, 1) for name in own.names}

    monkeypatch.setattr(prediction, "_measured", measured)
    found = check_predictions(["pvm"], Settings(methods=(), contexts=(512,), visual_tokens=256))
    assert (found["launch_us"], found["bandwidth_gb"]) == (pytest.approx(12), pytest.approx(20))
    assert len(found["shapes"]) == 2
    for methods in found["shapes"].values():
        for step in methods.values():
            assert step["predicted"] == pytest.approx(step["measured"])


def test_what_was_measured_is_predicted_within_a_fifth():
    """The file that the page cites: what was measured on a CPU, with what was counted then."""
    stored = json.loads((RESULTS / "prediction-check.json").read_text())
    found = compared(stored["shapes"])
    for constant in ("launch_us", "bandwidth_gb"):
        assert stored[constant] == pytest.approx(found[constant])
    for title, methods in found["shapes"].items():
        assert list(methods) == list(PREDICTED)
        assert methods["base"]["predicted"] == pytest.approx(methods["base"]["measured"])
        for name, step in methods.items():
            assert step["predicted"] == pytest.approx(stored["shapes"][title][name]["predicted"])
            assert step["predicted"] == pytest.approx(step["measured"], rel=0.2), (title, name)


@on_a_cpu
@pytest.mark.skipif(
    f"transformers=={transformers.__version__}\n" not in (REPOSITORY / "constraints.txt").read_text(),
    reason="another transformers launches other operations",
)
@pytest.mark.parametrize("size", ["2b", "8b", "32b"])
def test_stored_predictions_are_of_the_operations_of_today(size: str):
    stored = json.loads((RESULTS / f"predicted-h100-{size}.json").read_text())
    made = Prediction(PRESETS[f"{size}-random"], PREDICTED)
    for batch, methods in stored["batches"].items():
        written = {name: [row[kind]["launches"] for kind in ("eager", "graph")] for name, row in methods.items()}
        counted = {name: [made.launches(name, in_graph) for in_graph in (False, True)] for name in PREDICTED}
        assert written == counted, f"predicted-h100-{size}.json, batch {batch}: run `make predictions`"


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
        (["--method", "pvm"], "'--method': It has an effect only with --device or --check"),
    ],
)
def test_refusals(arguments: list[str], message: str):
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())

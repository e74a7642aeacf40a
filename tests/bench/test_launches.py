"""`peft-pvm bench --launches`: what is counted, where, and what each method needs in a step of decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fresh
import pytest
import torch
from environment import on_a_cpu
from fresh import needs_fork
from tiny_vlms import FAMILIES
from torch import nn


pytest.importorskip("typer", reason="the command needs the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.bench.launches import Launches, count_launches, measure_launches, summary
from peft_pvm.bench.models import ALL, METHODS, build_random
from peft_pvm.bench.runners import Settings
from peft_pvm.cli.app import app
from peft_pvm.methods.tdrs import blockwise
from peft_pvm.tokens.families import find_vlm


BENCH = Path(__file__).parents[2] / "experiments" / "results" / "bench"
PROMPT = dict(contexts=(90,), visual_tokens=40)
DTYPES = ("float32", "bfloat16")
BASE = {"float32": 310, "bfloat16": 362}  # in all
# Beyond the base, in fp32 and in bf16: in each layer that a method changes, and once a step.
NEEDED = {
    "pvm": ((17, 0), (17, 0)),
    "dipe": ((4, 23), (6, 23)),
    "t-drs": ((38, 33), (44, 33)),
    "vaf": ((3, 16), (3, 17)),
    "log-bias": ((3, 10), (4, 10)),
    "pai": ((6, 0), (8, 0)),
    "hgai": ((7, 0), (9, 0)),
    "cai": ((15, 21), (18, 23)),
    "var": ((14, 18), (16, 18)),
    "savaa": ((3, 22), (3, 24)),
    "sparc": ((1, 28), (2, 29)),
    "memvr": ((18, 2), (22, 3)),
    "vista": ((13, 4), (15, 5)),
    "m3id": ((48, 44), (56, 49)),  # a second forward
    "vcd": ((48, 39), (56, 44)),
}
# At most, in each layer, whatever the dtype: what docs/performance.md calls the aims.
AIMS = {"pvm": 18, "dipe": 10, "t-drs": 45, "vaf": 6, "log-bias": 6, "savaa": 6, "var": 16, "memvr": 10, "vista": 10}
MISSED = {"memvr", "vista"}
# The same with what layers share, by the layers of a model of 36 on which the method acts.
LAYERS_OF_36 = {
    **dict(pvm=3, vaf=7, savaa=11, memvr=11, var=33),
    **dict.fromkeys(("dipe", "t-drs", "log-bias", "vista"), 36),
}
MISSED_WITH_SHARED = {*MISSED, "var"}

# Machine code that was compiled for another CPU, and kept, would end the process: this one has a folder of its own.
COMPILED = """
import faulthandler, os, sys

faulthandler.enable()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[1]

import torch
from torch import nn

from peft_pvm.bench.launches import count_kernels

linear = nn.Linear(8, 8)
options = {"cpp.enable_kernel_profile": True, "cpp_cache_precompile_headers": False}  # for one kernel
compiled = torch.compile(lambda x: linear(x).relu() * 2 + 1, fullgraph=True, options=options)
x = torch.ones(2, 8)
with torch.no_grad():
    compiled(x)
print(count_kernels(lambda: compiled(x * 1)), end="")
"""


@pytest.fixture(scope="module")
def tiny() -> dict[str, nn.Module]:
    return {dtype: build_random("tiny", dtype=getattr(torch, dtype)) for dtype in DTYPES}


def test_views_are_free_and_layers_are_told_apart():
    model = FAMILIES["llava"].build()
    layers, weight = find_vlm(model).layers, torch.ones(4, 4)

    def forward() -> None:
        torch.empty(3).view(3, 1).detach()
        assert weight.view(2, 8).unsqueeze(0)[..., 1:].shape == (1, 2, 7)
        weight @ weight.t() + 1

    layers[1].register_forward_pre_hook(lambda module, args: forward())
    layers[2].register_forward_hook(lambda module, args, output: forward())
    inputs = FAMILIES["llava"].inputs(model, "t4 i t3")
    plain = count_launches(FAMILIES["llava"].build(), lambda: FAMILIES["llava"].build()(**inputs))
    assert plain.layers == (0, 0, 0)
    found = count_launches(model, lambda: [forward(), model(**inputs)])
    assert found.layers[1] == found.layers[2] == found.layers[0] + 2
    assert found.total == found.outside + sum(found.layers) == sum(found.names.values())
    assert {"mm", "add"} <= set(found.names)
    assert not {"t", "view", "unsqueeze", "slice", "detach", "empty"} & set(found.names)
    assert not any(layer._forward_hooks for layer in layers[:2])


@on_a_cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@needs_fork
def test_kernels_of_a_compiled_forward(tmp_path):
    """A product of matrices is torch's, the rest is one kernel of inductor's. What runs outside does not count."""
    assert fresh.run(COMPILED, tmp_path) == "2"


def test_what_layers_share_is_counted_once():
    base, own = Launches(9, (5, 5, 5), {}), Launches(10, (15, 8, 5), {})
    assert summary(own, base) == {"in all": 38, "beyond the base": 14, "layers": 2, "a layer": 3, "once": 8}
    assert summary(base, base) == {"in all": 24, "beyond the base": 0, "layers": 0, "a layer": 0, "once": 0}


def test_every_method_has_its_number():
    assert {"base", *NEEDED} == set(ALL)


def test_the_recorded_numbers_are_these():
    """From which docs/performance.md has its table."""
    recorded = [json.loads((BENCH / f"launches-{dtype}.json").read_text())["methods"] for dtype in ("fp32", "bf16")]
    for name, needed in NEEDED.items():
        steps = [methods[name]["step"] for methods in recorded]
        assert tuple((step["a layer"], step["once"]) for step in steps) == needed, name


def test_which_aims_are_met():
    beyond = {name for name, aim in AIMS.items() if max(a_layer for a_layer, _ in NEEDED[name]) > aim}
    assert beyond == MISSED
    means = {name: max(a_layer + once / LAYERS_OF_36[name] for a_layer, once in NEEDED[name]) for name in AIMS}
    assert {name for name, aim in AIMS.items() if means[name] > aim} == MISSED_WITH_SHARED


@pytest.mark.parametrize("name", [name for name in AIMS if name != "pvm"])
def test_on_how_many_layers_of_36_a_method_acts(tiny: dict[str, nn.Module], name: str):
    (make,) = METHODS[name].adapters
    assert len(make(tiny["float32"]).layers_among(list(range(36)))) == LAYERS_OF_36[name]


@on_a_cpu
@pytest.mark.parametrize(("number", "dtype"), enumerate(DTYPES))
def test_a_step_needs_no_more(tiny: dict[str, nn.Module], number: int, dtype: str):
    found = measure_launches(tiny[dtype], Settings(methods=tuple(NEEDED), **PROMPT))["methods"]
    steps = {name: own["step"] for name, own in found.items()}
    assert {name: (steps[name]["a layer"], steps[name]["once"]) for name in NEEDED} == {
        name: needed[number] for name, needed in NEEDED.items()
    }
    assert steps["base"]["in all"] == BASE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_length_of_the_context_does_not_count(tiny: dict[str, nn.Module], dtype: str):
    """Where it does not decide how many keys T-DRS takes at a time, on a CPU alone."""
    found = [
        measure_launches(tiny[dtype], Settings(methods=tuple(NEEDED), contexts=(length,), visual_tokens=40))
        for length in (90, 300)
    ]
    steps = [{name: own["step"] for name, own in one["methods"].items()} for one in found]
    assert steps[0] == steps[1]


@on_a_cpu
def test_a_cpu_takes_many_keys_in_pieces(tiny: dict[str, nn.Module], monkeypatch):
    """Then T-DRS needs more operations, up to the size of a piece: nothing else depends on the length."""
    settings = Settings(methods=("t-drs",), **PROMPT)
    monkeypatch.setattr(blockwise, "ELEMENTS_IN_CACHE", 2**12)
    step = measure_launches(tiny["float32"], settings)["methods"]["t-drs"]["step"]
    assert step["a layer"] > NEEDED["t-drs"][0][0]


def test_the_command(tmp_path: Path):
    arguments = ["bench", "--launches", "--method", "pvm", "--context", "90", "--visual-tokens", "40"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Operations, 90 tokens, 40 of them visual" in done.output
    printed = CliRunner().invoke(app, [*arguments, "--json"]).stdout
    (tmp_path / "launches.json").write_text(printed)
    shown = CliRunner().invoke(app, ["bench", "--show", str(tmp_path / "launches.json")])
    assert shown.exit_code == 0, shown.output
    assert shown.output == done.output
    arguments_of_plot = ["--show", str(tmp_path / "launches.json"), "--plot", str(tmp_path / "launches.png")]
    without_plot = CliRunner().invoke(app, ["bench", *arguments_of_plot])
    assert without_plot.exit_code == 2
    assert "holds counts of operations" in without_plot.stderr
    written = json.loads(printed)
    assert written["methods"]["pvm"]["step"]["a layer"] == NEEDED["pvm"][0][0]
    refused = CliRunner().invoke(app, [*arguments, "--rounds", "3"])
    assert refused.exit_code == 2
    assert "It times nothing, so --rounds cannot be given" in refused.stderr

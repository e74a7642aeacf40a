"""`peft-pvm bench --launches`: what is counted, where, and what each method needs in a step of decoding."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from environment import on_a_cpu
from tiny_vlms import FAMILIES
from torch import nn


pytest.importorskip("typer", reason="the command needs the extra `lab`")

from typer.testing import CliRunner

from peft_pvm.bench.launches import Launches, count_kernels, count_launches, measure_launches, summary
from peft_pvm.bench.models import ALL, METHODS, build_random
from peft_pvm.bench.runners import Settings
from peft_pvm.cli.app import app
from peft_pvm.tokens.families import find_vlm


PROMPT = dict(contexts=(90,), visual_tokens=40)
# Beyond the base: in each layer that a method changes, and once a step.
NEEDED = {
    "pvm": (18, 0),
    "dipe": (5, 37),
    "t-drs": (44, 55),
    "vaf": (3, 28),
    "log-bias": (5, 17),
    "pai": (6, 9),
    "hgai": (7, 9),
    "cai": (20, 30),
    "var": (15, 15),
    "savaa": (3, 34),
    "sparc": (1, 37),
    "memvr": (23, 2),
}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build_random("tiny")


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
def test_kernels_of_a_compiled_forward():
    """A product of matrices is torch's, the rest is one kernel of inductor's. What runs outside does not count."""
    linear = nn.Linear(8, 8)
    options = {"cpp.enable_kernel_profile": True, "cpp_cache_precompile_headers": False}  # for one kernel
    compiled = torch.compile(lambda x: linear(x).relu() * 2 + 1, fullgraph=True, options=options)
    x = torch.ones(2, 8)
    with torch.no_grad():
        compiled(x)
    assert count_kernels(lambda: compiled(x * 1)) == 2


def test_what_layers_share_is_counted_once():
    base, own = Launches(9, (5, 5, 5), {}), Launches(10, (15, 8, 5), {})
    assert summary(own, base) == {"in all": 38, "beyond the base": 14, "layers": 2, "a layer": 3, "once": 8}
    assert summary(base, base) == {"in all": 24, "beyond the base": 0, "layers": 0, "a layer": 0, "once": 0}


def test_every_method_has_its_number():
    assert {"base", *NEEDED} == {name for name in ALL if not METHODS[name].in_generate}


@on_a_cpu
@pytest.mark.parametrize("name", NEEDED)
def test_a_step_needs_no_more(tiny: nn.Module, name: str):
    step = measure_launches(tiny, Settings(methods=(name,), **PROMPT))["methods"][name]["step"]
    assert (step["a layer"], step["once"]) == NEEDED[name]


def test_the_length_of_the_context_does_not_count(tiny: nn.Module):
    found = [
        measure_launches(tiny, Settings(methods=("pvm", "dipe"), contexts=(length,), visual_tokens=40))["methods"]
        for length in (90, 300)
    ]
    assert found[0] == found[1]


def test_what_is_not_counted_is_named():
    arguments = ["bench", "--launches", "--method", "vista,m3id,vcd", "--context", "90", "--visual-tokens", "40"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert "Not counted, because they act in generate alone: VISTA, M3ID, VCD." in done.output
    written = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert written["not_counted"] == ["vista", "m3id", "vcd"]
    assert list(written["methods"]) == ["base"]


def test_the_command():
    arguments = ["bench", "--launches", "--method", "pvm", "--context", "90", "--visual-tokens", "40"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Operations, 90 tokens, 40 of them visual" in done.output
    written = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert written["methods"]["pvm"]["step"]["a layer"] == NEEDED["pvm"][0]
    refused = CliRunner().invoke(app, [*arguments, "--rounds", "3"])
    assert refused.exit_code == 2
    assert "It times nothing, so --rounds cannot be given" in refused.stderr

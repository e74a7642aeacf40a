"""`peft-pvm bench`: what is measured is what it says; the command, its files and its refusals."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import time
from pathlib import Path

import psutil
import pytest
import torch
from forwards import logits
from tiny_vlms import FAMILIES
from transformers import Qwen3VLForConditionalGeneration


pytest.importorskip("typer", reason="the command needs the extra `lab`")
pytest.importorskip("matplotlib", reason="the command needs the extra `lab`")

from rich.console import Console
from typer.testing import CliRunner

from peft_pvm.bench import models
from peft_pvm.bench import run as bench_run
from peft_pvm.bench.models import (
    ALL,
    METHODS,
    PRESETS,
    build_random,
    fill_at_random,
    footprint,
    pvm_config,
    structural_copy,
)
from peft_pvm.bench.report import print_tables, ratios
from peft_pvm.bench.run import free_bytes, import_seconds, measure, peak_bytes, seconds
from peft_pvm.bench.runners import GenerateRunner, Runner, Settings, runner_of
from peft_pvm.cli.app import app
from peft_pvm.cli.work import bench as work
from peft_pvm.methods import METHODS as PACKAGED
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.attention_method import AttentionMethod


CPU = torch.device("cpu")
QUICK = dict(contexts=(90,), visual_tokens=40, rounds=2, prefills=2, new_tokens=2)


@pytest.fixture(autouse=True)
def _import_times(monkeypatch):
    """Starting Python ten times is for the one test that wants it."""
    monkeypatch.setattr(bench_run, "import_seconds", lambda: (3.0, 0.1))


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})


def test_seconds_are_seconds():
    start = time.perf_counter()
    assert 0.02 <= seconds(lambda: time.sleep(0.02), CPU) <= time.perf_counter() - start


def test_peak_bytes_are_what_is_held_at_once():
    before = torch.zeros(1000)

    def work():
        first = before + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 more
        del first
        return second * 2  # 8,000 more, when the first 4,000 are gone

    assert peak_bytes(work, CPU) == pytest.approx(16_000, abs=100)  # the numbers 1 and 2 are tensors as well


def test_garbage_of_an_earlier_call_is_not_counted_off():
    def litter():
        garbage: list = [torch.zeros(100_000)]
        garbage.append(garbage)

    def work():
        gc.collect()
        return torch.ones(1000)

    gc.disable()
    try:
        assert peak_bytes(litter, CPU) == 400_000
        assert peak_bytes(work, CPU) == 4_000
    finally:
        gc.enable()


def test_memory_is_left():
    assert free_bytes(CPU) > 2**28


@pytest.mark.parametrize(
    ("preset", "billions"),
    [("tiny", 0.00125), ("1b-random", 1.12), ("2b-random", 1.72), ("8b-random", 8.19), ("32b-random", 32.8)],
)
def test_presets_are_of_their_size(preset: str, billions: float):
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(PRESETS[preset].config())
    assert model.model.language_model.num_parameters() / 1e9 + (
        0 if PRESETS[preset].ties_embeddings else model.lm_head.weight.numel() / 1e9
    ) == pytest.approx(billions, rel=0.02)


def test_fewer_layers_keep_the_proportions():
    whole, part = PRESETS["8b-random"].config().text_config, PRESETS["8b-random"].config(12).text_config
    assert (part.num_hidden_layers, part.vocab_size) == (12, whole.vocab_size // 3)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(PRESETS["8b-random"].config(12))
    config = pvm_config(model)
    assert (config.r, len(config.layers_to_transform)) == (512, 1)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(PRESETS["8b-random"].config())
    assert (pvm_config(model).r, len(pvm_config(model).layers_to_transform)) == (512, 3)


def test_random_weights_are_drawn_for_every_matrix():
    model = build_random("tiny")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    fill_at_random(twin := build_random("tiny"))
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)


def test_copies_share_weights_and_nothing_else():
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    inputs = family.inputs(model, "t4 i t6")
    before = logits(model, inputs)
    twin = structural_copy(model)
    METHODS["pvm+dipe"].attach(twin)
    assert {p.data_ptr() for p in model.parameters()} <= {p.data_ptr() for p in twin.parameters()}
    assert (logits(twin, inputs) - before).abs().max() > 1e-3
    assert torch.equal(logits(model, inputs), before)


def test_every_method_is_measured():
    model = FAMILIES["gemma3"].build()
    settings = Settings(methods=tuple(METHODS), **QUICK)
    result = measure(model, settings)
    (entry,) = result["contexts"]
    assert list(entry["methods"]) == list(METHODS)
    for method, measured in entry["methods"].items():
        assert measured["left_out"] is None
        assert len(measured["prefill_s"]) == len(measured["decode_s"]) == 2
        assert min(measured["prefill_s"] + measured["decode_s"]) > 0
        assert min(measured["prefill_bytes"], measured["decode_bytes"]) > 0
        steers = any(row.name.lower() in method for row in PACKAGED if issubclass(row.config, AttentionMethod))
        assert (len(measured["attention_decode"]) == 2) == steers
        assert (len(measured["attention_prefill"]) == 2) == (steers and method != "savaa")  # which acts in steps alone
        for what in ("prefill_s", "decode_s"):
            assert len(ratios(result, 90, method, what)) == 2
    by_name = entry["methods"]
    assert by_name["t-drs-naive"]["prefill_bytes"] > by_name["base"]["prefill_bytes"]
    assert all(result["loading"][what] > 0 for what in ("attach", "first_forward", "load", "swap", "draw_weights"))


def test_naive_methods_are_naive(monkeypatch):
    made: list[torch.nn.Module] = []
    monkeypatch.setattr(models, "make_naive", made.append)
    for name, method in METHODS.items():
        made.clear()
        method.attach(model := build_random("tiny"))
        assert made == [model] * name.endswith("-naive")


def test_a_method_acts_while_it_is_measured():
    """The prompt has its image, and steps go on from it."""
    model, settings = build_random("tiny"), Settings(**QUICK)
    runner = Runner(model, "pvm", 90, settings)
    with torch.no_grad():
        runner.prefill()
        assert runner.cache.visual_memory.slots.shape == (1, 40)
        runner.decode()
        assert runner.cache.get_seq_length() == runner.length == 91
        assert len(runner.cache.visual_memory.projections) == 1  # one branch: projected, and kept


def test_all_is_every_method():
    assert set(ALL) == {"base", *(row.name.lower() for row in PACKAGED)}


# How many tokens each forward of a prefill reads, of 90 with 40 visual ones, and how many forwards a step takes.
FORWARDS = {"vista": ([90, 50, 90], 1), "m3id": ([50, 90], 2), "vcd": ([90, 90], 2)}


@pytest.mark.parametrize("how", [{}, {"static_cache": True}, {"batch": 2}])
@pytest.mark.parametrize("method", ALL)
def test_second_runs_are_measured(method: str, how: dict):
    """What `generate` reads beside the prompt belongs to the prefill, and a second forward to each token."""
    runner = runner_of(build_random("tiny", 2), method, 90, Settings(**QUICK, **how))
    read: list[int] = []
    text_model = find_vlm(runner.model).text_model
    text_model.register_forward_hook(lambda module, args, output: read.append(output[0].shape[1]))
    prompt, number = FORWARDS.get(method, ([90], 1))
    with torch.no_grad():
        runner.prefill()
        assert read == prompt
        for _ in range(2):
            read.clear()
            runner.decode()
            assert read == [1] * number


def seen_logits(method: str) -> list[torch.Tensor]:
    """The logits, or scores, of a prefill and three steps, on the tiny shape."""
    runner, seen = runner_of(build_random("tiny", 2), method, 90, Settings(**QUICK)), []

    def noting(function):
        return lambda *args: seen.append(function(*args)) or seen[-1]

    with torch.no_grad():
        if isinstance(runner, GenerateRunner):
            runner.prefill()
            runner.processors = noting(runner.processors)
        else:
            runner._read, runner._go_on = noting(runner._read), noting(runner._go_on)
            runner.prefill()
            seen.clear()
        for _ in range(3):
            runner.decode()
    return [logits.flatten() for logits in seen]


# PVM is as new, and VCD's noise is on pixels, which no vision tower reads here: both cost what they always cost.
@pytest.mark.parametrize("method", [name for name in ALL if name not in ("base", "pvm", "vcd")])
def test_methods_act_on_what_is_measured(method: str):
    assert (seen_logits(method)[-1] - seen_logits("base")[-1]).abs().max() > 1e-3


def test_what_cannot_be_measured_is_a_row_with_the_reason(monkeypatch):
    def refuse(model, name, context, settings):
        if name == refused:
            raise ValueError("not here")
        return runner_of(model, name, context, settings)

    monkeypatch.setattr(bench_run, "runner_of", refuse)
    monkeypatch.setattr(bench_run, "measure_loading", lambda model: refuse(model, refused, 0, None))
    refused = "dipe"
    result = measure(build_random("tiny", 2), Settings(methods=("vaf", "dipe"), **QUICK))
    methods = result["contexts"][0]["methods"]
    assert [methods[name]["left_out"] for name in ("base", "vaf", "dipe")] == [None, None, "not here"]
    print_tables(result, console := Console(record=True, width=200))
    written = console.export_text()
    assert "DIPE was left out: not here" in written
    assert "Loading was left out: not here" in written
    refused = "base"
    with pytest.raises(ValueError, match="not here"):
        measure(build_random("tiny", 2), Settings(methods=("vaf",), **QUICK))


def test_what_acts_in_generate_is_not_compiled():
    settings = Settings(methods=("m3id",), compile=True, **QUICK)
    with pytest.raises(NotImplementedError, match=r"M3ID acts in generate, and .* Measure it without compile"):
        runner_of(build_random("tiny", 2), "m3id", 90, settings)


def test_what_methods_are_told_is_written_down():
    result = measure(build_random("tiny", 2), Settings(methods=("var", "m3id"), **QUICK))
    assert result["given"] == {"var": {"sink_channels": [0], "tau": 2.0, "least_visual": 0.0}}
    print_tables(result, console := Console(record=True, width=300))
    written = console.export_text()
    assert "VAR: with sink_channels=[0], tau=2.0, least_visual=0.0, so that it acts" in written
    assert "M3ID: as in generate." in written


def test_the_command_takes_all(monkeypatch):
    taken: list[tuple[str, ...]] = []
    monkeypatch.setattr(work, "bench", lambda measured, settings, *rest: taken.append(settings.methods))
    for names in ("all", "pvm-naive,all,dipe"):
        assert run("--method", names).exit_code == 0
    assert taken == [ALL, ("pvm-naive", *ALL)]


@pytest.mark.parametrize("how", [{"static_cache": True}, {"compile": True}, {"batch": 2}])
def test_other_ways_to_measure(how: dict, monkeypatch):
    torch.compiler.reset()  # of which other tests may have traced too much for the limit below
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda model, mode, fullgraph: traced(model, fullgraph=fullgraph))
    with torch._dynamo.config.patch(recompile_limit=1):  # there may be more methods than torch allows
        result = measure(build_random("tiny"), Settings(methods=("dipe",), **{**QUICK, **how}))
    assert all(len(measured["decode_s"]) == 2 for measured in result["contexts"][0]["methods"].values())


def test_ratios_are_taken_within_a_round():
    methods = {"base": {"decode_s": [1.0, 2.0]}, "pvm": {"decode_s": [3.0, 4.0]}}
    assert ratios({"contexts": [{"context": 9, "methods": methods}]}, 9, "pvm", "decode_s") == [3.0, 2.0]


def test_free_memory_is_a_part_of_what_the_machine_has():
    assert 0 < bench_run.free_bytes(torch.device("cpu")) < psutil.virtual_memory().total


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(bench_run, "free_bytes", lambda device: 100_000)
    result = measure(build_random("tiny"), Settings(methods=("dipe", "dipe-naive"), **QUICK))
    methods = result["contexts"][0]["methods"]
    assert methods["dipe-naive"]["left_out"].startswith("needs ")
    assert methods["dipe"]["left_out"] is None
    print_tables(result, console := Console(record=True, width=200))
    assert "needs 0 GiB" in console.export_text()


def test_the_command(tmp_path: Path):
    arguments = ["--method", "pvm,dipe", "--context", "80,120", "--visual-tokens", "40", "--rounds", "2"]
    arguments += ["--plot", str(tmp_path / "bench.png"), "--prefills", "1", "--new-tokens", "2"]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    (tmp_path / "bench.json").write_text(result.stdout)
    written = json.loads(result.stdout)
    assert [entry["context"] for entry in written["contexts"]] == [80, 120]
    assert written["settings"]["visual_tokens"] == 40
    assert written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    shown = run("--show", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "again.png"))
    assert shown.exit_code == 0
    assert "80 tokens, 40 of them visual" in shown.stdout
    assert "PVM" in shown.stdout
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "bench.png").read_bytes()


def test_the_command_takes_a_model(tmp_path: Path):
    FAMILIES["llava"].build().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--context", "80", "--visual-tokens", "40", "--rounds", "1"]
    result = run(*arguments, "--prefills", "1", "--new-tokens", "1", "--method", "pvm")
    assert result.exit_code == 0, result.output
    assert "LlavaForConditionalGeneration" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "pvm,lora"], "'--method': 'pvm,lora' must be some of base, pvm"),
        (["--method", "pvm,"], "'--method': 'pvm,' must be some of base, pvm"),
        (["--preset", "70b"], "'--preset': '70b' is not one of 'tiny'"),
        (["--layers", "7"], "layers is 7, but"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of 'float32'"),
        (["--device", "gpu"], "'--device': 'gpu' cannot be used: Expected one of cpu"),
        (["--device", "meta"], "'--device': 'meta' cannot be used"),
        (["--context", "50", "--visual-tokens", "40"], "40 visual tokens need at least 57"),
        (["--attn-implementation", "nope"], "'--attn-implementation': 'nope' cannot be used"),
        (["--context", "many"], "'--context': 'many' must be whole numbers"),
        (["--rounds", "0"], "'--rounds': Input should be greater than or equal to 1, not '0'"),
        (["--model", "nowhere/there"], "nowhere/there"),
        (["--model", "nowhere/there", "--layers", "2"], "'--model': A model has its own shape"),
        (["--show", "nowhere.json"], "nowhere.json"),
        (["--show", __file__, "--rounds", "3"], "'--show': It measures nothing, so --rounds cannot be given"),
    ],
)
def test_refusals(arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


@pytest.mark.parametrize(
    "content", ["", "[", "[]", "{}", '{"contexts": [{}], "settings": 3, "model": []}', "[" * 10**5]
)
def test_what_is_no_measurement_is_not_shown(tmp_path: Path, content: str):
    (tmp_path / "bench.json").write_text(content)
    result = run("--show", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'bench.json'} ")
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize("preset", ["tiny", "1b-random"])
def test_scale_counts_what_is_kept(preset: str, monkeypatch):
    """The bytes of a conversation as they are, on a model of a sixth of the layers."""
    monkeypatch.setitem(PRESETS, preset, dataclasses.replace(PRESETS[preset], vocab_size=64, layers=6))
    foot = footprint(preset, bytes_of_a_number=4)
    model, settings = build_random(preset), Settings(**QUICK)
    runner = Runner(model, "pvm", 90, settings)
    with torch.no_grad():
        runner.prefill()
    layers, memory = runner.cache.layers, runner.cache.visual_memory
    cache, projections, embeddings = foot.kept(90, 40)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == cache
    assert sum(tensor.nbytes for pair in memory.projections.values() for tensor in pair) == projections
    assert memory.embeddings.nbytes == embeddings


def test_scale_is_the_papers():
    """512 bytes of keys and values for a visual token and branch, 4 KiB for a token and layer of the cache."""
    foot = footprint("8b-random")
    assert (foot.projections, foot.cache) == (3 * 512, 36 * 4096)
    six = footprint("8b-random", branches=6)
    assert (six.projections, six.pvm_weights, six.cache) == (2 * foot.projections, 2 * foot.pvm_weights, foot.cache)
    base, pvm = foot.read(context=4096, visual_tokens=1024, batch=1)
    assert base == pytest.approx(2 * 7.57e9 + 4096 * 36 * 4096, rel=0.01)
    assert pvm / base < 0.0035


def test_the_scale_command():
    result = CliRunner().invoke(app, ["scale", "--sequences", "1000000"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "1.57 TB" in result.output
    timed = CliRunner().invoke(app, ["scale", "--bandwidth", "1000", "--context", "4096", "--batch", "1"])
    assert "15.7" in timed.output  # 15.7 GB at 1,000 GB a second, in ms
    wrongs = {
        "preset": "70b",
        "bandwidth": "nan",
        "branches": "37",
        "context": "0",
        "batch": "x",
        "visual-tokens": "40000",
    }
    for name, wrong in wrongs.items():
        refused = CliRunner().invoke(app, ["scale", f"--{name}", wrong])
        assert refused.exit_code in (1, 2), name
        assert wrong in refused.stderr, name


def test_import_is_quick():
    """The whole package adds at most 0.3 s of CPU time to the import of PEFT, in one of three tries."""
    assert any(import_seconds(rounds=1)[1] < 0.3 for _ in range(3))

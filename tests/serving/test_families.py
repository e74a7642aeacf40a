"""Every family that vLLM serves with our adapters, tiny and random, against transformers with real processors.

The lab's Qwen3-VL has tests of its own, `test_engine.py`. It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

import torch
from delta_net import delta_nets
from methods_under_test import give_weight
from peft import get_peft_model
from served_families import SERVED
from served_models import (
    NEW_TOKENS,
    TOLERANCE,
    Answer,
    Request,
    ask_transformers,
    ask_vllm,
    assert_same,
    engine,
    engine_inside,
    exported,
    loras,
)
from transformers import AutoConfig, AutoModelForImageTextToText
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import register_cpu_gdn_attention_ops

from peft_pvm import DIPEConfig, LogBiasConfig, PVMConfig, VAFConfig
from peft_pvm.demo.tiny_vlm import tiny_vlm_config
from peft_pvm.integrations.vllm import export_vllm
from peft_pvm.integrations.vllm.export import switch_of
from peft_pvm.integrations.vllm.families import FAMILIES, TEXT_MODELS


pytestmark = pytest.mark.every_family  # here a family tells something new, whatever it is a twin of elsewhere

# Another text model in the same model is tested with both adapters at once.
SERVINGS = [(name, "pvm+dipe") for name in SERVED] + [
    (name, adapter)
    for name, family in SERVED.items()
    if family.text is None
    for adapter in ("pvm", "dipe", "vaf+log-bias")
]
SETTINGS = dict(limit_mm_per_prompt={"image": 2, "video": 0}, max_model_len=512)


@dataclass
class Served:
    """A family with adapters: the folder for vLLM, and what is to be answered, and without the adapters."""

    folder: Path
    requests: list[Request]
    off: list[Answer]
    expected: list[Answer]
    together: list[Answer] = field(default_factory=list)
    again: list[Answer] = field(default_factory=list)
    alone: list[Answer] = field(default_factory=list)


@pytest.fixture(scope="module", autouse=True)
def delta_nets_in_fp32() -> Iterator[None]:
    """vLLM's kernels for them on a CPU take bf16 alone."""
    register_cpu_gdn_attention_ops()
    with torch.library._scoped_library("vllm", "IMPL", "CPU") as kernels:
        kernels.impl("cpu_gdn_attention_core", delta_nets, allow_override=True)
        yield


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory):
    """Makes it of a family and a combination of adapters, once."""
    made: dict[tuple[str, str], Served] = {}
    bases: dict[str, Path] = {}

    def base_of(family: str) -> Path:
        if family not in bases:
            bases[family] = tmp_path_factory.mktemp(family)
            SERVED[family].save(bases[family] / "base")
            model = AutoModelForImageTextToText.from_pretrained(bases[family] / "base")
            model = get_peft_model(model, PVMConfig(r=64, layers_to_transform=[0, 2]))
            give_weight(model)
            model.save_pretrained(bases[family] / "pvm")
            DIPEConfig(max_distance=3).save_pretrained(bases[family] / "dipe")
            VAFConfig(visual=1.6, before=0.6).save_pretrained(bases[family] / "vaf")
            LogBiasConfig(t0=4.0).save_pretrained(bases[family] / "log-bias")
        return bases[family]

    def of(family: str, combination: str) -> Served:
        if (family, combination) not in made:
            folder, requests = base_of(family), SERVED[family].requests
            adapters = [folder / name for name in combination.split("+")]
            made[family, combination] = Served(
                exported(folder / "base", adapters, folder / f"{combination}-served"),
                requests,
                ask_transformers(folder / "base", [], requests),
                ask_transformers(folder / "base", adapters, requests),
            )
        return made[family, combination]

    return of


@pytest.fixture(scope="module", params=SERVINGS, ids="-".join)
def served(serve, request: pytest.FixtureRequest) -> Iterator[Served]:
    """All that vLLM answers of one."""
    served = serve(*request.param)
    with engine_inside(served.folder, **SETTINGS) as llm:
        served.together = ask_vllm(llm, served.requests)
        served.again = ask_vllm(llm, served.requests)
        for one in served.requests:
            assert llm.reset_prefix_cache()
            served.alone += ask_vllm(llm, [one])
    return served


def test_each_family_is_tested():
    configs = [tiny_vlm_config(), *(family.config() for family in SERVED.values())]
    assert {config.model_type for config in configs} == set(FAMILIES)
    assert {config.get_text_config().model_type for config in configs} == set(TEXT_MODELS)


def test_chunks_of_a_batch_are_answered_as_transformers_does_alone(served: Served):
    assert_same(served.together, served.expected)


def test_a_request_alone_is_answered_as_in_a_batch(served: Served):
    assert_same(served.alone, served.together)


def test_cached_prefixes_change_nothing(served: Served):
    assert sum(answer.num_cached for answer in served.again) > 100
    assert_same(served.again, served.together)


def test_on_differs_from_off_where_there_is_an_image(served: Served):
    for request, off, answer in zip(served.requests, served.off, served.together, strict=True):
        if request.images:
            assert answer.differs_by(off) > 10 * TOLERANCE, request
        else:
            assert answer.differs_by(off) < 1e-5, request


@pytest.mark.parametrize("family", [name for name, family in SERVED.items() if family.text is None])
def test_requests_of_one_batch_choose(serve, family: str, tmp_path: Path):
    names = ("pvm", "dipe", "pvm+dipe")
    of_choices = [serve(family, name) for name in names]
    requests, place = of_choices[0].requests, of_choices[0].folder.parent
    exports = ["+".join(str(place / part) for part in name.split("+")) for name in names]
    folder = export_vllm(place / "base", exports, tmp_path / "out")
    asked = loras(folder, [name for name in (None, *names) for _ in requests])
    switch = switch_of(AutoConfig.from_pretrained(folder).get_text_config())
    settings = dict(enable_lora=True, max_loras=4, max_lora_rank=1, lora_target_modules=[switch])
    with engine_inside(folder, **SETTINGS, **settings) as llm:
        answers = ask_vllm(llm, requests * 4, asked)
    assert_same(answers, [*of_choices[0].off, *(answer for served in of_choices for answer in served.expected)])


def test_linear_attention_in_16_bits_with_vllm_s_kernels(serve):
    served = serve("qwen3_5", "pvm+dipe")
    with engine_inside(served.folder, dtype="bfloat16", **SETTINGS) as llm:
        answers = ask_vllm(llm, served.requests, max_tokens=2)
        assert llm.llm_engine.vllm_config.cache_config.mamba_ssm_cache_dtype == "float32"
    for request, off, expected, answer in zip(served.requests, served.off, served.expected, answers, strict=True):
        assert answer.differs_by(expected.begins(2)) < 0.05, request
        assert (answer.differs_by(off.begins(2)) > 0.1) == bool(request.images), request


@pytest.mark.parametrize("family", ["gemma3", "llava_onevision", "qwen3_5"])
def test_traced_by_dynamo(serve, family: str):
    served = serve(family, "pvm+dipe")
    with engine_inside(served.folder, enforce_eager=False, **SETTINGS) as llm:
        assert_same(ask_vllm(llm, served.requests), served.expected)


@pytest.mark.parametrize(("family", "num_blocks"), [("llava_onevision", 18), ("qwen2_5_vl", 18), ("qwen3_5", 100)])
def test_preempted_requests_are_answered_as_others(serve, family: str, num_blocks: int):
    served = serve(family, "pvm+dipe")
    crowded = dict(num_gpu_blocks_override=num_blocks, disable_log_stats=False)
    with engine_inside(served.folder, **SETTINGS, **crowded) as llm:
        answers = ask_vllm(llm, served.requests * 2, max_tokens=80)
        preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    assert_same([answer.begins(NEW_TOKENS) for answer in answers], served.expected * 2)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl_moe"])
def test_on_two_ranks(serve, family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # on one NUMA node, vLLM wants to be told
    served = serve(family, "pvm+dipe")
    with engine(served.folder, tensor_parallel_size=2, **SETTINGS) as llm:
        assert_same(ask_vllm(llm, served.requests), served.expected)


def test_a_base_that_never_sees_far_is_refused_with_pvm(serve, tmp_path: Path):
    shutil.copytree(serve("llava_onevision", "pvm").folder, tmp_path / "slides")
    file = tmp_path / "slides" / "config.json"
    content = json.loads(file.read_text())
    layers = ["sliding_attention"] * content["text_config"]["num_hidden_layers"]
    content["text_config"] |= dict(use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=layers)
    file.write_text(json.dumps(content))
    refusal = pytest.raises(NotImplementedError, match="The base attends within 8 tokens in all layers")
    with refusal, engine_inside(tmp_path / "slides", **SETTINGS):
        pass

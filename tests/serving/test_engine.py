"""vLLM on a CPU against transformers, with the same tiny weights and real images.

It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from served_models import (
    REQUESTS,
    TOLERANCE,
    Answer,
    Request,
    ask_transformers,
    ask_vllm,
    assert_same,
    engine,
    exported,
)
from transformers import AutoTokenizer

from peft_pvm.demo.mosaic import IMAGE


COMBINATIONS = {
    "base": [],
    "pvm": ["pvm"],
    "dipe": ["dipe"],
    "pvm+dipe": ["pvm", "dipe"],
    "all": ["pvm", "dipe", "vaf", "log-bias"],
    "branches+dipe on some layers": ["branches", "dipe-some-layers"],
}


def second_turns(base: Path, answers: Sequence[Answer]) -> list[Request]:
    """Each conversation goes on after its answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        replace(request, prompt=f"{request.prompt}{tokenizer.decode(answer.tokens)} And what else? [cell 8]")
        for request, answer in zip(REQUESTS, answers)
    ]


class Served:
    """What vLLM and transformers answer with some adapters."""

    def __init__(self, base: Path, adapters: list[Path], folder: Path):
        self.folder = exported(base, adapters, folder)
        self.expected = ask_transformers(base, adapters, REQUESTS)
        self.expected_forced = ask_transformers(
            base, adapters, REQUESTS, prefix_allowed_tokens_fn=lambda row, tokens: [IMAGE]
        )
        with engine(self.folder) as llm:
            self.together = ask_vllm(llm, REQUESTS)
            self.again = ask_vllm(llm, REQUESTS)
            goes_on = second_turns(base, self.together)
            self.second = ask_vllm(llm, goes_on)
            self.alone = []
            for request in REQUESTS:
                assert llm.reset_prefix_cache()
                self.alone += ask_vllm(llm, [request])
            self.forced = ask_vllm(llm, REQUESTS, allowed_token_ids=[IMAGE])
        self.expected_second = ask_transformers(base, adapters, goes_on)


_served: dict[str, Served] = {}


@pytest.fixture
def serve(base: Path, adapters: dict[str, Path], tmp_path: Path):
    """Makes what was served of a combination, once."""

    def of(name: str) -> Served:
        if name not in _served:
            chosen = [adapters[adapter] for adapter in COMBINATIONS[name]]
            _served[name] = Served(base, chosen, tmp_path / "served")
        return _served[name]

    return of


@pytest.mark.parametrize("name", COMBINATIONS)
def test_chunks_of_a_batch_are_answered_as_transformers_does_alone(serve, name: str):
    served = serve(name)
    assert_same(served.together, served.expected)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_request_alone_is_answered_as_in_a_batch(serve, name: str):
    served = serve(name)
    assert_same(served.alone, served.together)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_cached_prefixes_change_nothing(serve, name: str):
    served = serve(name)
    assert sum(answer.num_cached for answer in served.again) > 400
    assert_same(served.again, served.together)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_second_turn_on_the_cache_of_the_first(serve, name: str):
    served = serve(name)
    assert sum(answer.num_cached for answer in served.second) > sum(answer.num_cached for answer in served.again)
    assert_same(served.second, served.expected_second)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_generated_placeholder_is_text(serve, name: str):
    served = serve(name)
    assert {token for answer in served.forced for token in answer.tokens} == {IMAGE}
    assert_same(served.forced, served.expected_forced)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != "base"])
def test_on_differs_from_off_where_there_is_an_image(serve, name: str):
    off, on = serve("base"), serve(name)
    for request, without, answer in zip(REQUESTS, off.together, on.together):
        if request.images:
            assert answer.differs_by(without) > 100 * TOLERANCE, request
        else:
            assert answer.differs_by(without) < 1e-5, request


def test_preempted_requests_are_answered_as_others(serve, base: Path, adapters: dict[str, Path]):
    """To the last token, also of those that are preempted late."""
    served = serve("pvm+dipe")
    crowded = dict(max_model_len=640, num_gpu_blocks_override=24, disable_log_stats=False)
    with engine(served.folder, **crowded) as llm:
        answers = ask_vllm(llm, REQUESTS * 2, max_tokens=80)
        preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    expected = ask_transformers(base, [adapters["pvm"], adapters["dipe"]], REQUESTS, max_new_tokens=80)
    assert_same(answers, expected * 2)


def test_traced_by_dynamo(serve):
    served = serve("pvm+dipe")
    with engine(served.folder, enforce_eager=False) as llm:
        assert_same(ask_vllm(llm, REQUESTS), served.expected)


def who_are_you(worker) -> tuple[int, str]:
    return os.getpid(), type(worker.get_model()).__name__


def test_on_two_ranks_each_with_the_plugin(serve, monkeypatch: pytest.MonkeyPatch):
    served = serve("pvm+dipe")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to ask the workers who they are
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # on one NUMA node, vLLM wants to be told
    with engine(served.folder, tensor_parallel_size=2) as llm:
        workers = llm.collective_rpc(who_are_you)
        assert len({pid for pid, _ in workers} | {os.getpid()}) == 3
        assert {name for _, name in workers} == {"PeftPVMQwen3VLForConditionalGeneration"}
        assert_same(ask_vllm(llm, REQUESTS), served.expected)


def test_without_the_plugin_vllm_refuses_the_folder(serve, monkeypatch: pytest.MonkeyPatch):
    from vllm import ModelRegistry

    folder = serve("pvm").folder
    monkeypatch.delitem(ModelRegistry.models, "PeftPVMQwen3VLForConditionalGeneration", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "none_of_ours")
    monkeypatch.setattr("vllm.plugins.plugins_loaded", True)
    said = r"Model architectures \['PeftPVMQwen3VLForConditionalGeneration'\] are not supported"
    with pytest.raises(Exception, match=said), engine(folder):
        pass


def test_the_engine_says_what_it_refuses(serve, capfd: pytest.CaptureFixture):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(Exception, match="initialization"), engine(serve("pvm").folder, speculative_config=speculative):
        pass
    assert "do not work with speculative decoding" in "".join(capfd.readouterr())


def test_what_enters_the_first_layer_survives_kernels_that_add_in_place(monkeypatch: pytest.MonkeyPatch):
    from vllm.model_executor.models.qwen3_vl import Qwen3LLMModel

    from peft_pvm.integrations.vllm.model import with_adapters

    def add_in_place(self, input_ids, tokens, intermediate_tensors, inputs_embeds):
        inputs_embeds.add_(1)
        return tokens.inputs_embeds

    text_model = with_adapters(Qwen3LLMModel)
    monkeypatch.setattr(Qwen3LLMModel, "forward", add_in_place)
    embeddings = torch.zeros(2, 4)
    positions = torch.zeros(3, 2, dtype=torch.long)
    model = text_model.__new__(text_model)
    model.switch, model.num_adapters = None, 1
    kept = model.forward(None, positions, inputs_embeds=embeddings)
    assert embeddings.all()
    assert not kept.any()

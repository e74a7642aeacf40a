"""vLLM on a CPU against transformers, with the same tiny weights and real images.

It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from served_models import REQUESTS, Answer, ask_transformers, ask_vllm, engine, exported

from peft_pvm.lab.mosaic import IMAGE


TOLERANCE = 2e-4  # of log-probabilities, in fp32
COMBINATIONS = {
    "base": [],
    "pvm": ["pvm"],
    "dipe": ["dipe"],
    "pvm+dipe": ["pvm", "dipe"],
    "branches+dipe on some layers": ["branches", "dipe-some-layers"],
}


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert len(found) == len(expected)
    differences = [a.differs_by(b) for a, b in zip(found, expected)]
    assert max(differences) < TOLERANCE, differences


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
            self.alone = []
            for request in REQUESTS:
                assert llm.reset_prefix_cache()
                self.alone += ask_vllm(llm, [request])
            self.forced = ask_vllm(llm, REQUESTS, allowed_token_ids=[IMAGE])


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


def test_compiled(serve):
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
    with pytest.raises(Exception, match="PeftPVMQwen3VLForConditionalGeneration"), engine(folder):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "--pipeline-parallel-size 1"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"is_pruned": True}, "pruning of videos"),
    ],
)
def test_what_was_not_made_to_work_is_refused(change: dict, message: str):
    from peft_pvm.integrations.vllm.model import refuse_what_breaks

    def config(is_pruned: bool = False, **fields) -> SimpleNamespace:
        multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: is_pruned)
        usual = dict(
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            speculative_config=None,
            use_v2_model_runner=False,
            model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        )
        return SimpleNamespace(**{**usual, **fields})

    refuse_what_breaks(config(), has_anchors=True)
    with pytest.raises(NotImplementedError, match=message):
        refuse_what_breaks(config(**change), has_anchors=True)
    refuse_what_breaks(config(use_v2_model_runner=True), has_anchors=False)

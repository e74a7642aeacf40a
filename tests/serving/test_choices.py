"""Several adapters in one server, between which requests choose, and LoRA beside ours: vLLM against transformers.

It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from served_models import (
    NEW_TOKENS,
    REQUESTS,
    TOLERANCE,
    Answer,
    ask_transformers,
    ask_vllm,
    assert_same,
    engine,
    engine_inside,
    exported,
    loras,
)
from transformers import AutoConfig

from peft_pvm.integrations.vllm import export_vllm
from peft_pvm.integrations.vllm.export import switch_of


CHOICES = {
    None: [],
    "pvm-tiny-vlm": ["pvm"],
    "both": ["branches"],
    "dipe": ["dipe"],
    "dipe-some-layers": ["dipe-some-layers"],
    "vaf": ["vaf"],
    "log-bias": ["log-bias"],
    "pvm-tiny-vlm+dipe+vaf+log-bias": ["pvm", "dipe", "vaf", "log-bias"],
}
NAMES = list(CHOICES)
# Each request with each choice, so that neighbours in a batch differ.
MIXED = [(request, name) for request in REQUESTS for name in NAMES]
MIXED_REQUESTS = [request for request, _ in MIXED]
MIXED_NAMES = [name for _, name in MIXED]
SETTINGS: dict[str, Any] = dict(enable_lora=True, max_loras=len(CHOICES), max_num_seqs=16)


@dataclass
class Served:
    """A folder with choices, and what each request is to be answered with each, in the order of `MIXED`."""

    folder: Path
    expected: list[Answer]

    @property
    def settings(self) -> dict[str, Any]:
        """vLLM's, with which the switch alone takes a LoRA."""
        return dict(SETTINGS, max_lora_rank=1, lora_target_modules=[switch_in(self.folder)])

    def ask(self, llm: Any, **kwargs: Any) -> list[Answer]:
        """What vLLM answers to all of them at once."""
        return ask_vllm(llm, MIXED_REQUESTS, loras(self.folder, MIXED_NAMES), **kwargs)


def switch_in(folder: Path) -> str:
    return switch_of(AutoConfig.from_pretrained(folder).text_config)


def by_choice(answers: list[Answer], name: str | None) -> list[Answer]:
    """Those of `MIXED` that were asked with a choice."""
    return [answer for answer, asked in zip(answers, MIXED_NAMES, strict=True) if asked == name]


@pytest.fixture(scope="module")
def served(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Served:
    combinations = {name: [adapters[part] for part in parts] for name, parts in CHOICES.items()}
    exports = ["+".join(map(str, paths)) for paths in combinations.values() if paths]
    folder = export_vllm(base, exports, tmp_path_factory.mktemp("served") / "out")
    expected = {name: ask_transformers(base, paths, REQUESTS) for name, paths in combinations.items()}
    return Served(folder, [expected[name][REQUESTS.index(request)] for request, name in MIXED])


def test_in_one_batch_each_is_answered_as_alone_with_its_choice(served: Served, base: Path):
    with engine_inside(served.folder, **served.settings) as llm:
        together = served.ask(llm)
        again = served.ask(llm)
        assert llm.reset_prefix_cache()
        apart = {name: ask_vllm(llm, REQUESTS, loras(served.folder, [name] * len(REQUESTS))) for name in NAMES}
    assert_same(together, served.expected)
    assert_same(again, served.expected)
    for name in NAMES:
        assert_same(apart[name], by_choice(served.expected, name))
        assert sum(answer.num_cached for answer in by_choice(again, name)) > 400
        # What another choice left in the cache is not taken: prompts share as many tokens as they do for the first.
        assert sum(answer.num_cached for answer in apart[name]) == sum(answer.num_cached for answer in apart[None])
    with engine_inside(base) as llm:
        of_base = ask_vllm(llm, REQUESTS)
    for answers in (by_choice(together, None), apart[None]):
        assert max(answer.differs_by(alone) for answer, alone in zip(answers, of_base)) < 1e-5
    for name in NAMES[1:]:
        for request, without, answer in zip(REQUESTS, of_base, apart[name]):
            assert (answer.differs_by(without) > 2 * TOLERANCE) == bool(request.images), (name, request)


def test_preempted_requests_keep_their_choice(served: Served):
    crowded = dict(max_model_len=640, num_gpu_blocks_override=40, disable_log_stats=False)
    with engine_inside(served.folder, **served.settings, **crowded) as llm:
        answers = served.ask(llm, max_tokens=60)
        preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0
    assert_same([answer.begins(NEW_TOKENS) for answer in answers], served.expected)


def test_choices_of_another_export_are_refused(served: Served, base: Path, adapters: dict[str, Path], tmp_path: Path):
    """Of as many adapters, in another order: the numbers of a choice would mean other adapters."""
    exports = [str(adapters["dipe"]), str(adapters["pvm"])]
    folder, other = (export_vllm(base, order, tmp_path / f"{order is exports}") for order in (exports, exports[::-1]))
    settings = dict(SETTINGS, max_lora_rank=1, lora_target_modules=[switch_in(folder)])
    with engine_inside(folder, **settings) as llm:
        with pytest.raises(ValueError, match=rf"expected target modules in .*{switch_in(folder)}"):
            llm.llm_engine.add_lora(*loras(other, ["dipe"]))  # as the server does, at start or later
        assert_same(
            ask_vllm(llm, REQUESTS, loras(folder, ["dipe"] * len(REQUESTS))), by_choice(served.expected, "dipe")
        )


def test_on_two_ranks(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # on one NUMA node, vLLM wants to be told
    with engine(served.folder, tensor_parallel_size=2, **served.settings) as llm:
        assert_same(served.ask(llm), served.expected)


def test_traced_by_dynamo(served: Served):
    with engine_inside(served.folder, enforce_eager=False, **served.settings) as llm:
        assert_same(served.ask(llm), served.expected)


@pytest.mark.parametrize("name", ["pvm", "pvm+dipe"])
def test_lora_of_vllm_beside_adapters_that_are_always_on(
    base: Path, adapters: dict[str, Path], tmp_path: Path, name: str
):
    from vllm.lora.request import LoRARequest

    paths = [adapters[part] for part in name.split("+")]
    lora = LoRARequest("lora", 1, str(adapters["lora"]))
    with engine_inside(exported(base, paths, tmp_path / "out"), enable_lora=True, max_loras=2) as llm:
        answers = ask_vllm(llm, REQUESTS * 2, [lora] * len(REQUESTS) + [None] * len(REQUESTS))
    expected = [ask_transformers(base, [*paths, *more], REQUESTS) for more in ([adapters["lora"]], [])]
    assert_same(answers, [*expected[0], *expected[1]])
    assert min(with_lora.differs_by(without) for with_lora, without in zip(*expected)) > 10 * TOLERANCE


def test_lora_as_a_part_of_choices(base: Path, adapters: dict[str, Path], tmp_path: Path):
    lora, pvm, dipe = (adapters[name] for name in ("lora", "pvm", "dipe"))
    folder = export_vllm(base, [f"{pvm}+{dipe}+{lora}", pvm, f"{dipe}+{lora}"], tmp_path / "out")
    names = ["pvm-tiny-vlm+dipe+lora", "pvm-tiny-vlm", "dipe+lora", None]
    asked = loras(folder, [name for name in names for _ in REQUESTS])
    with engine_inside(folder, enable_lora=True, max_loras=4, max_num_seqs=16) as llm:
        answers = ask_vllm(llm, REQUESTS * len(names), asked)
    expected = [ask_transformers(base, paths, REQUESTS) for paths in ([pvm, dipe, lora], [pvm], [dipe, lora], [])]
    assert_same(answers, [answer for of_choice in expected for answer in of_choice])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "start it with --enable-lora and --lora-modules"),
        (dict(SETTINGS, lora_target_modules=["q_proj"]), "add it to --lora-target-modules"),
        (dict(SETTINGS, max_loras=len(CHOICES) - 1), f"start it with --max-loras {len(CHOICES)} or more"),
    ],
)
def test_a_server_that_could_not_be_told_the_choice_is_refused(served: Served, settings: dict[str, Any], message: str):
    refusal = pytest.raises(NotImplementedError, match=message)
    with refusal, engine_inside(served.folder, **settings):
        pass

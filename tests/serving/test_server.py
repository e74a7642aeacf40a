"""vLLM's server on loopback under load: no request sees another's image, or has another's adapters.

It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from served_models import NEW_TOKENS, picture

from experiments.serving_load import BASE, served
from peft_pvm.integrations.vllm import export_vllm
from peft_pvm.integrations.vllm.choices import FOLDER


NUM_REQUESTS = 64
MODELS = (BASE, "pvm-tiny-vlm", "dipe", "pvm-tiny-vlm+dipe")
TEXT = "Some text that stands between the image and the question. " * 4


OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-batched-tokens", "256"),
    *("--max-num-seqs", str(NUM_REQUESTS), "--block-size", "32", "--kv-cache-memory-bytes", str(256 << 20)),
)


def model_of(number: int) -> str:
    """Which model a request names."""
    return MODELS[number % len(MODELS)]


def got(url: str) -> str:
    """What a server answers to a GET."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def posted(url: str, body: dict[str, Any]) -> str:
    """What a server answers to a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def models_at(address: str) -> set[str]:
    """Those that the server names."""
    return {model["id"] for model in json.loads(got(f"{address}/v1/models"))["data"]}


def ask(address: str, number: int) -> tuple[list[str], list[float]]:
    """The answer of one of the models about one image: tokens and their log-probabilities."""
    png = io.BytesIO()
    picture(number).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    question = f"{TEXT}[cell {number % 9}]"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": model_of(number),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "logprobs": True,
    }
    answer = json.loads(posted(f"{address}/v1/chat/completions", body))
    assert answer["model"] == model_of(number)
    tokens = answer["choices"][0]["logprobs"]["content"]
    return [token["token"] for token in tokens], [token["logprob"] for token in tokens]


def test_of_64_at_once_each_is_answered_as_alone(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    pvm, dipe = (str(adapters[name]) for name in ("pvm", "dipe"))
    folder = export_vllm(base, [pvm, dipe, f"{pvm}+{dipe}"], tmp_path / "served")
    with served(folder, tmp_path / "log", *OPTIONS) as running:
        address = running.address
        assert models_at(address) == set(MODELS)
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            at_once = list(pool.map(lambda number: ask(address, number), range(NUM_REQUESTS)))
        alone = [ask(address, number) for number in range(NUM_REQUESTS)]
        metrics = got(f"{address}/metrics")
        posted(f"{address}/v1/unload_lora_adapter", {"lora_name": "dipe"})
        assert models_at(address) == set(MODELS) - {"dipe"}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(address, MODELS.index("dipe"))
        assert ask(address, MODELS.index(BASE))[0] == alone[MODELS.index(BASE)][0]
        posted(f"{address}/v1/load_lora_adapter", {"lora_name": "dipe", "lora_path": str(folder / FOLDER / "dipe")})
        assert ask(address, MODELS.index("dipe"))[0] == alone[MODELS.index("dipe")][0]
    assert {"lora_requests_info", "time_to_first_token_seconds_sum", "kv_cache_usage_perc"} <= set(
        re.findall(r"^vllm:(\w+)", metrics, re.MULTILINE)
    )
    with served(folder, tmp_path / "log", *OPTIONS) as running:  # which has nothing in its cache
        afresh = [ask(running.address, number) for number in range(0, NUM_REQUESTS, 5)]
    for answer, expected in [*zip(at_once, alone), *zip(at_once[::5], afresh)]:
        assert answer[0] == expected[0]
        assert answer[1] == pytest.approx(expected[1], abs=2e-4)
    firsts = {round(logprobs[0], 4) for _, logprobs in at_once}
    assert len(firsts) > NUM_REQUESTS / 2, "answers that do not depend on the image would show nothing"

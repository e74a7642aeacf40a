"""Measures the time and memory of all methods, which take turns in one process."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .. import __version__
from ..attention.call import AttentionCall
from ..tokens.families import find_vlm
from ..utils.packages import attn_implementation
from .models import METHODS, pvm_config, structural_copy
from .runners import Runner, Settings, runner_of


@dataclass
class Measured:
    """What one method took at one length.

    Attributes:
        prefill_s: The time of each round, in seconds.
        decode_s: The median time of a token in each round, in seconds.
        prefill_bytes: The most memory that the prefill takes for tensors, the KV cache included.
        decode_bytes: The same for decoding one token.
        attention_prefill: Time of the changed attention of one layer over that of the kernel alone, of each round.
        attention_decode: The same for one token.
        left_out: Why nothing was measured.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    prefill_bytes: int = 0
    decode_bytes: int = 0
    attention_prefill: list[float] = field(default_factory=list)
    attention_decode: list[float] = field(default_factory=list)
    left_out: str | None = None


@torch.no_grad()
def measure(
    model: nn.Module, settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure prefill, decoding, memory and loading.

    Every method has a copy of the model with the same weights. In each round all take their turn, in changing order;
    what is compared was measured within one round.

    Args:
        model: A vision-language model from transformers.
        settings: What is measured.
        progress: Called with what comes next.

    Returns:
        What the JSON file holds: "machine", "model", "settings", "given" with the settings that methods were given
        beside their defaults, "loading", and "contexts", each with `Measured` by method.
    """
    vlm, names = find_vlm(model), list(dict.fromkeys(("base", *settings.methods)))
    # Of one forward in Python, torch keeps only a few compiled forms. Here, all methods share one forward.
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit * len(names)):
        results = [
            {"context": context, "methods": _measure_context(model, names, context, settings, progress)}
            for context in settings.contexts
        ]
    progress("loading")
    return {
        "machine": describe_machine(next(model.parameters()).device),
        "model": {
            "name": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "decoder_layers": len(vlm.layers),
            "hidden_size": vlm.text_config.hidden_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": attn_implementation(vlm.text_config),
        },
        "settings": asdict(settings),
        "given": {name: dict(METHODS[name].given) for name in names if METHODS[name].given},
        "loading": _loading_of(model),
        "contexts": results,
    }


def _measure_context(
    model: nn.Module, names: Sequence[str], context: int, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    device = next(model.parameters()).device
    measured = {name: Measured() for name in names}
    runners = {}
    # What comes first warms up, and is where memory is measured and attention is overheard.
    for name in names:
        progress(f"{context} tokens, {METHODS[name].title}: memory and attention")
        try:
            runners[name] = _warmed_up(model, name, context, settings, measured[name])
        except (NotImplementedError, ValueError) as refusal:
            if name == "base":
                raise
            measured[name] = Measured(left_out=str(refusal))
    for number in range(settings.prefills):
        for name in _in_turn(runners, number):
            progress(f"{context} tokens, {METHODS[name].title}: prefill {number + 1} of {settings.prefills}")
            measured[name].prefill_s.append(seconds(runners[name].prefill, device))
    for number in range(settings.rounds):
        for name in _in_turn(runners, number):
            progress(f"{context} tokens, {METHODS[name].title}: decoding, round {number + 1} of {settings.rounds}")
            times = [seconds(runners[name].decode, device) for _ in range(settings.new_tokens)]
            measured[name].decode_s.append(statistics.median(times))
    return {name: asdict(value) for name, value in measured.items()}


def _warmed_up(model: nn.Module, name: str, context: int, settings: Settings, own: Measured) -> Runner:
    """A method that has read the prompt and a token. What is measured meanwhile goes into `own`.

    Raises:
        NotImplementedError: The method does not act on the model or with the settings, or needs too much memory.
        ValueError: It cannot act on the model.
    """
    device = next(model.parameters()).device
    heads = find_vlm(model).text_config.num_attention_heads
    needed = METHODS[name].whole_matrices * settings.batch * heads * context**2 * 4
    if needed > 0.9 * free_bytes(device):
        raise NotImplementedError(f"needs {needed / 2**30:.0f} GiB")
    runner = runner_of(model, name, context, settings)
    call, own.prefill_bytes = runner.overheard(partial(peak_bytes, runner.prefill, device))
    own.attention_prefill = _attention_ratios(call, settings.prefills)
    if settings.compile:
        runner.decode()
    else:
        call, own.decode_bytes = runner.overheard(partial(peak_bytes, runner.decode, device))
        own.attention_decode = _attention_ratios(call, settings.rounds)
    return runner


def _in_turn(runners: dict[str, Runner], number: int) -> Iterator[str]:
    """The first is not always the same: what comes first may find a cooler processor."""
    names = list(runners)
    shift = number % len(names)
    yield from (*names[shift:], *names[:shift])


def _attention_ratios(call: AttentionCall | None, rounds: int) -> list[float]:
    if call is None:
        return []
    device = call.query.device
    ratios = []
    for number in range(rounds + 1):
        kernel = seconds(call.run_kernel, device)
        changed = seconds(call.attend, device)
        if number:
            ratios.append(changed / kernel)
    return ratios


def _loading_of(model: nn.Module) -> dict[str, Any]:
    """What `measure_loading` returns, or as "left_out" the reason why PVM cannot act on this model."""
    try:
        return measure_loading(model)
    except ValueError as refusal:
        return {"left_out": str(refusal)}


def measure_loading(model: nn.Module, rounds: int = 5) -> dict[str, float]:
    """What it takes to have a PVM adapter of the paper's proportions, in seconds: the medians of some rounds.

    Args:
        model: A vision-language model from transformers.
        rounds: How often each is done.

    Raises:
        ValueError: PVM cannot act on the model.
    """
    device = next(model.parameters()).device
    times: dict[str, list[float]] = {name: [] for name in ("attach", "first_forward", "next_forward", "load", "swap")}
    config = pvm_config(model)
    draw = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            attached = structural_copy(model)
            started = time.perf_counter()
            wrapped = PeftModel(attached, config)
            times["attach"].append(time.perf_counter() - started)
            token = torch.full((1, 1), 7, device=device)
            for name in ("first_forward", "next_forward"):
                times[name].append(seconds(partial(wrapped, input_ids=token), device))
            draw.append(_seconds_to_draw(wrapped))
            wrapped.save_pretrained(folder)
            times["load"].append(seconds(partial(wrapped.load_adapter, folder, "second"), device))
            for name in ("second", "default"):
                times["swap"].append(seconds(partial(wrapped.set_adapter, name), device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    import_peft, import_pvm = import_seconds()
    return {
        **medians,
        "draw_weights": statistics.median(draw),
        "import_peft": import_peft,
        "import_peft_pvm": import_pvm,
    }


def _seconds_to_draw(model: nn.Module) -> float:
    """How long it takes to draw as many random numbers as the adapter has: that is allocation, not attaching."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    for shape in shapes:
        torch.empty(shape).normal_()
    return time.perf_counter() - started


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes; on CUDA, until the device is done."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that tensors take during a call, beyond what they took before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what an earlier call left as garbage, if collected during this one, would be counted off
    with _profiler_muted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _profiler_muted() -> Iterator[None]:
    """Keep the messages that the profiler writes from C++ off the terminal."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def free_bytes(device: torch.device) -> int:
    """How much memory is left for tensors."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def import_seconds(rounds: int = 5) -> tuple[float, float]:
    """CPU seconds of a new process to import PEFT, and then this package: the least of some rounds."""
    code = (
        "from time import process_time; a = process_time(); import peft; b = process_time(); import peft_pvm; "
        "print(b - a, process_time() - b)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(rounds)]
    times = [[float(part) for part in run.stdout.split()] for run in runs]
    return min(run[0] for run in times), min(run[1] for run in times)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft_pvm": __version__,
    }

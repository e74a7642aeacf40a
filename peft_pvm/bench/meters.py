"""Time and memory, on a CPU and on CUDA."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from .. import __version__


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
    """Keep from the terminal what the profiler, in C++, says at its start and end."""
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

"""Predicts the time of a decoding step on a device that is not at hand, from what it launches, reads and computes."""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from ..methods.pvm import PVMConfig
from ..tokens.families import find_vlm
from .launches import Launches, count_launches
from .models import ALL, METHODS, PRESETS, Shape, build_random, footprint, pvm_config
from .run import describe_machine, seconds
from .runners import Runner, Settings


COUNTED_ON = "tiny"
# No width of that model's tensors is one of these, so that they tell what an operation reads.
NUM_KEYS, VISUAL_TOKENS = 211, 97
# Operations that touch a part of what they are given.
IN_PART = ("embedding", "index_copy_")
# What a product of matrices grows with is the first of these among its matrices.
KINDS = ("cache", "images", "head", "rows", "visual rows", "keys", "visual tokens")
PREDICTED = tuple(name for name in ALL if METHODS[name].in_forwards)


@dataclass(frozen=True)
class Device:
    """What decides how long a step takes.

    Attributes:
        title: Its name.
        memory: Its size in bytes.
        bandwidth: Of its memory, in bytes a second.
        flops: Of matrix products in bf16, a second.
        launch: What Python and torch take in eager mode for an operation or a view, in seconds.
        kernel: What an operation takes in a graph beside what it reads, in seconds.
        runs_ahead: Whether operations are launched while others are computed, so that the slower of both decides.
    """

    title: str
    memory: float
    bandwidth: float
    flops: float
    launch: float = 6e-6
    kernel: float = 2e-6
    runs_ahead: bool = True

    def seconds(self, launches: int, read: float, multiplied: float, in_graph: bool) -> float:
        """The time of a step.

        Args:
            launches: How many operations; in eager mode, with views.
            read: How many bytes they read and write.
            multiplied: How many products and sums their matrix products take.
            in_graph: Whether they are launched as one graph.
        """
        work = max(read / self.bandwidth, multiplied / self.flops)
        if in_graph:
            return launches * self.kernel + work
        waits = launches * self.launch
        return max(waits, work) if self.runs_ahead else waits + work


# From NVIDIA's data sheets of the H100 and the A100, and its white paper on the Ada architecture; products without
# sparsity, with sums in fp32. Launches: see docs/performance.md.
DEVICES = {
    "h100": Device("H100 SXM, 80 GB", 80e9, 3.35e12, 989e12),
    "a100": Device("A100 SXM, 80 GB", 80e9, 2.04e12, 312e12),
    "4090": Device("RTX 4090, 24 GB", 24e9, 1.01e12, 165e12),
}


@dataclass
class Traffic:
    """What the operations of a step read, write and multiply, by what it grows with.

    Attributes:
        shape: Of the model that it is counted on.
        touched: Bytes. "cache": with keys and their width. "rows": with keys and heads. "keys": only with keys.
            "images", "visual rows", "visual tokens": the same of visual tokens, the first with the hidden size.
            "head": with the vocabulary and the hidden size.
        multiplied: Products and sums of matrix products, by the same; "cache" with keys and the width of queries, and
            "else" with heads and the square of their width.
    """

    shape: Shape
    touched: Counter[str] = field(default_factory=Counter)
    multiplied: Counter[str] = field(default_factory=Counter)

    def look(self, name: str, tensors: Iterable[torch.Tensor], multiplied: int = 0) -> None:
        """Take in an operation, by its name, the tensors that it reads and writes, and what it multiplies."""
        if name in IN_PART:
            return
        kinds = set()
        for tensor in tensors:
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 1]
            kind = self._kind(sizes)
            if kind is not None:
                kinds.add(kind)
                self.touched[kind] += math.prod(sizes) * tensor.element_size()
        if multiplied:
            self.multiplied[next((kind for kind in KINDS if kind in kinds), "else")] += multiplied

    def _kind(self, sizes: Sequence[int]) -> str | None:
        shape, numbers = self.shape, math.prod(sizes)

        def told(each: int, width: int, wide: str, rows: str, plain: str) -> str:
            return wide if each % width == 0 else plain if each % shape.heads else rows

        for num_keys in (NUM_KEYS, NUM_KEYS - 1):  # the cache, and as it was before this step
            if num_keys in sizes:
                return told(numbers // num_keys, shape.head_dim, "cache", "rows", "keys")
        if VISUAL_TOKENS in sizes:
            return told(numbers // VISUAL_TOKENS, shape.hidden_size, "images", "visual rows", "visual tokens")
        return "head" if sorted(sizes) == sorted((shape.vocab_size, shape.hidden_size)) else None


@dataclass(frozen=True)
class Step:
    """What a method does in a step of decoding of one conversation, as counted on a tiny model.

    Attributes:
        launches: Operations, by layer and outside; in eager mode, with views.
        touched: See `Traffic`: of all layers together.
        multiplied: The same.
        layers: In how many decoder layers the method acts.
    """

    launches: Launches
    touched: dict[str, int]
    multiplied: dict[str, int]
    layers: int


def count_step(model: nn.Module, shape: Shape, name: str, in_graph: bool) -> Step:
    """Count what a method does in a step of decoding.

    Args:
        model: A small model.
        shape: Its shape.
        name: Of `PREDICTED`.
        in_graph: Whether it is launched as one graph, whose cache has its full size from the start. Otherwise Python
            launches it, and views count: they compute nothing, but take as long to call.
    """
    settings = Settings(
        methods=(name,), contexts=(NUM_KEYS - 3,), visual_tokens=VISUAL_TOKENS, new_tokens=1, rounds=1,
        static_cache=in_graph,
    )  # fmt: skip
    runner = Runner(model, name, NUM_KEYS - 3, settings)  # with its full size, three more than the prompt
    traffic = Traffic(shape)
    with torch.no_grad():
        runner.prefill()
        for _ in range(2):
            runner.decode()
    launches = count_launches(runner.model, runner.decode, traffic.look, counts_views=not in_graph)
    return Step(launches, dict(traffic.touched), dict(traffic.multiplied), layers_of(runner.model, name))


@functools.cache
def _counted(name: str, in_graph: bool, dtype: torch.dtype) -> Step:
    """The step of the tiny model, from which those of all shapes follow."""
    return count_step(build_random(COUNTED_ON, dtype=dtype), PRESETS[COUNTED_ON], name, in_graph)


def layers_of(model: nn.Module, name: str) -> int:
    """The number of decoder layers of a model in which a method acts."""
    layers, number = list(range(len(find_vlm(model).layers))), 0
    for make in METHODS[name].adapters:
        config: Any = make(model)
        chosen: Any = config.layers_to_transform if isinstance(config, PVMConfig) else config.layers_among(layers)
        number = len(chosen)
    return number


class Prediction:
    """What steps of decoding take at one of the real shapes.

    Args:
        shape: One of `PRESETS`, or a part of it.
        names: Of `PREDICTED`; the base is always among them.
        dtype: Of the weights.
    """

    def __init__(self, shape: Shape, names: Sequence[str], dtype: torch.dtype = torch.bfloat16):
        self.shape, self.foot = shape, footprint(shape, bytes_of_a_number=dtype.itemsize)
        self.names = list(dict.fromkeys(("base", *names)))
        with torch.device("meta"):
            large = Qwen3VLForConditionalGeneration(self.shape.config())
        self.layers = {name: layers_of(large, name) for name in self.names}
        branches = pvm_config(large)
        self.width_of_branches = branches.r * len(branches.layer_indices)  # all of them together
        self.steps = {(name, graph): _counted(name, graph, dtype) for name in self.names for graph in (False, True)}

    def launches(self, name: str, in_graph: bool) -> int:
        """How many operations a step has; in eager mode, with views."""
        base, own = self.steps["base", in_graph].launches, self.steps[name, in_graph].launches
        of_base = base.outside + base.layers[-1] * self.shape.layers
        beyond = own.beyond(base)
        least = min(beyond, default=0)
        return of_base + least * self.layers[name] + own.total - base.total - least * len(beyond)

    def read(self, name: str, in_graph: bool, context: int, visual_tokens: int, batch: int) -> float:
        """How many bytes a step reads and writes."""
        base, own = self.steps["base", in_graph], self.steps[name, in_graph]
        grown = self._grown(context, visual_tokens, batch)
        read = self.foot.weights + base.touched["cache"] * grown["cache"] * self.layers_ratio
        if name == "pvm":  # whose widths are shares of the model's, so that its bytes are known by shape
            return read + self.foot.read(context, visual_tokens, batch)[1]
        return read + self._beyond(own.touched, base.touched, grown, self.layers[name] / max(own.layers, 1))

    def multiplied(self, name: str, in_graph: bool, context: int, visual_tokens: int, batch: int) -> float:
        """How many products and sums the matrix products of a step take."""
        small, large = PRESETS[COUNTED_ON], self.shape
        base, own = self.steps["base", in_graph], self.steps[name, in_graph]
        grown = self._grown(context, visual_tokens, batch)
        grown["cache"] *= large.heads / large.kv_heads * small.kv_heads / small.heads
        grown["head"] *= batch
        grown["else"] = batch * large.heads * large.head_dim**2 / (small.heads * small.head_dim**2)
        weights = self.foot.weights / self.foot.bytes_of_a_number
        multiplied = 2 * batch * weights + base.multiplied["cache"] * grown["cache"] * self.layers_ratio
        if name == "pvm":
            weights = self.foot.pvm_weights / self.foot.bytes_of_a_number
            return multiplied + 2 * batch * weights + 4 * batch * visual_tokens * self.width_of_branches
        return multiplied + self._beyond(
            own.multiplied, base.multiplied, grown, self.layers[name] / max(own.layers, 1)
        )

    def held(self, name: str, context: int, visual_tokens: int, batch: int) -> int:
        """How many bytes memory holds at least: weights but for the vision tower, cache, and what PVM keeps."""
        base, of_pvm = self.foot.held(context, visual_tokens, batch)
        return base + (of_pvm if name == "pvm" else 0)

    @property
    def layers_ratio(self) -> float:
        """The number of decoder layers, divided by that of the model that is counted."""
        return self.shape.layers / PRESETS[COUNTED_ON].layers

    def _grown(self, context: int, visual_tokens: int, batch: int) -> dict[str, float]:
        """The factor by which each of `KINDS` is larger here than in the model that is counted, in a layer."""
        small, large = PRESETS[COUNTED_ON], self.shape
        keys, visual = batch * context / NUM_KEYS, batch * visual_tokens / VISUAL_TOKENS
        heads, hidden_size = large.heads / small.heads, large.hidden_size / small.hidden_size
        return {
            "cache": keys * (large.kv_heads * large.head_dim) / (small.kv_heads * small.head_dim),
            "images": visual * hidden_size,
            "head": hidden_size * large.vocab_size / small.vocab_size,
            "rows": keys * heads,
            "visual rows": visual * heads,
            "keys": keys,
            "visual tokens": visual,
        }

    @staticmethod
    def _beyond(own: dict[str, int], base: dict[str, int], grown: dict[str, float], layers: float) -> float:
        return layers * sum(factor * (own.get(kind, 0) - base.get(kind, 0)) for kind, factor in grown.items())

    def seconds(
        self, device: Device, name: str, in_graph: bool, context: int, visual_tokens: int, batch: int
    ) -> float:
        """The time of a step on a device."""
        sizes = name, in_graph, context, visual_tokens, batch
        return device.seconds(self.launches(name, in_graph), self.read(*sizes), self.multiplied(*sizes), in_graph)


def predict(
    device: str, preset: str, context: int, visual_tokens: int, batches: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    """Predict steps of decoding.

    Args:
        device: One of `DEVICES`.
        preset: One of `PRESETS`.
        context: Length of the conversation, visual tokens included.
        visual_tokens: How many of them are visual.
        batches: Conversations in a step.
        names: Of `PREDICTED`.

    Returns:
        What the JSON file holds: "device", "shape", "context", "visual_tokens", and "batches", by batch and method the
        "launches", "gb", "gflop" and "ms" of a step in "eager" mode and in a "graph", how many gigabytes memory holds
        at least, "held_gb", and whether these are no more than the device has, "fits".
    """
    made, chosen = Prediction(PRESETS[preset], names), DEVICES[device]

    def step(name: str, in_graph: bool, batch: int) -> dict[str, float]:
        sizes = name, in_graph, context, visual_tokens, batch
        return {
            "launches": made.launches(name, in_graph),
            "gb": made.read(*sizes) / 1e9,
            "gflop": made.multiplied(*sizes) / 1e9,
            "ms": 1000 * made.seconds(chosen, *sizes),
        }

    def row(name: str, batch: int) -> dict[str, Any]:
        held = made.held(name, context, visual_tokens, batch)
        return {
            "eager": step(name, False, batch),
            "graph": step(name, True, batch),
            "held_gb": held / 1e9,
            "fits": held <= chosen.memory,
        }

    return {
        "device": asdict(chosen),
        "shape": PRESETS[preset].title,
        "context": context,
        "visual_tokens": visual_tokens,
        "batches": {str(batch): {name: row(name, batch) for name in made.names} for batch in batches},
    }


def check_predictions(
    names: Sequence[str], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure steps on this machine's CPU, at a tiny shape and a larger one, beside what is predicted of them.

    Args:
        names: Of `PREDICTED`.
        settings: The prompt, and how many tokens and rounds.
        progress: Called with what comes next.

    Returns:
        What the JSON file holds: "machine", "settings", and what `compared` returns.
    """
    sizes = settings.contexts[0], settings.visual_tokens, settings.batch
    shapes: dict[str, dict[str, dict[str, float]]] = {}
    for shape in PRESETS[COUNTED_ON], PRESETS["1b-random"].part(4):
        taken = _measured(shape, names, settings, progress)
        made = Prediction(shape, names, torch.float32)
        shapes[shape.title] = {
            name: {
                "launches": made.launches(name, False),
                "gb": made.read(name, False, *sizes) / 1e9,
                "measured": 1000 * taken[name],
            }
            for name in made.names
        }
    return {"machine": describe_machine(torch.device("cpu")), "settings": asdict(settings), **compared(shapes)}


def compared(shapes: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Predict the steps of two shapes on a CPU, beside what was measured there.

    The two constants of the CPU, what a launch takes and the bandwidth, are those with which both steps of the base
    take as long as they did. So every other number is a prediction. Products are left out: in a batch of one, a
    weight that is read is multiplied once, which takes less than to read it.

    Args:
        shapes: By title and method, the "launches" and "gb" of a step and the milliseconds "measured".

    Returns:
        Both constants, "launch_us" and "bandwidth_gb", and the "shapes" with the milliseconds "predicted" as well.
    """
    bases = [methods["base"] for methods in shapes.values()]
    counted = torch.tensor([[base["launches"], base["gb"]] for base in bases], dtype=torch.float64)
    taken = torch.tensor([base["measured"] / 1000 for base in bases], dtype=torch.float64)
    launch, for_a_gb = torch.linalg.solve(counted, taken).tolist()
    cpu = Device("this CPU", math.inf, 1e9 / for_a_gb, math.inf, launch, runs_ahead=False)

    def predicted(step: dict[str, float]) -> float:
        return 1000 * cpu.seconds(int(step["launches"]), step["gb"] * 1e9, 0, in_graph=False)

    return {
        "launch_us": launch * 1e6,
        "bandwidth_gb": cpu.bandwidth / 1e9,
        "shapes": {
            title: {name: {**step, "predicted": predicted(step)} for name, step in methods.items()}
            for title, methods in shapes.items()
        },
    }


@torch.no_grad()
def _measured(
    shape: Shape, names: Sequence[str], settings: Settings, progress: Callable[[str], None]
) -> dict[str, float]:
    """The time of a step with each method, the median over rounds in which all take their turn, in seconds."""
    model = build_random(shape)
    runners = {name: Runner(model, name, settings.contexts[0], settings) for name in dict.fromkeys(("base", *names))}
    for name, runner in runners.items():
        progress(f"{shape.title}, {METHODS[name].title}: prefill")
        runner.prefill()
        runner.decode()
    found: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(settings.rounds):
        progress(f"{shape.title}: round {number + 1} of {settings.rounds}")
        for name, runner in runners.items():
            found[name] += [seconds(runner.decode, torch.device("cpu")) for _ in range(settings.new_tokens)]
    return {name: statistics.median(times) for name, times in found.items()}

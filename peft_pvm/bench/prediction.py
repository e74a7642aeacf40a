"""Predicts the time of a decoding step on a device that is not at hand, from what it launches, reads and computes."""

from __future__ import annotations

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
from .meters import describe_machine, seconds
from .models import ALL, METHODS, PRESETS, Shape, build_random, footprint
from .runners import Runner, Settings


COUNTED_ON = "tiny"
# No width of that model's tensors is one of these, so that they tell what an operation reads.
NUM_KEYS, VISUAL_TOKENS = 211, 97
# Operations that touch a part of what they are given.
IN_PART = ("embedding", "index_copy_")
PREDICTED = tuple(name for name in ALL if METHODS[name].in_forwards)


@dataclass(frozen=True)
class Device:
    """What decides how long a step takes.

    Attributes:
        title: Its name.
        bandwidth: Of its memory, in bytes a second.
        flops: Of matrix products in bf16, a second.
        launch: What Python and torch take for an operation in eager mode, in seconds.
        kernel: What an operation takes in a graph beside what it reads, in seconds.
        runs_ahead: Whether operations are launched while others are computed, so that the slower of both decides.
    """

    title: str
    bandwidth: float
    flops: float
    launch: float = 10e-6
    kernel: float = 2e-6
    runs_ahead: bool = True

    def seconds(self, launches: int, read: float, multiplied: float, in_graph: bool) -> float:
        """The time of a step.

        Args:
            launches: How many operations.
            read: How many bytes they read and write.
            multiplied: How many products and sums they take.
            in_graph: Whether they are launched as one graph.
        """
        work = max(read / self.bandwidth, multiplied / self.flops)
        if in_graph:
            return launches * self.kernel + work
        waits = launches * self.launch
        return max(waits, work) if self.runs_ahead else waits + work


# Bandwidths and products: the vendors' data sheets. Launches: see docs/performance.md.
DEVICES = {
    "h100": Device("H100 SXM, 80 GB", 3.35e12, 989e12),
    "a100": Device("A100 SXM, 80 GB", 2.04e12, 312e12),
    "4090": Device("RTX 4090", 1.01e12, 165e12),
}


@dataclass
class Traffic:
    """What the operations of a step read and write, in bytes, by what it grows with.

    Attributes:
        shape: Of the model that it is counted on.
        touched: "cache": with keys and their width. "rows": with keys and heads. "images": with visual tokens and the
            hidden size. "visual rows": with visual tokens and heads. "head": with the vocabulary and the hidden size.
    """

    shape: Shape
    touched: Counter[str] = field(default_factory=Counter)

    def look(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Take in an operation, by its name and the tensors that it reads and writes."""
        if name in IN_PART:
            return
        for tensor in tensors:
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or size == 1]
            kind = self._kind(sizes)
            if kind is not None:
                self.touched[kind] += math.prod(sizes) * tensor.element_size()

    def _kind(self, sizes: Sequence[int]) -> str | None:
        shape, numbers = self.shape, math.prod(sizes)
        for num_keys in (NUM_KEYS, NUM_KEYS - 1):  # the cache, and as it was before this step
            if num_keys in sizes:
                return "rows" if numbers // num_keys % shape.head_dim else "cache"
        if VISUAL_TOKENS in sizes:
            return "visual rows" if numbers // VISUAL_TOKENS % shape.hidden_size else "images"
        return "head" if sorted(sizes) == sorted((shape.vocab_size, shape.hidden_size)) else None


@dataclass(frozen=True)
class Step:
    """What a method does in a step of decoding of one conversation, as counted on a tiny model.

    Attributes:
        launches: Operations, by layer and outside.
        touched: See `Traffic`: of all layers together.
        layers: In how many decoder layers the method acts.
    """

    launches: Launches
    touched: dict[str, int]
    layers: int


def count_step(model: nn.Module, name: str, in_graph: bool) -> Step:
    """Count what a method does in a step of decoding.

    Args:
        model: The model of `COUNTED_ON`.
        name: Of `PREDICTED`.
        in_graph: Whether its cache has its full size from the start, as graphs want it.
    """
    settings = Settings(
        methods=(name,), contexts=(NUM_KEYS - 3,), visual_tokens=VISUAL_TOKENS, new_tokens=1, rounds=1,
        static_cache=in_graph,
    )  # fmt: skip
    runner = Runner(model, name, NUM_KEYS - 3, settings)  # with its full size, three more than the prompt
    traffic = Traffic(PRESETS[COUNTED_ON])
    with torch.no_grad():
        runner.prefill()
        for _ in range(2):
            runner.decode()
    launches = count_launches(runner.model, runner.decode, traffic.look)
    return Step(launches, dict(traffic.touched), layers_of(runner.model, name))


def layers_of(model: nn.Module, name: str) -> int:
    """In how many decoder layers of a model a method acts."""
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
        model = build_random(COUNTED_ON, dtype=dtype)
        self.steps = {(name, graph): count_step(model, name, graph) for name in self.names for graph in (False, True)}

    def launches(self, name: str, in_graph: bool) -> int:
        """How many operations a step has."""
        base, own = self.steps["base", in_graph].launches, self.steps[name, in_graph].launches
        of_base = base.outside + base.layers[-1] * self.shape.layers
        beyond = own.beyond(base)
        least = min(beyond, default=0)
        return of_base + least * self.layers[name] + own.total - base.total - least * len(beyond)

    def read(self, name: str, in_graph: bool, context: int, visual_tokens: int, batch: int) -> float:
        """How many bytes a step reads and writes."""
        small, large = PRESETS[COUNTED_ON], self.shape
        base, own = self.steps["base", in_graph], self.steps[name, in_graph]
        grown = {
            "cache": batch
            * context
            / NUM_KEYS
            * (large.kv_heads * large.head_dim)
            / (small.kv_heads * small.head_dim),
            "rows": batch * context / NUM_KEYS * large.heads / small.heads,
            "images": batch * visual_tokens / VISUAL_TOKENS * large.hidden_size / small.hidden_size,
            "visual rows": batch * visual_tokens / VISUAL_TOKENS * large.heads / small.heads,
            "head": large.vocab_size * large.hidden_size / (small.vocab_size * small.hidden_size),
        }
        read = self.foot.weights + base.touched["cache"] * grown["cache"] * large.layers / small.layers
        if name == "pvm":  # whose widths are shares of the model's, so that its bytes are known by shape
            return read + self.foot.read(context, visual_tokens, batch)[1]
        for kind, factor in grown.items():
            beyond = own.touched.get(kind, 0) - base.touched.get(kind, 0)
            read += beyond * factor * self.layers[name] / max(own.layers, 1)
        return read

    def seconds(
        self, device: Device, name: str, in_graph: bool, context: int, visual_tokens: int, batch: int
    ) -> float:
        """The time of a step on a device."""
        weights = self.foot.weights / self.foot.bytes_of_a_number
        read = self.read(name, in_graph, context, visual_tokens, batch)
        return device.seconds(self.launches(name, in_graph), read, 2 * batch * weights, in_graph)


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
        "operations", "gb" and "ms" of a step in "eager" mode and in a "graph".
    """
    made, chosen = Prediction(PRESETS[preset], names), DEVICES[device]

    def step(name: str, in_graph: bool, batch: int) -> dict[str, float]:
        sizes = context, visual_tokens, batch
        return {
            "operations": made.launches(name, in_graph),
            "gb": made.read(name, in_graph, *sizes) / 1e9,
            "ms": 1000 * made.seconds(chosen, name, in_graph, *sizes),
        }

    return {
        "device": asdict(chosen),
        "shape": PRESETS[preset].title,
        "context": context,
        "visual_tokens": visual_tokens,
        "batches": {
            str(batch): {
                name: {"eager": step(name, False, batch), "graph": step(name, True, batch)} for name in made.names
            }
            for batch in batches
        },
    }


def check_predictions(
    names: Sequence[str], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure steps on this machine's CPU, at a tiny shape and a larger one, beside what is predicted of them.

    What decides is taken from the base alone: what an operation takes from the tiny shape, the bandwidth from the
    larger one. So every other number is a prediction.

    Args:
        names: Of `PREDICTED`.
        settings: The prompt, and how many tokens and rounds.
        progress: Called with what comes next.

    Returns:
        What the JSON file holds: "machine", "settings", what an operation takes, the bandwidth, and "shapes", by title
        the milliseconds "measured" and "predicted" of each method.
    """
    shapes = [PRESETS[COUNTED_ON], PRESETS["1b-random"].part(4)]
    context, visual = settings.contexts[0], settings.visual_tokens
    taken = [_measured(shape, names, settings, progress) for shape in shapes]
    predictions = [Prediction(shape, names, torch.float32) for shape in shapes]
    tiny, large = predictions
    launch = taken[0]["base"] / tiny.launches("base", False)
    read = large.read("base", False, context, visual, settings.batch)
    bandwidth = read / (taken[1]["base"] - launch * large.launches("base", False))
    device = Device("this CPU", bandwidth, math.inf, launch, runs_ahead=False)
    return {
        "machine": describe_machine(torch.device("cpu")),
        "settings": asdict(settings),
        "launch_us": launch * 1e6,
        "bandwidth_gb": bandwidth / 1e9,
        "shapes": {
            shape.title: {
                name: {
                    "measured": 1000 * own[name],
                    "predicted": 1000 * prediction.seconds(device, name, False, context, visual, settings.batch),
                }
                for name in prediction.names
            }
            for shape, own, prediction in zip(shapes, taken, predictions)
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

"""How many operations a forward launches, which bounds a step of decoding on a GPU that is called from Python."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import DeviceType, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..tokens.families import find_vlm
from .models import METHODS
from .run import describe_machine
from .runners import Runner, Settings, runner_of


# Operations that compute nothing, beside views: they make room, give what is there another shape, or are about dtypes.
FREE = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "promote_types")
FUSED = (F.rms_norm, torch.rms_norm)
OUTSIDE = -1  # in place of a layer
COMPILED = "## Call CompiledFxGraph"  # what the profiler calls the run of a graph that inductor has compiled


@dataclass(frozen=True)
class Launches:
    """The operations of one forward.

    Attributes:
        outside: Of those outside the decoder layers, how many.
        layers: In each decoder layer, how many.
        names: All of them, by the names that torch gives them.
    """

    outside: int
    layers: tuple[int, ...]
    names: Mapping[str, int] = field(repr=False)

    @property
    def total(self) -> int:
        """How many in all."""
        return self.outside + sum(self.layers)

    def beyond(self, base: Launches) -> list[int]:
        """How many more operations each decoder layer has than in another forward, for layers where this differs."""
        by_layer = (own - other for own, other in zip(self.layers, base.layers))
        return [number for number in by_layer if number]


Look = Callable[[str, list[torch.Tensor], int], None]


class _Counting(TorchDispatchMode):
    def __init__(self, look: Look | None, counts_views: bool) -> None:
        super().__init__()
        self.look, self.counts_views = look, counts_views
        self.place = OUTSIDE
        self.is_within = False  # one operation that is counted already
        self.found: Counter[tuple[int, str]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.is_within:
            return result
        name = function.overloadpacket.__name__
        computes = not function.is_view and name not in FREE and not _is_empty(result)
        if computes or self.counts_views:
            self.found[self.place, name] += 1
        if computes and self.look is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
            self.look(name, tensors, _flops(function.overloadpacket, args, kwargs, result))
        return result


def _flops(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """How many products and sums an operation takes, if it multiplies matrices."""
    if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # unknown to torch's own counter
        query, key = args[:2]
        return 4 * query.numel() * key.shape[-2]
    count = flop_registry.get(function)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


def _is_empty(result: Any) -> bool:
    """Whether there was nothing to compute: a tensor without numbers."""
    return isinstance(result, torch.Tensor) and result.numel() == 0


class _Fusing(TorchFunctionMode):
    """Counts what is several operations on a CPU, and one kernel on a GPU."""

    def __init__(self, counting: _Counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in FUSED:
            return function(*args, **(kwargs or {}))
        self.counting.found[self.counting.place, function.__name__] += 1
        self.counting.is_within = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.counting.is_within = False


def count_launches(
    model: nn.Module, forward: Callable[[], object], look: Look | None = None, counts_views: bool = False
) -> Launches:
    """Count what a forward computes or copies, operation by operation, as torch dispatches them.

    Views, metadata and tensors without numbers are free, and torch's own RMS norm is one operation, as on a GPU.
    There an operation is mostly one kernel; a sort, or a sum over much, may be more.

    Args:
        model: A vision-language model.
        forward: Runs it once.
        look: Called with each operation's name, the tensors that it reads and writes, and the products and sums that
            it takes if it multiplies matrices.
        counts_views: Whether everything that Python calls counts, also what computes nothing.
    """
    layers, counting = find_vlm(model).layers, _Counting(look, counts_views)

    def go(place: int, *_: Any) -> None:
        counting.place = place

    handles = []
    for layer_idx, layer in enumerate(layers):
        # Before and after all others, so that what hooks compute is the layer's.
        handles.append(layer.register_forward_pre_hook(functools.partial(go, layer_idx), prepend=True))
        handles.append(layer.register_forward_hook(functools.partial(go, OUTSIDE)))
    try:
        with torch.no_grad(), _Fusing(counting), counting:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    by_place: Counter[int] = Counter()
    names: Counter[str] = Counter()
    for (place, name), number in counting.found.items():
        by_place[place] += number
        names[name] += number
    return Launches(by_place[OUTSIDE], tuple(by_place[place] for place in range(len(layers))), names)


def count_kernels(forward: Callable[[], object]) -> int:
    """Count the kernels that a compiled forward launches: those that inductor has made, and torch's own.

    Args:
        forward: Runs it once. On a CPU it must have been compiled with `"cpp.enable_kernel_profile"`.
    """
    with torch.no_grad(), profile() as profiled:
        forward()
    events = profiled.events()
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    in_graph = [event for event in events if event.cpu_parent and event.cpu_parent.name.startswith(COMPILED)]
    return len(on_device or in_graph)


def _kernels_of_a_step(model: nn.Module, name: str, settings: Settings) -> int:
    runner = Runner(model, name, settings.contexts[0], replace(settings, compile=False, static_cache=True))
    torch.compiler.reset()  # of each forward in Python, torch keeps only a few compiled forms
    runner.step = torch.compile(runner.model, fullgraph=True, options={"cpp.enable_kernel_profile": True})
    with torch.no_grad():
        runner.prefill()
        runner.decode()
    return count_kernels(runner.decode)


def measure_launches(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """Count the operations of a prefill and of a step of decoding, with the first length of the prompt.

    Args:
        model: A vision-language model from transformers.
        settings: The methods and the prompt. With `compile`, the kernels of a compiled step are counted as well, which
            takes up to a minute for each method.

    Returns:
        What the JSON file holds: "machine", "settings", and "methods". For each method, it has what `summary` says of
        "prefill" and "step", the operations of a step by name and, if a step was compiled, its "kernels". Methods that
        act only in `generate` are counted there, and have no kernels.
    """
    found: dict[str, dict[str, Launches]] = {}
    for name in dict.fromkeys(("base", *settings.methods)):
        runner = runner_of(model, name, settings.contexts[0], replace(settings, compile=False))
        with torch.no_grad():  # what is made once, in the first forward after attaching, does not count
            runner.prefill()
            runner.decode()
        found[name] = {"prefill": count_launches(runner.model, runner.prefill)}
        with torch.no_grad():
            runner.decode()
        found[name]["step"] = count_launches(runner.model, runner.decode)
    base = found["base"]
    compiled = [name for name in found if settings.compile and not METHODS[name].in_generate]
    kernels = {name: _kernels_of_a_step(model, name, settings) for name in compiled}
    return {
        "machine": describe_machine(next(model.parameters()).device),
        "settings": asdict(settings),
        "methods": {
            name: {
                **{part: summary(launches, base[part]) for part, launches in own.items()},
                "operations of a step": dict(sorted(own["step"].names.items())),
                **({"kernels": kernels[name]} if name in kernels else {}),
            }
            for name, own in found.items()
        },
    }


def summary(own: Launches, base: Launches) -> dict[str, int]:
    """What tables say of a method: operations in all, beyond the base, in each layer in which it has any, and once.

    Layers share what is the same for all of them, which the first one computes. So a layer's own operations are those
    of the layer with the fewest.
    """
    layers = own.beyond(base)
    beyond, least = own.total - base.total, min(layers, default=0)
    return {
        "in all": own.total,
        "beyond the base": beyond,
        "layers": len(layers),
        "a layer": least,
        "once": beyond - least * len(layers),
    }

"""How the real base is computed: on one thread, and in bf16 also where the CPU has no instructions for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


_KINDS = ("amx_bf16", "avx512_bf16", "bf16")
INSTRUCTIONS = next((name for name in _KINDS if torch.cpu.get_capabilities().get(name, False)), None)  # for bf16
PRODUCTS = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.einsum,
}


BF16 = "bf16 on the CPU"


def bf16() -> dict[str, str]:
    """How bf16 is computed here, for the record: kinds of CPUs differ in the last bit."""
    return {BF16: INSTRUCTIONS or "products in fp32, rounded once"}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, on which sums have one order, and bf16 by `ProductsInFloat` where that is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.nullcontext() if INSTRUCTIONS else ProductsInFloat():
            yield
    finally:
        torch.set_num_threads(threads)


class ProductsInFloat(TorchFunctionMode):
    """Computes products of bf16 matrices in fp32 and rounds them to bf16 once, at their end.

    So do instructions for bf16, which also sum in fp32. Without them, torch takes many times as long for such a
    product as for one of fp32 matrices.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        rounded = False

        def in_float(value: Any) -> Any:
            nonlocal rounded
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu":
                rounded = True
                return value.float()
            return value

        product = function(*tree_map(in_float, args), **tree_map(in_float, kwargs or {}))
        return product.bfloat16() if rounded else product

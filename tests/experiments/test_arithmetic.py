"""How the real base is computed where the CPU has no instructions for bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from language_models import tiny_language_model

from experiments.real import arithmetic
from experiments.real.arithmetic import ProductsInFloat, one_thread
from experiments.real.training import round_parameters
from experiments.real.vlm import new_vlm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    left, right = left.requires_grad_(), right.requires_grad_()
    with ProductsInFloat():
        products = [F.linear(left, right), left @ right.T, torch.matmul(left, right.T), left.matmul(right.T)]
    exact = left.double() @ right.double().T
    eps = torch.finfo(dtype).eps
    for product in products:
        assert product.dtype == dtype
        torch.testing.assert_close(
            product.double(), exact, rtol=eps, atol=32 * eps if dtype == torch.float64 else 1e-5
        )
    products[0].sum().backward()
    assert left.grad.dtype == right.grad.dtype == dtype
    torch.testing.assert_close(left.grad[0], right.detach().sum(0), rtol=32 * eps, atol=32 * eps)


def test_a_model_differs_by_rounding_alone():
    model = new_vlm(tiny_language_model())
    round_parameters(model)
    inputs = {"input_ids": torch.arange(1, 30)[None]}
    with torch.no_grad():
        own = model(**inputs).logits
        with ProductsInFloat():
            fast = model(**inputs).logits
        exact = model.double()(**inputs).logits
    assert fast.dtype == own.dtype == torch.bfloat16
    assert (fast - exact).abs().max() <= 2 * (own - exact).abs().max()


@pytest.mark.parametrize("instructions", ["avx512_bf16", None])
def test_it_is_left_to_cpus_with_instructions_for_bf16(monkeypatch, instructions):
    monkeypatch.setattr(arithmetic, "INSTRUCTIONS", instructions)
    seen = []
    monkeypatch.setattr(ProductsInFloat, "__torch_function__", lambda self, f, *rest: seen.append(f) or f(*rest[1]))
    with one_thread():
        assert torch.get_num_threads() == 1
        F.linear(torch.ones(2, 2), torch.ones(2, 2))
    assert (F.linear in seen) is (instructions is None)
    assert arithmetic.bf16() == {arithmetic.BF16: instructions or "products in fp32, rounded once"}

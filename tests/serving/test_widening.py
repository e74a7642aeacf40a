"""Wider heads against attention with the masks they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_pvm.integrations.vllm.widening import (
    anchored_across_modalities,
    scaled_for_some,
    supported_width,
    visual_keys_only,
    with_bias,
)


HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LAYOUTS = {
    "image first": [1, 1, 1, 0, 0, 0, 0],
    "image amid text": [0, 0, 1, 1, 0, 1, 0],
    "text alone": [0, 0, 0],
    "image alone": [1, 1, 1],
}


def heads(count: int, length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(length, count, HEAD_DIM, dtype=torch.float64).to(dtype)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What vLLM's kernels compute, scaled as for the heads that were widened; they take values of the same width."""
    scaling = HEAD_DIM**-0.5
    value = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(
        0, 1
    )


def assert_attends_by(output: torch.Tensor, scores: torch.Tensor, value: torch.Tensor) -> None:
    """That values are weighted by scores, `(heads, num_queries, num_keys)`, of the keys up to each query's own."""
    causal = scores.masked_fill(~torch.ones_like(scores[0]).tril().bool(), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", causal.softmax(-1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(output[..., :HEAD_DIM], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visual_keys_only_is_attention_to_the_visual_tokens_before(layout: str, dtype: torch.dtype):
    torch.manual_seed(0)
    visual_mask = torch.tensor(LAYOUTS[layout]) == 1
    length = len(visual_mask)
    query, key, value = heads(HEADS, length, dtype), heads(KV_HEADS, length, dtype), heads(KV_HEADS, length, dtype)
    output = causal_attention(*visual_keys_only(query * 9, key * 9, value, visual_mask))
    assert not output[..., HEAD_DIM:].any()
    for token in range(length):
        seen = visual_mask & (torch.arange(length) <= token)
        expected = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
        if seen.any():
            keys = key[seen].double().repeat_interleave(2, 1) * 9
            scores = torch.einsum("hd,khd->hk", query[token].double() * 9, keys) * HEAD_DIM**-0.5
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen].double().repeat_interleave(2, 1))
            tolerance = 1e-12 if dtype == torch.float64 else 0.1
            torch.testing.assert_close(output[token, :, :HEAD_DIM].double(), expected, atol=tolerance, rtol=tolerance)
        else:
            assert not output[token].any(), "exactly 0 where no visual token has been seen"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_anchored_across_modalities_is_two_kinds_of_scores(layout: str):
    torch.manual_seed(0)
    visual_mask = torch.tensor(LAYOUTS[layout]) == 1
    length = len(visual_mask)
    query, anchored, key, value = (heads(count, length) for count in (HEADS, HEADS, KV_HEADS, KV_HEADS))
    output = causal_attention(*anchored_across_modalities(query, anchored, key, visual_mask), value)
    keys = key.repeat_interleave(2, 1)
    same = visual_mask[:, None] == visual_mask[None]
    scores = torch.where(same, torch.einsum("qhd,khd->hqk", query, keys), torch.einsum("qhd,khd->hqk", anchored, keys))
    assert_attends_by(output, scores * HEAD_DIM**-0.5, value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_after_the_other_they_scale_some_scores_and_then_raise_some(layout: str):
    torch.manual_seed(0)
    visual_mask = torch.tensor(LAYOUTS[layout]) == 1
    length = len(visual_mask)
    query, anchored, key, value = (heads(count, length) for count in (HEADS, HEADS, KV_HEADS, KV_HEADS))
    factors, raised = torch.rand(2, length, dtype=torch.float64) + 0.5
    wide = anchored_across_modalities(query, anchored, key, visual_mask)
    wide = scaled_for_some(*wide, factors, ~visual_mask)
    wide = with_bias(*wide, raised.masked_fill(visual_mask, 0), visual_mask.double(), HEAD_DIM**-0.5)
    output = causal_attention(*wide, value)
    keys = key.repeat_interleave(2, 1)
    same = visual_mask[:, None] == visual_mask[None]
    scores = torch.where(same, torch.einsum("qhd,khd->hqk", query, keys), torch.einsum("qhd,khd->hqk", anchored, keys))
    scores = torch.where(visual_mask[:, None], scores, scores * factors) * HEAD_DIM**-0.5
    scores = scores + torch.where(visual_mask[:, None] | ~visual_mask, 0, raised[:, None])
    assert_attends_by(output, scores, value)


def test_a_bias_is_as_exact_in_16_bits_as_its_parts():
    query, key = heads(HEADS, 3, torch.bfloat16) * 0, heads(KV_HEADS, 3, torch.bfloat16) * 0
    raised, visual = torch.tensor([0.0, 1.2345678, 5.4321]), torch.tensor([1.0, 1, 0])
    asks, answers = with_bias(query, key, raised, visual, 128**-0.5)
    scores = asks[:, 0].double() @ answers[:, 0].double().T * 128**-0.5
    torch.testing.assert_close(scores, raised.double()[:, None] * visual, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("widen", ["anchored", "scaled", "raised"])
def test_a_method_that_is_off_leaves_the_scores_to_the_bit(widen: str):
    torch.manual_seed(0)
    query, anchored, key = (heads(count, 5, torch.float32) for count in (HEADS, HEADS, KV_HEADS))
    off, zero = torch.zeros(5, dtype=torch.bool), torch.zeros(5)
    wide_query, wide_key = {
        "anchored": lambda: anchored_across_modalities(query, anchored, key, off),
        "scaled": lambda: scaled_for_some(query, key, zero, off),
        "raised": lambda: with_bias(query, key, zero, torch.ones(5), HEAD_DIM**-0.5),
    }[widen]()
    assert wide_query[..., :HEAD_DIM].equal(query)
    assert wide_key[..., :HEAD_DIM].equal(key)
    assert not (wide_query[:, 0, HEAD_DIM:] * wide_key[:, 0, HEAD_DIM:]).any()


def test_the_smallest_width_with_a_kernel_is_taken():
    assert supported_width(129, lambda width: width in (64, 128, 192, 256)) == 192
    assert supported_width(128, lambda width: width % 8 == 0) == 128
    with pytest.raises(NotImplementedError, match="no kernel for heads of 129"):
        supported_width(129, lambda width: width <= 128)

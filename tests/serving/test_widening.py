"""Wider heads against attention with the masks they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_pvm.integrations.vllm.export import (
    anchored_across_modalities,
    supported_width,
    visual_keys_only,
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visual_keys_only_is_attention_to_the_visual_tokens_before(layout: str, dtype: torch.dtype):
    torch.manual_seed(0)
    visual_mask = torch.tensor(LAYOUTS[layout]) == 1
    length = len(visual_mask)
    query, key, value = heads(HEADS, length, dtype), heads(KV_HEADS, length, dtype), heads(KV_HEADS, length, dtype)
    output = causal_attention(*visual_keys_only(query * 9, key * 9, value, visual_mask, HEAD_DIM + 3))
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
    wide = anchored_across_modalities(query, anchored, key, visual_mask, 2 * HEAD_DIM + 5)
    output = causal_attention(*wide, value)
    assert not output[..., HEAD_DIM:].any()
    keys = key.repeat_interleave(2, 1)
    same = visual_mask[:, None] == visual_mask[None]
    scores = torch.where(same, torch.einsum("qhd,khd->hqk", query, keys), torch.einsum("qhd,khd->hqk", anchored, keys))
    scores = (scores * HEAD_DIM**-0.5).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(output[..., :HEAD_DIM], expected, atol=1e-12, rtol=1e-12)


def test_the_smallest_width_with_a_kernel_is_taken():
    assert supported_width(129, lambda width: width in (64, 128, 192, 256)) == 192
    assert supported_width(128, lambda width: width % 8 == 0) == 128
    with pytest.raises(NotImplementedError, match="no kernel for heads of 129"):
        supported_width(129, lambda width: width <= 128)

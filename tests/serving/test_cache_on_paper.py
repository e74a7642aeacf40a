"""What docs/how-to/serve.md says of the KV cache, by vLLM's own rules, on the shapes of models' layers."""

from __future__ import annotations

import re

import pytest
import torch
from pages import REPOSITORY


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from vllm.config import VllmConfig


try:
    from vllm.v1.core.kv_cache_planning import _pool_bytes_per_block, get_kv_cache_groups
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec


PAGE = " ".join((REPOSITORY / "docs" / "how-to" / "serve.md").read_text().split())
LAYERS, HEADS, CHANNELS = 32, 4, 256  # every fourth layer has full attention, the others keep a state
STATE = dict(shapes=((3, 8192), (32, 128, 128)), dtypes=(torch.bfloat16, torch.float32))  # a layer keeps two
MEMORY = 2**36


def groups_and_blocks(layers: dict[str, KVCacheSpec]) -> tuple[list[KVCacheSpec], int]:
    """The groups of layers that share blocks, and how many blocks the memory holds."""
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LHBNC"  # one layer after the other, as on a CPU
    groups = get_kv_cache_groups(config, layers)
    return [group.kv_cache_spec for group in groups], MEMORY // _pool_bytes_per_block(config, groups)


def kib_of_a_token(tokens_in_block: int, width: int = 1, branches: int = 0) -> float:
    """What one token of Qwen3.5-4B takes of the cache.

    Args:
        tokens_in_block: Of each block.
        width: How much wider an adapter makes the heads.
        branches: How many layers have one of PVM.
    """

    def attention(heads: int, channels: int) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=tokens_in_block, num_kv_heads=heads, head_size=channels, dtype=torch.bfloat16
        )

    own = attention(HEADS, width * CHANNELS)
    state = MambaSpec(
        block_size=tokens_in_block, page_size_padded=own.page_size_bytes, mamba_cache_mode="align", **STATE
    )
    layers: dict[str, KVCacheSpec] = {str(number): own if number % 4 == 3 else state for number in range(LAYERS)}
    layers |= {f"branch {number}": attention(1, CHANNELS + 8) for number in range(branches)}
    groups, num_blocks = groups_and_blocks(layers)
    of_tokens = sum(isinstance(spec, FullAttentionSpec) for spec in groups)  # a block in each of these
    return MEMORY / num_blocks * of_tokens / tokens_in_block / 1024


def requests_of_gemma3_4b(width: int = 1, branches: int = 0) -> float:
    """How many requests of 32,768 tokens have room, each with a block for as many tokens as each group of layers
    sees."""
    shape = dict(block_size=16, dtype=torch.bfloat16)
    wide = FullAttentionSpec(num_kv_heads=4, head_size=width * 256, **shape)
    narrow = SlidingWindowSpec(num_kv_heads=4, head_size=width * 256, sliding_window=1024, **shape)
    layers: dict[str, KVCacheSpec] = {str(number): narrow if (number + 1) % 6 else wide for number in range(34)}
    layers |= {
        f"branch {number}": FullAttentionSpec(num_kv_heads=1, head_size=264, **shape) for number in range(branches)
    }
    groups, num_blocks = groups_and_blocks(layers)
    seen = [1024 + 16 if isinstance(spec, SlidingWindowSpec) else 32_768 for spec in groups]
    return num_blocks * 16 / sum(seen)


def test_requests_that_have_room():
    said = re.search(
        r"(\d+) requests of 32,768 tokens, (\d+) with PVM in three layers, and (\d+) with DIPE or VAF", PAGE
    )
    found = [requests_of_gemma3_4b(**fields) for fields in ({}, {"branches": 3}, {"width": 2})]
    assert [int(number) for number in found] == [int(number) for number in said.groups()]


def test_what_branches_add_to_qwen3_vl_8b():
    def bytes_of(layers: int, heads: int, channels: int) -> int:
        spec = FullAttentionSpec(block_size=1, num_kv_heads=heads, head_size=channels, dtype=torch.bfloat16)
        return layers * spec.page_size_bytes

    (said,) = re.findall(r"which is ([\d.]+) % more, and each rank keeps all of them", PAGE)
    assert f"{100 * bytes_of(3, 1, 136) / bytes_of(36, 8, 128):.1f}" == said


def test_what_a_token_takes():
    tokens_in_block = int(re.search(r"to hold a state: (\d+) tokens for Qwen3.5-4B", PAGE)[1])
    state = MambaSpec(block_size=1, **STATE)
    of_one_token = 2 * HEADS * CHANNELS * 2
    assert tokens_in_block - 16 < state.page_size_bytes / of_one_token <= tokens_in_block, "the next multiple of 16"
    said = re.search(r"takes (\d+) KiB, (\d+) KiB with PVM in three layers, and (\d+) KiB with DIPE or VAF", PAGE)
    found = [kib_of_a_token(tokens_in_block, **fields) for fields in ({}, {"branches": 3}, {"width": 2})]
    assert [round(kib) for kib in found] == [int(kib) for kib in said.groups()]

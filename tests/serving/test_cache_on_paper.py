"""What docs/how-to/serve.md says of the KV cache of Qwen3.5-4B, by vLLM's own rules, on the shapes of its layers."""

from __future__ import annotations

import re

import pytest
import torch
from pages import REPOSITORY


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec


PAGE = " ".join((REPOSITORY / "docs" / "how-to" / "serve.md").read_text().split())
LAYERS, HEADS, CHANNELS = 32, 4, 256  # every fourth layer has full attention, the others keep a state
STATE = dict(shapes=((3, 8192), (32, 128, 128)), dtypes=(torch.bfloat16, torch.float32))  # a layer keeps two
MEMORY = 2**36


def kib_of_a_token(tokens_in_block: int, width: int = 1, branches: int = 0) -> float:
    """What one token takes of the cache.

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
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LHBNC"  # one layer after the other, as on a CPU
    groups = get_kv_cache_groups(config, layers)
    num_blocks = get_kv_cache_config_from_groups(config, groups, MEMORY).num_blocks
    of_tokens = sum(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups)  # a block in each of these
    return MEMORY / num_blocks * of_tokens / tokens_in_block / 1024


def test_what_a_token_takes():
    tokens_in_block = int(re.search(r"to hold a state: (\d+) tokens for Qwen3.5-4B", PAGE)[1])
    state = MambaSpec(block_size=1, **STATE)
    of_one_token = 2 * HEADS * CHANNELS * 2
    assert tokens_in_block - 16 < state.page_size_bytes / of_one_token <= tokens_in_block, "the next multiple of 16"
    said = re.search(r"takes (\d+) KiB, (\d+) KiB with PVM in three layers, and (\d+) KiB with DIPE or VAF", PAGE)
    found = [kib_of_a_token(tokens_in_block, **fields) for fields in ({}, {"branches": 3}, {"width": 2})]
    assert [round(kib) for kib in found] == [int(kib) for kib in said.groups()]

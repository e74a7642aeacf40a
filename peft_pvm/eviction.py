"""Keys that are taken out of a KV cache while a forward runs, as compression of the cache does (kvpress).

A cache may also be cropped, between two forwards: its last tokens go, and its length says which are left. Keys that go
during a forward come from anywhere. From then on, it is not known to which tokens the other keys belong.
"""

from __future__ import annotations

from typing import Any

from transformers import Cache


def keys_by_layer(cache: Cache | None) -> list[int | None]:
    """How many keys each layer of a cache holds. `None`: the layer keeps none yet, or has room for a fixed number."""
    return [_num_keys(layer) for layer in getattr(cache, "layers", ())]


def has_lost_keys(cache: Cache, keys_before: list[int | None], seq_len: int) -> bool:
    """Whether keys were taken out of a cache while a forward ran.

    Args:
        cache: The cache after the forward.
        keys_before: What `keys_by_layer` said before it.
        seq_len: How many tokens the forward read.
    """
    for layer_idx, num_keys in enumerate(keys_by_layer(cache)):
        if num_keys is None:
            continue
        layer = cache.layers[layer_idx]
        expected = seq_len + ((keys_before[layer_idx] or 0) if layer_idx < len(keys_before) else 0)
        if layer.is_sliding:
            expected = min(expected, layer.sliding_window - 1)
        if num_keys < expected:
            return True
    return False


def _num_keys(layer: Any) -> int | None:
    if layer.is_compileable or getattr(layer, "keys", None) is None:
        return None
    # A layer with a sliding window counts all tokens; one that quantises holds only its last keys as they are.
    return layer.keys.shape[-2] if layer.is_sliding else layer.get_seq_length()

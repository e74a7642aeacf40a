"""Every kernel's mask says the same: against loops over plain Python lists."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from peft_pvm.tokens.visibility import Visibility, real_tokens


BATCH, QUERIES, KEYS, FIRST = 2, 4, 9, 4  # the queries' own keys are 4 to 7; key 8 is not filled yet
REAL = torch.tensor([[1] * 8 + [0], [0, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()  # padding in front, and a hole


def expected(window: int | None, padded: bool) -> torch.Tensor:
    mask = torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    for row in range(BATCH):
        for query in range(QUERIES):
            for key in range(KEYS):
                own = FIRST + query
                near = window is None or key > own - window
                mask[row, 0, query, key] = key <= own and near and (not padded or REAL[row, key])
    return mask


def forms(window: int | None, padded: bool) -> dict[str, Visibility]:
    whole = expected(window, padded)
    added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)

    def rule(batch, head, query, key):
        return whole[batch, 0, query, key]

    common = dict(num_queries=QUERIES, num_keys=KEYS)
    found = {
        "bool": Visibility(whole, first_column=FIRST, **common),
        "added": Visibility(added, first_column=FIRST, **common),
        "longer than the keys": Visibility(torch.nn.functional.pad(whole, (0, 3)), first_column=FIRST, **common),
        "block mask": Visibility(
            create_block_mask(rule, BATCH, None, QUERIES, KEYS, device="cpu"), first_column=FIRST, **common
        ),
        "two axes": Visibility(REAL[:, :8] if padded else None, first_column=FIRST, sliding_window=window, **common),
        "tensor": Visibility(
            REAL if padded else None, first_column=torch.tensor(FIRST), sliding_window=window, **common
        ),
    }
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_all_forms_agree(window: int | None, padded: bool):
    whole = expected(window, padded)
    for name, visibility in forms(window, padded).items():
        if name == "two axes" and padded:
            assert visibility.attention_mask.shape[1] < KEYS, "as a static cache that is not full has it"
        for queries in (slice(None), slice(1, 3), slice(3, 4)):
            for keys in (slice(None), *(slice(start, stop) for stop in range(1, KEYS + 1) for start in range(stop))):
                part = visibility.mask(queries, keys)
                part = torch.ones(()).bool() if part is None else part
                assert torch.equal(part.expand(whole[:, :, queries, keys].shape), whole[:, :, queries, keys]), name


@pytest.mark.parametrize("name", ["bool", "added", "block mask", "two axes"])
def test_ranks_count_real_tokens(name: str):
    key_ranks, query_ranks = forms(None, True)[name].ranks()
    for row in range(BATCH):
        for key in range(8):
            if REAL[row, key]:
                assert key_ranks[row, 0, key] == REAL[row, :key].sum()
        for query in range(QUERIES):
            if REAL[row, FIRST + query]:
                assert query_ranks[row, 0, query] == REAL[row, : FIRST + query].sum()


def test_a_rule_that_does_not_look_at_the_batch():
    mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, QUERIES, KEYS, device="cpu")
    visibility = Visibility(mask, QUERIES, KEYS, 0)
    assert torch.equal(visibility.mask()[0, 0], torch.ones(QUERIES, KEYS).tril().bool())
    assert visibility.ranks()[0].shape == (1, 1, KEYS)


def test_a_bias_is_handed_on():
    bias = torch.randn(1, 1, QUERIES, KEYS)
    visibility = Visibility(bias, QUERIES, KEYS, FIRST)
    assert torch.equal(visibility.bias(slice(1, 2), slice(3, 5)), bias[:, :, 1:2, 3:5])
    assert Visibility(expected(None, True), QUERIES, KEYS, FIRST).bias() is None


def test_real_tokens():
    shape, past = (BATCH, QUERIES), FIRST
    real = REAL[:, FIRST : FIRST + QUERIES]
    own = expected(None, True)
    added = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
    given = {
        "two axes": REAL[:, :8].long(),
        "made beforehand, for more tokens": torch.nn.functional.pad(REAL[:, :8].long(), (0, 5)),
        "bool": own,
        "added": added,
        "by layer type": {"sliding_attention": None, "full_attention": own},
        "of one layer type": {"sliding_attention": own},
        "block mask": create_block_mask(lambda b, h, q, k: own[b, 0, q, k], BATCH, None, QUERIES, KEYS, device="cpu"),
    }
    for name, mask in given.items():
        for length in (past, torch.tensor(past)):
            assert torch.equal(real_tokens(mask, shape, length), real), name
    assert real_tokens(None, shape, past) is None
    assert real_tokens({"full_attention": None}, shape, past) is None

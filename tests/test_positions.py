"""The pure functions against loops over plain Python lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_pvm.positions import EMPTY_SLOT, causally_visible, gather_rows, pack, placeholder_mask, scatter_rows


@st.composite
def masks(draw) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    return torch.tensor(values)


@given(masks(), st.lists(st.integers(0, 5), max_size=3))
def test_placeholder_mask(mask: torch.Tensor, token_ids: list[int]):
    input_ids = torch.arange(mask.numel()).reshape(mask.shape) % 6
    found = placeholder_mask(input_ids, token_ids)
    assert found.tolist() == [[token in token_ids for token in row] for row in input_ids.tolist()]


@given(masks(), st.integers(0, 5))
def test_pack(mask: torch.Tensor, min_length: int):
    rows = [[position for position, marked in enumerate(row) if marked] for row in mask.tolist()]
    width = max(min_length, *map(len, rows))
    assert pack(mask, min_length).tolist() == [row + [EMPTY_SLOT] * (width - len(row)) for row in rows]


@given(masks())
def test_gather_and_scatter(mask: torch.Tensor):
    tensor = torch.arange(1.0, 1 + 2 * mask.numel()).reshape(*mask.shape, 2)
    positions = pack(mask, min_length=1)
    gathered = gather_rows(tensor, positions)
    for row, listed in enumerate(positions.tolist()):
        for rank, position in enumerate(listed):
            expected = [0.0, 0.0] if position == EMPTY_SLOT else tensor[row, position].tolist()
            assert gathered[row, rank].tolist() == expected
    restored = scatter_rows(gathered + 0.5, positions, mask.shape[1])
    assert torch.equal(restored, (tensor + 0.5) * mask.unsqueeze(-1))


@given(masks(), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_causally_visible(mask: torch.Tensor, queries: list[int]):
    slots = pack(mask, min_length=1)
    positions = torch.tensor([queries] * mask.shape[0])
    visible = causally_visible(slots, positions)
    for row, listed in enumerate(slots.tolist()):
        for number, query in enumerate(queries):
            expected = [slot != EMPTY_SLOT and slot < query for slot in listed]
            assert visible[row, number].tolist() == expected

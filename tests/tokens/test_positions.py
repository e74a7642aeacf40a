"""The pure functions against loops over plain Python lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_pvm.tokens.memory import Runs
from peft_pvm.tokens.positions import (
    BEYOND,
    EMPTY_SLOT,
    PADDING,
    TEXT,
    VISUAL,
    causally_visible,
    gather_rows,
    images_of_runs,
    modalities,
    pack,
    placeholder_mask,
    run_anchors,
    run_starts,
    scatter_rows,
)


@st.composite
def masks(draw) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    return torch.tensor(values)


def test_what_is_picked_out_keeps_positions_alone_for_the_backward():
    tensor, positions = torch.randn(2, 1000, 8, requires_grad=True), torch.tensor([[3, 900], [0, EMPTY_SLOT]])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        gather_rows(tensor, positions).sum().backward()
    assert kept
    assert all(saved.numel() == positions.numel() for saved in kept)
    rows = torch.tensor([[1.0 * (place in row) for place in range(1000)] for row in positions.tolist()])
    assert torch.equal(tensor.grad, rows.unsqueeze(2).expand_as(tensor))


def test_nothing_is_picked_out_of_nothing():
    assert gather_rows(torch.randn(2, 5, 8), torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 8)
    assert gather_rows(torch.empty(2, 5, 0), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 0)


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


@st.composite
def conversations(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Modalities, with padding anywhere, and positions."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    tokens = st.lists(st.sampled_from([TEXT, VISUAL, PADDING]), min_size=columns, max_size=columns)
    modality = torch.tensor(draw(st.lists(tokens, min_size=rows, max_size=rows)))
    positions = torch.tensor(draw(st.lists(st.integers(-3, 50), min_size=modality.numel(), max_size=modality.numel())))
    return modality, positions.reshape(modality.shape)


def anchors_by_loop(modality: torch.Tensor, positions: torch.Tensor) -> list[list[int | None]]:
    """`None` at padding."""
    rows = []
    for kinds, places in zip(modality.tolist(), positions.tolist()):
        last, anchor, row = PADDING, None, []
        for kind, place in zip(kinds, places):
            if kind not in (PADDING, last):
                last, anchor = kind, place
            row.append(None if kind == PADDING else anchor)
        rows.append(row)
    return rows


@given(conversations())
def test_modalities(conversation: tuple[torch.Tensor, torch.Tensor]):
    modality, _ = conversation
    assert torch.equal(modalities(modality == VISUAL, modality != PADDING), modality)
    assert torch.equal(modalities(modality == VISUAL, None) == VISUAL, modality == VISUAL)


@given(conversations(), st.data())
def test_anchors_of_a_conversation_in_pieces(conversation: tuple[torch.Tensor, torch.Tensor], data):
    """However it is cut into forwards, cropped and read again, every token has the anchor of the loop."""
    modality, positions = conversation
    expected = anchors_by_loop(modality, positions)
    length = modality.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=3)) | {length})
    runs, start = Runs.none(modality.shape[0], modality.device), 0
    for stop in cuts:
        kept = data.draw(st.integers(0, start))  # what was read after this is cropped and read again
        runs, start = runs.cropped(kept), kept
        piece, places = modality[:, start:stop], positions[:, start:stop]
        starts = run_starts(piece, runs.open_modality)
        anchors = run_anchors(starts, places, runs.open_anchor)
        for row, (kinds, found) in enumerate(zip(piece.tolist(), anchors.tolist())):
            for column, kind in enumerate(kinds):
                if kind != PADDING:
                    assert found[column] == expected[row][start + column]
        listed = pack(starts)
        first = listed.clamp(min=0)
        slots = torch.where(listed >= 0, listed + start, EMPTY_SLOT)
        runs = runs.extended(slots, places.gather(1, first), piece.gather(1, first))
        start = stop
    last = [next((kind for kind in reversed(kinds) if kind != PADDING), PADDING) for kinds in modality.tolist()]
    assert runs.open_modality.tolist() == last
    assert runs.awaits_text == any(kind != TEXT for kind in last)


@given(st.lists(st.lists(st.integers(1, 4), max_size=7), min_size=1, max_size=3), st.data())
def test_images_of_runs(rows: list[list[int]], data):
    """Rows of runs that have these lengths, text and visual in turn, missing runs among them."""
    image_gap, max_images = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    table, expected = [], []
    for lengths in rows:
        first = data.draw(st.sampled_from([TEXT, VISUAL]))
        modality = [first if number % 2 == 0 else 1 - first for number in range(len(lengths))]
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        runs = [[start, start + 100, kind] for start, kind in zip(starts, modality)]
        images: list[list[int]] = []
        for number, (start, anchor, kind) in enumerate(runs):
            if kind == VISUAL:
                end = runs[number + 1][1] if number + 1 < len(runs) else BEYOND
                is_near = bool(images) and anchor - runs[number - 1][1] < image_gap
                if images and (is_near or len(images) == max_images):
                    images[-1][1] = end
                else:
                    images.append([start, end])
        expected.append(images)
        for place in data.draw(st.lists(st.integers(0, len(runs)), max_size=2)):
            runs.insert(
                place, [EMPTY_SLOT, data.draw(st.integers(0, 200)), data.draw(st.sampled_from([TEXT, VISUAL]))]
            )
        table.append(runs)
    width = max(map(len, table))
    missing = [EMPTY_SLOT, EMPTY_SLOT, PADDING]
    filled = [runs + [missing] * (width - len(runs)) for runs in table]
    columns = torch.tensor(filled, dtype=torch.long).reshape(len(rows), width, 3)
    found = torch.stack(images_of_runs(*columns.unbind(2), image_gap, max_images), 2)
    num_images = max(1, *map(len, expected))
    assert found.tolist() == [images + [[BEYOND, BEYOND]] * (num_images - len(images)) for images in expected]

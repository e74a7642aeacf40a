"""What a batch remembers of its tokens, against loops over plain Python lists, and how it rides on a cache."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, StaticCache

from peft_pvm.tokens.memory import (
    Coverage,
    Runs,
    VisualMemory,
    attach_memory,
    coverage_of,
    has_lost_keys,
    keys_by_layer,
    memory_of,
)
from peft_pvm.tokens.positions import EMPTY_SLOT, PADDING, TEXT, VISUAL


HIDDEN = 3
SEEDS = range(12)
ROW_OPERATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[list], list]]] = {
    "reversed": (lambda tensor: tensor.flip(0), lambda rows: rows[::-1]),
    "repeated": (lambda tensor: tensor.repeat_interleave(2, 0), lambda rows: [row for row in rows for _ in range(2)]),
}


@dataclass
class Run:
    start: int
    anchor: int
    modality: int


def random_runs(seed: int) -> tuple[list[list[Run]], int]:
    """Of each row of a batch, its runs in order; modalities take turns. And the length of the batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    length, rows = 30, []
    for _ in range(draw(1, 4)):
        runs: list[Run] = []
        start, modality = draw(0, 8), (TEXT, VISUAL)[draw(0, 2)]
        while start < length and len(runs) < 5:
            runs.append(Run(start, draw(0, 100), modality))
            start, modality = start + draw(1, 12), VISUAL if modality == TEXT else TEXT
        rows.append(runs if draw(0, 4) else [])
    return rows, length


def as_table(rows: list[list[Run]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts, anchors and modalities. Where a row has fewer runs, only the start says so."""
    width = max(map(len, rows))
    nothing = Run(EMPTY_SLOT, 77, VISUAL)
    padded = [[*row, *[nothing] * (width - len(row))] for row in rows]
    columns = [[[getattr(run, name) for run in row] for row in padded] for name in ("start", "anchor", "modality")]
    return tuple(torch.tensor(column, dtype=torch.long).reshape(len(rows), width) for column in columns)


def chunks_of(rows: list[list[Run]], cuts: list[int]) -> list[list[list[Run]]]:
    return [
        [[run for run in row if start <= run.start < stop] for row in rows] for start, stop in zip([0, *cuts], cuts)
    ]


def table_in_chunks(rows: list[list[Run]], cuts: list[int]) -> Runs:
    table = Runs.none(len(rows), torch.device("cpu"))
    for chunk in chunks_of(rows, cuts):
        table = table.extended(*as_table(chunk))
    return table


def check_runs(table: Runs, rows: list[list[Run]]) -> None:
    """A table says of each row what its list says."""
    for row, runs in enumerate(rows):
        found = [
            (int(start), int(anchor), int(modality))
            for start, anchor, modality in zip(table.starts[row], table.anchors[row], table.modalities[row])
            if start >= 0
        ]
        assert found == [(run.start, run.anchor, run.modality) for run in runs]
        assert int(table.open_modality[row]) == (runs[-1].modality if runs else PADDING)
        if runs:
            assert int(table.open_anchor[row]) == runs[-1].anchor


def check_summary(table: Runs, rows: list[list[Run]]) -> None:
    assert table.last_start == max((run.start for row in rows for run in row), default=-1)
    assert table.awaits_text == any(not row or row[-1].modality != TEXT for row in rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_runs_read_in_pieces_are_runs_read_at_once(seed: int):
    rows, length = random_runs(seed)
    for cuts in ([length], [7, length], [1, 2, 15, 16, length]):
        table = table_in_chunks(rows, cuts)
        check_runs(table, rows)
        check_summary(table, rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_cropped_runs_are_those_that_had_begun(seed: int):
    rows, length = random_runs(seed)
    table = table_in_chunks(rows, [10, length])
    for stop in range(length + 2):
        begun = [[run for run in row if run.start < stop] for row in rows]
        check_runs(table.cropped(stop), begun)
        check_summary(table.cropped(stop), begun)
    check_runs(table, rows)  # never changed, only replaced
    later = [[Run(length, 5, VISUAL)] for _ in rows]
    cropped = table.cropped(12).extended(*as_table(later))
    check_runs(cropped, [[*(run for run in row if run.start < 12), *more] for row, more in zip(rows, later)])


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_rows_of_runs_go_together(seed: int, operation: str):
    rows, length = random_runs(seed)
    on_tensors, on_lists = ROW_OPERATIONS[operation]
    table = table_in_chunks(rows, [length]).mapped(on_tensors)
    check_runs(table, on_lists(rows))
    check_summary(table, on_lists(rows))


# ---- the memory itself


@dataclass
class Bank:
    """The visual tokens of a batch in lists: of each row, slots with embeddings."""

    rows: list[list[tuple[int, list[float]]]]
    length: int

    @staticmethod
    def random(seed: int) -> Bank:
        generator = torch.Generator().manual_seed(seed)
        batch, length = 1 + seed % 3, 20
        is_visual = torch.rand(batch, length, generator=generator) < 0.3
        is_visual[:, 0] = seed % 2 == 0  # with and without an image in the first piece
        values = torch.randn(batch, length, HIDDEN, generator=generator)
        rows = [
            [(slot, values[row, slot].tolist()) for slot in range(length) if is_visual[row, slot]]
            for row in range(batch)
        ]
        return Bank(rows, length)

    def extended(self, memory: VisualMemory, start: int, stop: int) -> VisualMemory:
        """The memory after it has read the tokens from one slot to another."""
        piece = [[(slot, value) for slot, value in row if start <= slot < stop] for row in self.rows]
        width = max(map(len, piece))
        if not width:
            return memory
        nothing = (EMPTY_SLOT, [0.0] * HIDDEN)
        padded = [[*row, *[nothing] * (width - len(row))] for row in piece]
        embeddings = torch.tensor([[value for _, value in row] for row in padded], requires_grad=True)
        return memory.extended(embeddings, torch.tensor([[slot for slot, _ in row] for row in padded]))

    def read(self, cuts: list[int]) -> VisualMemory:
        memory = VisualMemory()
        for start, stop in zip([0, *cuts], cuts):
            memory = self.extended(memory, start, stop)
        return memory


def check_memory(memory: VisualMemory, rows: list[list[tuple[int, list[float]]]]) -> None:
    assert memory.is_empty == (not any(rows))
    assert memory.last_slot == max((slot for row in rows for slot, _ in row), default=-1)
    if memory.is_empty:
        return
    assert not memory.is_dense or bool((memory.slots >= 0).all())
    assert not memory.embeddings.requires_grad
    for row, tokens in enumerate(rows):
        filled = memory.slots[row] >= 0
        assert memory.slots[row][filled].tolist() == [slot for slot, _ in tokens]
        assert memory.embeddings[row][filled].tolist() == [pytest.approx(value) for _, value in tokens]


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_read_in_pieces_is_all_of_it(seed: int):
    bank = Bank.random(seed)
    for cuts in ([20], [5, 20], [1, 2, 9, 10, 20]):
        memory = bank.read(cuts)
        check_memory(memory, bank.rows)
        assert memory.is_dense == bool((memory.slots >= 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_cropped_memory_is_what_stood_there(seed: int):
    bank = Bank.random(seed)
    memory = bank.read([7, 20])
    for stop in range(bank.length + 2):
        check_memory(memory.cropped(stop), [[token for token in row if token[0] < stop] for row in bank.rows])
    check_memory(memory, bank.rows)
    assert memory.cropped(memory.last_slot + 1) is memory, "nothing to do"


class Branch:
    """Something that makes projections."""


@pytest.mark.parametrize("start", [0, 6], ids=["an empty memory", "one with images"])
def test_what_fills_up_belongs_to_one_memory(start: int):
    """Two conversations that go on from one: neither sees what is computed of the other's images."""
    bank, branch = Bank.random(2), Branch()
    earlier = bank.extended(VisualMemory(), 0, start)
    one, other = bank.extended(earlier, start, 13), bank.extended(earlier, 13, 20)
    assert one.last_slot > earlier.last_slot
    assert other.last_slot > earlier.last_slot
    one.hidden_states[0] = torch.ones(1)
    one.keep_projections(branch, torch.ones(1), torch.ones(1))
    for memory in (earlier, other, bank.extended(earlier, start, 13)):
        assert memory.hidden_states == memory.projections == {}


def test_what_filled_up_is_handed_on():
    """To a memory with more tokens, or with fewer. Nothing of images that are gone stays."""
    bank, branch = Bank.random(2), Branch()
    memory = bank.extended(VisualMemory(), 0, 13)
    memory.hidden_states[0] = states = torch.ones(1)
    memory.keep_projections(branch, states, states)
    first = min(row[0][0] for row in bank.rows)
    for later in (bank.extended(memory, 13, 20), memory.cropped(memory.last_slot)):
        assert later.hidden_states[0] is states
        assert len(later.projections) == 1
    emptied = memory.cropped(first)
    assert emptied.hidden_states == emptied.projections == {}


def test_projections_go_with_their_branches():
    memory, branches = VisualMemory(), [Branch(), Branch()]
    for number, branch in enumerate(branches):
        memory.keep_projections(branch, torch.full((1,), number), torch.full((1,), -number))
    assert len(memory.projections) == 2
    del branches[0], branch
    gc.collect()
    memory.keep_projections(branches[0], torch.tensor([5]), torch.tensor([6]))
    assert [(int(keys), int(values)) for keys, values in memory.projections.values()] == [(5, 6)]
    assert pickle.loads(pickle.dumps(memory)).projections == {}, "another process has other branches"


def full_memory(seed: int = 2) -> tuple[VisualMemory, list[list[Run]], Bank]:
    """A memory in which there is something of everything."""
    bank = Bank.random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [[Run(0, 3, TEXT), Run(4 + row, 9, VISUAL)] for row in range(len(bank.rows))]
    memory = bank.read([20])
    memory.runs = table_in_chunks(rows, [20])
    memory.kept = {"positions": torch.randint(0, 9, (len(rows), 20, 2), generator=generator)}
    memory.notes = {"numbers": torch.arange(len(rows))}
    memory.grounding = ((7, torch.arange(len(rows))), (memory.last_slot, torch.arange(len(rows)) + 9))
    memory.hidden_states[1] = memory.embeddings + 1
    memory.projections[BRANCH] = (memory.embeddings + 2, memory.embeddings + 3)
    return memory, rows, bank


BRANCH_ITSELF = Branch()
BRANCH = weakref.ref(BRANCH_ITSELF)


@pytest.mark.parametrize("operation", ROW_OPERATIONS)
def test_rows_go_together(operation: str):
    """Everything that belongs to a conversation goes where it goes."""
    on_tensors, on_lists = ROW_OPERATIONS[operation]
    memory, rows, bank = full_memory()
    kept = memory.kept["positions"]
    found = memory.mapped(on_tensors)
    check_memory(found, on_lists(bank.rows))
    check_runs(found.runs, on_lists(rows))
    assert found.kept["positions"].tolist() == on_lists(kept.tolist())
    numbers = on_lists(list(range(len(rows))))
    assert found.notes["numbers"].tolist() == numbers
    assert [tensor.tolist() for _, tensor in found.grounding] == [numbers, [number + 9 for number in numbers]]
    for offset, tensor in zip((1, 2, 3), (found.hidden_states[1], *found.projections[BRANCH])):
        assert torch.equal(tensor, found.embeddings + offset)
    check_memory(memory, bank.rows)
    assert memory.kept["positions"] is kept


def test_an_empty_memory_has_no_rows_of_its_own():
    """Its tensors are of no batch, and yet runs and what is kept are."""
    memory = VisualMemory(runs=table_in_chunks([[Run(0, 3, TEXT)], []], [9]), kept={"x": torch.ones(2, 4, 1)})
    found = memory.mapped(lambda tensor: tensor[[1, 1, 0]])
    assert found.is_empty
    assert found.kept["x"].shape == (3, 4, 1)
    check_runs(found.runs, [[], [], [Run(0, 3, TEXT)]])


def test_all_of_it_is_cropped():
    memory, rows, bank = full_memory()
    kept = memory.kept["positions"]
    for stop in range(22):
        found = memory.cropped(stop)
        assert torch.equal(found.kept["positions"], kept[:, :stop])
        assert [slot for slot, _ in found.grounding] == [slot for slot, _ in memory.grounding if slot < stop]
        check_runs(found.runs, [[run for run in row if run.start < stop] for row in rows])
        check_memory(found, [[token for token in row if token[0] < stop] for row in bank.rows])
    assert memory.kept["positions"] is kept


def test_a_copy_is_its_own():
    memory, rows, bank = full_memory()
    twin = copy.deepcopy(memory)
    for tensor in (memory.embeddings, memory.slots, memory.kept["positions"], memory.hidden_states[1]):
        tensor.zero_()
    memory.projections[BRANCH][0].zero_()
    memory.runs.starts.zero_()
    check_memory(twin, bank.rows)
    check_runs(twin.runs, rows)
    assert twin.kept["positions"].any()
    assert torch.equal(twin.hidden_states[1], twin.embeddings + 1)
    assert torch.equal(twin.projections[BRANCH][0], twin.embeddings + 2)


def test_another_device_gets_one_copy():
    memory, _, _ = full_memory()
    assert memory.to(torch.device("cpu")) is memory
    moved = memory.to(torch.device("meta"))
    assert memory.to(torch.device("meta")) is moved
    tensors = (moved.embeddings, moved.slots, moved.runs.starts, moved.runs.open_anchor, moved.kept["positions"])
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.hidden_states is memory.hidden_states, "a layer stays on its device"
    assert moved.projections is memory.projections
    nothing = VisualMemory()
    assert nothing.to(torch.device("meta")) is nothing
    assert VisualMemory(kept={"x": torch.ones(1, 1, 1)}).to(torch.device("meta")).kept["x"].is_meta


# ---- on a cache


def filled_cache(batch: int = 2, num_keys: int = 5, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer_idx in range(layers):
        cache.update(torch.randn(batch, 1, num_keys, 4), torch.randn(batch, 1, num_keys, 4), layer_idx)
    return cache


def test_a_cache_without_memory_has_none():
    for cache in (None, filled_cache()):
        assert memory_of(cache) is None
        assert (coverage_of(cache).num_tokens, coverage_of(cache).num_keys) == (0, 0)


CACHE_OPERATIONS: dict[str, tuple[Callable[[DynamicCache], object], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("operation", CACHE_OPERATIONS)
def test_what_a_cache_does_to_its_rows_happens_to_the_memory(operation: str):
    change, expected = CACHE_OPERATIONS[operation]
    cache, (memory, rows, bank) = filled_cache(len(Bank.random(1).rows)), full_memory(1)
    keys = cache.layers[0].keys.clone()
    attach_memory(cache, memory, Coverage(20, 5))
    change(cache)
    assert torch.equal(cache.layers[0].keys, keys[expected])
    check_memory(memory_of(cache), [bank.rows[row] for row in expected])
    check_runs(memory_of(cache).runs, [rows[row] for row in expected])
    assert torch.equal(memory_of(cache).kept["positions"], memory.kept["positions"][expected])
    check_memory(memory, bank.rows)


def test_memory_shares_the_life_of_its_cache():
    memory, _, bank = full_memory()
    cache = filled_cache(len(bank.rows))
    attach_memory(cache, memory, Coverage(20, 5))
    assert isinstance(cache, DynamicCache)
    assert type(cache).__name__ == "DynamicCache"
    assert memory_of(cache) is memory
    cls = type(cache)
    attach_memory(cache, memory, Coverage(20, 5))
    assert type(cache) is cls, "a cache is followed once"
    assert type(filled_cache()) is DynamicCache, "others are left alone"
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(twin) is cls
        assert (coverage_of(twin).num_tokens, coverage_of(twin).num_keys) == (20, 5)
        check_memory(memory_of(twin), bank.rows)
        twin.reset()
        assert memory_of(twin).is_empty
        assert (memory_of(twin).runs, memory_of(twin).kept, coverage_of(twin).num_tokens) == (None, {}, 0)
    check_memory(memory_of(cache), bank.rows)


# ---- keys that are gone


def test_keys_by_layer():
    cache = filled_cache(num_keys=5)
    cache.layers[1].keys = cache.layers[1].keys[:, :, :3]
    assert keys_by_layer(cache) == [5, 3]
    assert keys_by_layer(None) == []
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    assert keys_by_layer(DynamicCache(config=config)) == [None, None], "nothing is kept yet"
    fixed = StaticCache(config=config, max_cache_len=8)
    fixed.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), 0)
    assert keys_by_layer(fixed)[0] is None, "it has room for a fixed number"


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("taken_from", [None, 0, 1])
def test_lost_keys_are_noticed(taken_from: int | None, window: int | None):
    """In any layer, at any length; what falls out of a sliding window is not lost."""
    windows = {} if window is None else dict(sliding_window=window, layer_types=["sliding_attention"] * 2)
    config = Gemma3TextConfig(num_hidden_layers=2, **windows)
    if window is None:
        config.layer_types = ["full_attention"] * 2
    cache = DynamicCache(config=config)
    for length in (2, 1, 3, 1):
        before = keys_by_layer(cache)
        for layer_idx in range(2):
            states = torch.randn(1, 1, length, 4)
            cache.update(states, states, layer_idx)
        assert not has_lost_keys(cache, before, length)
        twin = copy.deepcopy(cache)
        if taken_from is not None:
            layer = twin.layers[taken_from]
            layer.keys = layer.keys[:, :, 1:]
            assert has_lost_keys(twin, before, length)

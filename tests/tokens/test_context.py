"""What a forward knows of its tokens, against loops over plain Python lists, however a batch is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from peft_pvm.tokens.context import VisualContext, dropped_keywords
from peft_pvm.tokens.keys import Keys
from peft_pvm.tokens.memory import Coverage, VisualMemory


HIDDEN = 3
CUTS = {"at once": [], "in two": [9], "in five": [1, 6, 7, 13], "token by token": list(range(1, 16))}
SEEDS = range(8)
Keep = Callable[[VisualContext], torch.Tensor]


@dataclass
class Batch:
    """Conversations: of each token "t" (text), "v" (visual) or "p" (padding, in front)."""

    kinds: list[str]
    embeds: torch.Tensor  # (batch, seq_len, hidden_size)
    positions: torch.Tensor  # (batch, seq_len)

    @staticmethod
    def of(*kinds: str) -> Batch:
        generator = torch.Generator().manual_seed(0)
        shape = len(kinds), len(kinds[0])
        positions = torch.randint(1, 4, shape, generator=generator).cumsum(1)
        return Batch([*kinds], torch.randn(*shape, HIDDEN, generator=generator), positions)

    @staticmethod
    def random(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def row() -> str:
            real = int(torch.randint(4, 17, (), generator=generator))
            runs = torch.randint(1, 5, (16,), generator=generator)
            has_images = int(torch.randint(0, 4, (), generator=generator)) > 0
            text_first = int(torch.randint(0, 2, (), generator=generator))
            kinds = "".join(("t" if (index + text_first) % 2 else "v") * int(run) for index, run in enumerate(runs))
            return "p" * (16 - real) + (kinds[:real] if has_images else "t" * real)

        return Batch.of(*(row() for _ in range(1 + seed % 3)))

    @property
    def length(self) -> int:
        return len(self.kinds[0])

    def mask(self, kind: str) -> torch.Tensor:
        return torch.tensor([[each == kind for each in row] for row in self.kinds])

    def read(self, cuts: list[int], static: bool = False, keeps: dict[str, Keep] | None = None) -> list[VisualContext]:
        """The context of each piece, on the memory that the one before it leaves."""
        memory, contexts = VisualMemory(), []
        for start, stop in itertools.pairwise([0, *cuts, self.length]):
            visual_mask = self.mask("v")[:, start:stop]
            context = VisualContext(visual_mask if visual_mask.any() else None)
            context.attention_mask = (~self.mask("p")[:, :stop]).long()
            past = torch.tensor(start) if static else start
            context.read(self.embeds[:, start:stop], memory, Coverage(past, past))
            context.keeps = dict(keeps or {})
            context.note_positions(self.positions[:, start:stop])
            memory = context.memory
            contexts.append(context)
        return contexts

    def pieces(self, cuts: list[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *cuts, self.length]))

    def first_visual(self, row: int, stop: int) -> int | None:
        """The slot of a row's first visual token among those before `stop`."""
        found = self.kinds[row][:stop].find("v")
        return None if found < 0 else found


every_batch = pytest.mark.parametrize("seed", SEEDS)
however_read = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
any_cache = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def test_batches_are_of_all_kinds():
    """Those that the others run over: images first and later, in some rows only, and padding."""
    rows = [row for seed in SEEDS for row in Batch.random(seed).kinds]
    for kind in (lambda row: "v" not in row, lambda row: row.lstrip("p")[0] == "v", lambda row: "tv" in row):
        assert any(map(kind, rows))
    assert any(len({"v" in row for row in Batch.random(seed).kinds}) == 2 for seed in SEEDS)
    assert any(row[0] == "p" for row in rows)


@any_cache
@however_read
@every_batch
def test_read(seed: int, cuts: list[int], static: bool):
    batch = Batch.random(seed)
    contexts = batch.read(cuts, static)
    for (start, stop), context in zip(batch.pieces(cuts), contexts):
        assert (context.past_length, context.seq_len, context.batch_size) == (start, stop - start, len(batch.kinds))
        assert isinstance(context.past_length, torch.Tensor) == static
        has_visual = any("v" in row[start:stop] for row in batch.kinds)
        assert (context.visual_mask is not None) == (context.visual_positions is not None) == has_visual
        for row, kinds in enumerate(batch.kinds):
            slots = [slot for slot in range(stop) if kinds[slot] == "v"]
            if not context.memory.is_empty:
                filled = context.memory.slots[row] >= 0
                assert context.memory.slots[row][filled].tolist() == slots
                assert torch.equal(context.memory.embeddings[row][filled], batch.embeds[row, slots])
                assert not context.memory.embeddings[row][~filled].any()
            else:
                assert not slots
            if has_visual:
                own = [slot - start for slot in slots if slot >= start]
                assert context.visual_positions[row, : len(own)].tolist() == own
                assert (context.visual_positions[row, len(own) :] == -1).all()


def test_a_mask_without_visual_tokens_is_none():
    context = VisualContext(torch.zeros(1, 3, dtype=torch.bool))
    context.read(torch.zeros(1, 3, HIDDEN), VisualMemory(), Coverage())
    assert context.visual_mask is None
    assert context.memory.is_empty


def test_a_length_that_is_counted_in_place_stays_as_it_was():
    """A static cache counts layer by layer, while the forward goes on."""
    counter = torch.tensor(4)
    context = VisualContext(None)
    context.read(torch.zeros(1, 3, HIDDEN), VisualMemory(), Coverage(counter, counter))
    counter += 3
    assert context.past_length == 4


def test_gradients_are_noticed():
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            context = VisualContext(None)
            context.read(torch.zeros(1, 3, HIDDEN), VisualMemory(), Coverage())
        assert context.records_gradients == enabled


@any_cache
@however_read
@every_batch
def test_keys(seed: int, cuts: list[int], static: bool):
    """Of as many as there are, of fewer (a sliding window), and of more (a static cache that is not full)."""
    batch = Batch.random(seed)
    contexts = batch.read(cuts, static)
    for (_, stop), context in zip(batch.pieces(cuts), contexts):
        for num_keys in {1, 2, stop // 2 + 1, stop - 1 or 1, stop, stop + 3}:
            first = max(stop - num_keys, 0)
            assert Keys(context, num_keys).dropped == first
            visual, before = Keys(context, num_keys).visual, Keys(context, num_keys).text_before_images
            assert visual.shape == before.shape == (len(batch.kinds), num_keys)
            assert Keys(context, num_keys).visual is visual, "made once for all layers"
            assert Keys(context, num_keys).text_before_images is before
            for row, kinds in enumerate(batch.kinds):
                seen = kinds[first:stop] + "-" * (num_keys - (stop - first))  # a key that is not filled yet
                assert visual[row].tolist() == [kind == "v" for kind in seen]
                image = batch.first_visual(row, stop)
                expected = [image is not None and key + first < image for key in range(num_keys)]
                assert before[row].tolist() == expected
                assert not any(kind == "v" and found for kind, found in zip(seen, expected))


@any_cache
@however_read
@every_batch
def test_text_after_images(seed: int, cuts: list[int], static: bool):
    batch = Batch.random(seed)
    contexts = batch.read(cuts, static)
    for (start, stop), context in zip(batch.pieces(cuts), contexts):
        expected = [
            [kinds[slot] != "v" and "v" in kinds[:slot] for slot in range(start, stop)] for kinds in batch.kinds
        ]
        assert context.text_after_images().tolist() == expected
        if context.only_text_after_images:
            assert all(all(row) for row in expected)
        if len(batch.kinds) == 1:
            assert context.only_text_after_images == all(expected[0])


def test_only_text_after_images_counts_rows():
    """It is said without waiting for the device, so only where the memory has as many tokens in every row."""
    for kinds, expected in {("vvtt", "vvtt"): True, ("vvtt", "ptvt"): False, ("tttt", "pttt"): False}.items():
        context = Batch.of(*kinds).read([3])[-1]
        assert context.only_text_after_images == expected
    assert not Batch.of("vvtt", "vvtt").read([1])[-1].only_text_after_images, "a visual token is not text"


@any_cache
@however_read
@every_batch
def test_positions_and_anchors(seed: int, cuts: list[int], static: bool):
    """A token's anchor is the position of the first token of the run that holds it, wherever that was read."""
    batch = Batch.random(seed)
    contexts = batch.read(cuts, static)
    positions, anchors = (torch.cat(parts, 1) for parts in zip(*(context.noted() for context in contexts)))
    assert torch.equal(positions, batch.positions.unsqueeze(-1))
    for row, kinds in enumerate(batch.kinds):
        for slot, kind in enumerate(kinds):
            if kind != "p":
                first = len(kinds[: slot + 1].rstrip(kind))
                assert anchors[row, slot] == batch.positions[row, first]


def test_padding_ends_no_run():
    """Of a row that is padded between two turns."""
    batch = Batch.of("tvvppvvt", "tttttttt")
    for cuts in ([], [4], [3, 5]):
        anchors = torch.cat([context.noted()[1] for context in batch.read(cuts)], 1)
        assert set(anchors[0, [1, 2, 5, 6]].tolist()) == {int(batch.positions[0, 1])}
        assert anchors[0, 7] == batch.positions[0, 7]


def context_of(length: int = 4, batch: int = 2, visual: int = 2) -> VisualContext:
    """A whole forward, of which the first tokens are visual."""
    mask = (torch.arange(length) < visual).expand(batch, length)
    context = VisualContext(mask)
    context.read(torch.randn(batch, length, HIDDEN), VisualMemory(), Coverage())
    return context


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((2, 4), 1), ((1, 4), 1), ((3, 2, 4), 3), ((3, 1, 4), 3), ((1, 2, 4), 3), ((1, 1, 4), 3), ((4, 2, 4), 4)],
)
def test_positions_in_any_form(shape: tuple[int, ...], axes: int):
    context = context_of()
    given = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    context.note_positions(given)
    assert context.position_ids.shape == (2, 4, axes)
    assert context.position_ids.dtype == torch.int64
    for row, token, axis in itertools.product(range(2), range(4), range(axes)):
        by_axis = given if given.dim() == 3 else given[None]
        expected = by_axis[min(axis, len(by_axis) - 1), min(row, by_axis.shape[1] - 1), token]
        assert context.position_ids[row, token, axis] == expected
    assert torch.equal(context.anchors[:, 1], context.position_ids[:, 0, 0]), "of the first axis"


def test_only_the_first_positions_count():
    """A rotary embedding is asked once for each type of layers."""
    context = context_of()
    context.note_positions(torch.arange(4)[None])
    runs = context.memory.runs
    context.note_positions(torch.arange(4)[None] + 7)
    assert context.position_ids[0, :, 0].tolist() == [0, 1, 2, 3]
    assert context.memory.runs is runs


def test_positions_that_nobody_noted_are_missed():
    with pytest.raises(NotImplementedError, match="did not call its rotary_emb in this forward"):
        context_of().noted()
    refused = context_of()
    refused.refusal = ValueError("mine")
    refused.note_positions(torch.arange(4)[None])
    assert refused.position_ids is None


# ---- what is kept of every token


def own_positions(context: VisualContext) -> torch.Tensor:
    return context.position_ids


@any_cache
@however_read
def test_what_is_kept_is_that_of_all_tokens(cuts: list[int], static: bool):
    batch = Batch.random(2)
    keeps = {"positions": own_positions, "doubled": lambda context: 2 * context.position_ids}
    contexts = batch.read(cuts, static, keeps)
    for (_, stop), context in zip(batch.pieces(cuts), contexts):
        expected = batch.positions[:, :stop, None]
        assert torch.equal(context.memory.kept["positions"], expected)
        assert torch.equal(context.memory.kept["doubled"], 2 * expected)


def test_what_nobody_kept_from_the_start_is_not_kept():
    """Neither what begins to be kept later, nor what was left out in between."""
    memory = VisualMemory()
    for index, names in enumerate([["a", "gap"], ["a", "late"], ["a", "gap", "late"], []]):
        context = VisualContext(None)
        context.read(torch.zeros(1, 2, HIDDEN), memory, Coverage(2 * index, 2 * index))
        context.keeps = dict.fromkeys(names, own_positions)
        context.note_positions(torch.arange(2)[None] + 2 * index)
        memory = context.memory
        expected = [["a", "gap"], ["a"], ["a"], []][index]
        assert sorted(memory.kept) == expected
        assert all(kept[0, :, 0].tolist() == list(range(2 * index + 2)) for kept in memory.kept.values())


def test_a_single_axis_stands_for_all_that_come_later():
    contexts, memory = [], VisualMemory()
    for positions in (torch.arange(2)[None], torch.arange(6).reshape(3, 1, 2), torch.tensor([[8, 9]])):
        context = VisualContext(None)
        past = 2 * len(contexts)
        context.read(torch.zeros(1, 2, HIDDEN), memory, Coverage(past, past))
        context.keeps = {"x": own_positions}
        context.note_positions(positions)
        memory = context.memory
        contexts.append(context)
    assert contexts[0].memory.kept["x"].tolist() == [[[0], [1]]]
    assert memory.kept["x"].tolist() == [[[0] * 3, [1] * 3, [0, 2, 4], [1, 3, 5], [8] * 3, [9] * 3]]


# ---- layers


def other_error(layers: list[int], model: str) -> NotImplementedError:
    return NotImplementedError(f"{model} left out {layers}")


def test_layers_that_are_not_reached_are_missed():
    context = VisualContext(None)
    assert context.missed("Model") is None
    for layer_idx in (5, 2, 3):
        context.await_layer(layer_idx, other_error)
    context.await_layer(2, other_error)
    context.reached(3, other_error)
    context.reached(7, other_error)
    context.reached(2, dropped_keywords)  # another's layer
    assert str(context.missed("Model")) == "Model left out [2, 5]"
    context.reached(2, other_error)
    context.reached(5, other_error)
    assert context.missed("Model") is None
    context.await_layer(1, dropped_keywords)
    assert "decoder layers of Model do not pass keyword arguments on" in str(context.missed("Model"))


def test_a_tail_and_a_copy_count_for_the_whole():
    """Layers that compute the last tokens alone, or on another device, are reached all the same."""
    context = context_of()
    context.await_layer(0, other_error)
    context.await_layer(1, other_error)
    context.tail(2).reached(0, other_error)
    assert str(context.missed("Model")) == "Model left out [1]"
    context.to("meta").reached(1, other_error)
    assert context.missed("Model") is None


def test_derived_is_made_once():
    context, made = context_of(), []

    def make() -> list:
        made.append(1)
        return made

    assert context.derived("key", make) is context.derived("key", make)
    assert len(made) == 1
    context.derived(("key", 2), make)
    context_of().derived("key", make)
    assert len(made) == 3


def test_a_refusal_is_raised_with_a_traceback_of_its_own():
    context = VisualContext(None)
    context.check()
    context.refusal = refusal = ValueError("mine")
    for check in (context.check, context.check_keys):
        with pytest.raises(ValueError, match="mine"):
            check()
    assert refusal.__traceback__ is None, "its frames would hold the context"
    context.refusal, context.is_evicted = None, True
    context.check()
    with pytest.raises(NotImplementedError, match="Keys of this KV cache were taken out during a forward"):
        context.check_keys()


# ---- the last tokens alone


@any_cache
@every_batch
def test_a_tail_is_the_context_of_the_last_tokens(seed: int, static: bool):
    """As if those before it had been read in an earlier forward."""
    batch = Batch.random(seed)
    (context,) = batch.read([], static)
    assert context.tail(batch.length) is context
    for length in range(1, batch.length):
        tail = context.tail(length)
        assert context.tail(length) is tail
        start = batch.length - length
        expected = batch.read([start])[-1]
        assert (tail.past_length, tail.seq_len) == (start, length)
        assert tail.memory is context.memory
        assert tail.visual_positions is None
        if tail.visual_mask is not None:
            assert torch.equal(tail.visual_mask, batch.mask("v")[:, start:])
        for num_keys in (1, length, batch.length, batch.length + 2):
            assert torch.equal(Keys(tail, num_keys).visual, Keys(expected, num_keys).visual)
            assert torch.equal(Keys(tail, num_keys).text_before_images, Keys(expected, num_keys).text_before_images)
        assert torch.equal(tail.text_after_images(), expected.text_after_images())
    assert context.seq_len == batch.length


# ---- other devices


def test_a_context_on_another_device():
    context = context_of()
    context.adapter_names = ["a", "b"]
    assert context.to("cpu") is context
    derived = Keys(context, 4).visual
    moved = context.to("meta")
    assert moved.device.type == "meta"
    tensors = (moved.visual_mask, moved.visual_positions, moved.memory.embeddings, Keys(moved, 4).visual)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.seq_len, moved.past_length, moved.adapter_names) == (4, 0, ["a", "b"])
    assert Keys(context, 4).visual is derived
    assert context.to(torch.device("meta")).memory is moved.memory, "the memory is copied once"
    assert {context.device.type, context.visual_mask.device.type, context.memory.slots.device.type} == {"cpu"}


def test_positions_reach_contexts_that_were_moved_before():
    context = context_of()
    context.keeps = {"x": own_positions}
    early = context.to("meta")
    assert early.position_ids is None
    context.note_positions(torch.arange(4)[None])
    for moved in (early, context.to("meta")):
        positions, anchors = moved.noted()
        assert positions.is_meta
        assert anchors.is_meta
        assert moved.memory.runs.starts.is_meta
        assert moved.memory.kept["x"].is_meta


def test_a_static_length_moves_along():
    context = VisualContext(None)
    context.read(torch.zeros(1, 3, HIDDEN), VisualMemory(), Coverage(torch.tensor(4), torch.tensor(4)))
    assert context.to("meta").past_length.is_meta
    assert context.past_length == 4

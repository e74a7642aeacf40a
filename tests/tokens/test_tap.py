"""The tap: hooks that come and go, what it sends to the layers, what it refuses, and what it warns of."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from architectures import ARCHITECTURES
from forwards import generate, logits, prefill
from methods_under_test import METHODS, Combination, Method
from tiny_vlms import FAMILIES, IMAGE, VIDEO, TinyVLM
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from peft_pvm.tokens.adapters_by_row import BASE, AdaptersByRow
from peft_pvm.tokens.context import CONTEXT, VisualContext
from peft_pvm.tokens.families import VisionLanguageModel, find_vlm
from peft_pvm.tokens.keys import Keys
from peft_pvm.tokens.memory import coverage_of, memory_of
from peft_pvm.tokens.tap import VISUAL_MASK, Tap
from peft_pvm.utils.packages import CACHE


pytestmark = pytest.mark.every_family


MESSAGE = "no pixels came with it"
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture
def llava() -> TinyVLM:
    return FAMILIES["llava"]


@pytest.fixture
def vlm(llava: TinyVLM) -> VisionLanguageModel:
    return find_vlm(llava.build())


def traces(model: nn.Module) -> dict:
    """Everything that a tap could leave behind."""
    return {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@contextlib.contextmanager
def contexts_of(vlm: VisionLanguageModel) -> Iterator[list[VisualContext]]:
    """With a tap, and no adapter: the context of every forward, as the first layer is given it."""
    seen: list[VisualContext] = []
    with Tap.lent_to(vlm):
        handle = vlm.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs[CONTEXT]), with_kwargs=True
        )
        try:
            yield seen
        finally:
            handle.remove()


# ---- it comes and goes


def test_there_is_one_tap(vlm: VisionLanguageModel):
    before = traces(vlm.model)
    tap = Tap.on(vlm)
    once = traces(vlm.model)
    assert once != before
    assert Tap.on(vlm) is tap
    assert Tap.on(find_vlm(vlm.model)) is tap
    assert traces(vlm.model) == once
    tap.remove()
    assert traces(vlm.model) == before
    assert Tap.on(vlm) is not tap


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("error", [None, KeyError])
def test_a_lent_tap_is_given_back(vlm: VisionLanguageModel, was_there: bool, error: type[Exception] | None):
    mine = Tap.on(vlm) if was_there else None
    before = traces(vlm.model)
    with contextlib.nullcontext() if error is None else pytest.raises(error), Tap.lent_to(vlm) as tap:
        assert mine in (None, tap)
        with Tap.lent_to(vlm) as same:
            assert same is tap
        assert Tap.on(vlm) is tap, "the inner block was not the first"
        if error is not None:
            raise error
    assert traces(vlm.model) == before


def test_without_an_adapter_it_changes_nothing(family: TinyVLM):
    model = family.build()
    inputs = family.inputs(model, "t4 i t3", "t5")
    expected = logits(model, inputs)
    with Tap.lent_to(find_vlm(model)):
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


def test_what_it_sets_aside_is_put_back(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    model: PreTrainedModel = vlm.model
    asked = []
    monkeypatch.setattr(type(model), "init_continuous_batching", lambda self, *args, **kwargs: asked.append(kwargs))
    other = FAMILIES["llava"].build()
    model.generation_config.max_length = 20
    with Tap.lent_to(vlm):
        model._validate_model_kwargs({VISUAL_MASK: torch.ones(1), "attention_mask": torch.ones(1)})
        with pytest.raises(ValueError, match="not_an_argument"):
            model._validate_model_kwargs({VISUAL_MASK: torch.ones(1), "not_an_argument": 1})
        with pytest.raises(ValueError, match=VISUAL_MASK):
            other._validate_model_kwargs({VISUAL_MASK: torch.ones(1)})
        model.init_continuous_batching(mine=1)  # no adapter is there to mind
    model.init_continuous_batching(mine=2)
    assert asked == [{"mine": 1}, {"mine": 2}]
    with pytest.raises(ValueError, match=VISUAL_MASK):
        model._validate_model_kwargs({VISUAL_MASK: torch.ones(1)})


def test_what_an_inner_model_has_of_its_own_stays():
    """It is called, and given back; and what was put there since is left alone, and is not sent `visual_mask`."""
    vlm = find_vlm(ARCHITECTURES["blip-2"].tiny.build())
    inner, asked = vlm.inner_generator, []
    prepare = inner.prepare_inputs_for_generation

    def mine(*args, **kwargs):
        asked.append(1)
        return prepare(*args, **kwargs)

    inputs = {"input_ids": torch.tensor([[1, 2]]), "inputs_embeds": torch.ones(1, 2, 4), "is_first_iteration": True}
    inner.prepare_inputs_for_generation = mine
    with Tap.lent_to(vlm):
        assert VISUAL_MASK in inner.prepare_inputs_for_generation(**inputs)
    assert asked == [1]
    assert vars(inner)["prepare_inputs_for_generation"] is mine
    del inner.prepare_inputs_for_generation
    with Tap.lent_to(vlm):
        prepare = inner.prepare_inputs_for_generation
        inner.prepare_inputs_for_generation = mine
    assert vars(inner)["prepare_inputs_for_generation"] is mine
    assert VISUAL_MASK not in inner.prepare_inputs_for_generation(**inputs)


def test_batching_minds_active_adapters_alone(llava: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    model = METHODS["pvm"].attach(llava.build())
    base, asked = model.get_base_model(), []
    monkeypatch.setattr(type(base), "init_continuous_batching", lambda self: asked.append(self))
    with pytest.raises(NotImplementedError, match="generate_batch and paged continuous batching would put"):
        base.init_continuous_batching()
    with model.disable_adapter():
        base.init_continuous_batching()
    assert asked == [base]


# ---- what it sends


def test_it_sends_what_is_visual(family: TinyVLM):
    model = family.build()
    inputs = family.inputs(model, "t4 i t3", "t5")
    with contexts_of(find_vlm(model)) as seen:
        logits(model, inputs)
        logits(model, family.inputs(model, "t5"))
    visual = (inputs["input_ids"] == IMAGE).tolist()
    assert seen[0].visual_mask.tolist() == visual
    assert Keys(seen[0], len(visual[0])).text_before_images[0].tolist()[:4] == [True] * 4
    assert seen[0].position_ids is not None
    assert seen[1].visual_mask is None
    assert [context.refusal for context in seen] == [None, None]


def test_a_cache_remembers_what_it_has_read(llava: TinyVLM):
    model = llava.build()
    inputs = llava.inputs(model, "t4 i t6")
    cache = DynamicCache()
    with contexts_of(find_vlm(model)) as seen:
        for start, stop in ((0, 9), (9, 12), (12, 14)):
            piece = llava.inputs(model, "t4 i t6", start=start, stop=stop)
            logits(model, piece, **{CACHE: cache}, use_cache=True)
            assert memory_of(cache).slots.tolist() == [[4, 5, 6, 7]]
            assert coverage_of(cache).num_tokens == coverage_of(cache).num_keys == stop
    assert [context.past_length for context in seen] == [0, 9, 12]
    assert inputs["input_ids"].shape[1] == 14
    logits(model, llava.inputs(model, "t4 i t6", start=9, stop=11), **{CACHE: cache}, use_cache=True)
    with contexts_of(find_vlm(model)) as seen:
        logits(model, llava.inputs(model, "t9 t2", start=9), **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="2 tokens of this KV cache were computed without the adapter knowing"):
        seen[0].check()


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_takes_its_context_along(vlm: VisionLanguageModel, llava: TinyVLM, fails: bool):
    """Nothing holds it any more, and the rotary embedding of the next forward speaks of that one alone."""
    gone: list[weakref.ref] = []
    with Tap.lent_to(vlm):
        watch = vlm.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: gone.append(weakref.ref(kwargs[CONTEXT])), with_kwargs=True
        )
        stop = vlm.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0 if fails else None)
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            logits(vlm.model, llava.inputs(vlm.model, "t4 i t6"), use_cache=False)
        watch.remove()
        stop.remove()
        gc.collect()
        assert [reference() for reference in gone] == [None]
        vlm.rotary(torch.zeros(1, 3, 64), torch.arange(3)[None])
    with contexts_of(vlm) as seen:
        logits(vlm.model, llava.inputs(vlm.model, "t5"))
    assert seen[0].position_ids[0, :, 0].tolist() == [0, 1, 2, 3, 4]


# ---- the caller's own embeddings


def own_embeds(model: PreTrainedModel, length: int = 6) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": model.get_input_embeddings()(torch.arange(10, 10 + length)[None]).detach()}


@pytest.mark.parametrize("through", ["model", "multimodal", "text_model"])
def test_visual_mask_says_which_embeddings_are_visual(vlm: VisionLanguageModel, through: str):
    """By whatever module they come in."""
    visual_mask = torch.tensor([[False, True, True, False, False, False]])
    inputs = own_embeds(vlm.model)
    with torch.no_grad(), contexts_of(vlm) as seen:
        getattr(vlm, through)(**inputs, visual_mask=visual_mask)
        getattr(vlm, through)(**inputs, visual_mask=torch.zeros_like(visual_mask))
    assert seen[0].visual_mask.tolist() == visual_mask.tolist()
    assert torch.equal(seen[0].memory.embeddings, inputs["inputs_embeds"][:, 1:3])
    assert seen[1].memory.is_empty
    for context in seen:
        context.check()


REFUSED_MASKS: dict[str, tuple[object, str]] = {
    "none": (None, r"Pass visual_mask, a bool tensor of shape \(1, 6\)"),
    "a list": ([[True] * 6], r"must be a bool tensor of shape \(1, 6\).*; got list of shape \(\)"),
    "integers": (torch.ones(1, 6).long(), r"; got torch.int64 of shape \(1, 6\)"),
    "too short": (torch.ones(1, 5).bool(), r"; got torch.bool of shape \(1, 5\)"),
    "one row": (torch.ones(6).bool(), r"; got torch.bool of shape \(6,\)"),
}


@pytest.mark.parametrize("case", REFUSED_MASKS)
def test_masks_that_say_nothing_are_refused_by_who_reads_them(vlm: VisionLanguageModel, case: str):
    visual_mask, complaint = REFUSED_MASKS[case]
    inputs = own_embeds(vlm.model)
    expected = logits(vlm.model, inputs)
    given = {} if visual_mask is None else {VISUAL_MASK: visual_mask}
    with contexts_of(vlm) as seen:
        assert torch.equal(logits(vlm.model, inputs, **given), expected), "the base goes its own way"
    with pytest.raises(ValueError, match=complaint):
        seen[0].check()


# ---- packed rows


PACKED = {
    "two rows": (torch.tensor([[0, 1, 2, 0, 1, 2]]), True),
    "one row": (torch.arange(6)[None], False),
    "one that begins later": (torch.arange(6)[None] + 9, False),
    "on three axes": (torch.tensor([[[0, 1, 2, 0, 1, 2]], [[0] * 6], [[0] * 6]]), True),
    "an image on three axes": (
        torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]]),
        False,
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_positions_that_start_again_are_packed_rows(case: str):
    """Unless a mask says otherwise, or they are a turn on a cache."""
    position_ids, is_packed = PACKED[case]
    family = FAMILIES["qwen3_vl" if position_ids.dim() == 3 else "llava"]
    vlm = find_vlm(family.build())
    inputs = dict(input_ids=torch.arange(10, 16)[None], position_ids=position_ids)
    with contexts_of(vlm) as seen:
        logits(vlm.model, inputs)
        logits(vlm.model, inputs, attention_mask=torch.ones(1, 6).long())
        cache = DynamicCache()
        logits(vlm.model, {name: tensor[..., :2] for name, tensor in inputs.items()}, **{CACHE: cache}, use_cache=True)
        logits(vlm.model, inputs, **{CACHE: cache}, use_cache=True)
    if is_packed:
        with pytest.raises(NotImplementedError, match=r"position_ids that start again given\) would put several"):
            seen[0].check()
        seen = seen[1:]
    for context in seen:
        context.check()


# ---- adapters by row


def test_rows_are_repeated_with_their_adapter():
    by_row = AdaptersByRow()
    assert by_row.names(4) is None
    with by_row.chosen(["a", BASE]):
        assert by_row.names(2) == ["a", BASE]
        assert by_row.names(6) == ["a"] * 3 + [BASE] * 3
    assert by_row.names(4) is None


@pytest.mark.parametrize(("names", "batch_size"), [([], 2), (["a", "b", "c"], 4), (["a", "b"], 1)])
def test_rows_that_do_not_go_round_are_refused(names: list[str], batch_size: int):
    by_row = AdaptersByRow()
    message = f"adapter_names has {len(names)} names, but the batch has {batch_size} rows"
    with by_row.chosen(names), pytest.raises(ValueError, match=message):
        by_row.names(batch_size)


def test_blocks_stand_inside_one_another():
    by_row = AdaptersByRow()
    with by_row.chosen(["outer"]):
        with contextlib.suppress(KeyError), by_row.chosen(["inner"]):
            assert by_row.names(1) == ["inner"]
            raise KeyError
        assert by_row.names(1) == ["outer"]
        with by_row.chosen(["again"]):
            assert by_row.names(1) == ["again"]
        assert by_row.names(1) == ["outer"]
    assert by_row.names(1) is None


def test_every_thread_has_its_own():
    by_row, found = AdaptersByRow(), {}
    both_inside = threading.Barrier(2, timeout=120)

    def choose(name: str) -> None:
        with by_row.chosen([name]):
            both_inside.wait()
            found[name] = by_row.names(2)
            both_inside.wait()
        found[f"after {name}"] = by_row.names(2)

    with by_row.chosen(["mine"]):
        threads = [threading.Thread(target=choose, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert by_row.names(2) == ["mine", "mine"]
    assert found == {"a": ["a", "a"], "b": ["b", "b"], "after a": None, "after b": None}


def test_names_are_sent_with_the_context(vlm: VisionLanguageModel, llava: TinyVLM):
    inputs = llava.inputs(vlm.model, "t4 i t3", "t5")
    with contexts_of(vlm) as seen, Tap.on(vlm).by_row.chosen(["a", "b"]):
        logits(vlm.model, inputs)
    assert seen[0].adapter_names == ["a", "b"]


def test_modules_to_save_are_told_of_the_rows():
    """Once, however often they are asked to choose, and by names that they know."""
    by_row = AdaptersByRow()

    class Wrapper(nn.Module):
        def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> list[str] | None:
            return adapter_names

    wrapper = Wrapper()
    # Stands in for PEFT's wrapper of a module.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_pvm.tokens.adapters_by_row.held_by", lambda module: {"a", "c"})
        for _ in range(2):
            by_row.choose_in(wrapper, "wrapper", sees_rows=True)
        assert len(wrapper._forward_pre_hooks) == 1
        assert wrapper(torch.zeros(2, 1)) is None
        with by_row.chosen(["a", "b"]):
            assert wrapper(torch.zeros(4, 1)) == ["a", "a", BASE, BASE]
        with by_row.chosen(["c", "c"]):  # whichever row something belongs to
            assert wrapper(torch.zeros(3, 1)) == ["c"] * 3


# ---- placeholders without pixels: it surprises that they are text, so it is said, once


def without_pixels(family: TinyVLM, model: torch.nn.Module, *rows: str) -> dict[str, torch.Tensor]:
    inputs = family.inputs(model.get_base_model(), *rows)
    return {name: tensor for name, tensor in inputs.items() if name in TEXT_INPUTS}


def test_it_is_said_once_for_a_model(plain: TinyVLM, method: Method | Combination):
    for _ in range(2):  # models
        model = method.attach(plain.build())
        inputs = without_pixels(plain, model, "t4 i t6", "t9")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.disable_adapter():
                logits(model, inputs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                logits(model, inputs)
        assert len([warning for warning in said if MESSAGE in str(warning.message)]) == 1


def test_every_kind_of_placeholder(plain: TinyVLM, method: Method | Combination):
    """Also if features of another kind come."""
    model = method.attach(plain.build())
    inputs = plain.inputs(model.get_base_model(), "t4 i t6")
    if plain.video is None:
        pytest.skip("a family without videos")
    inputs["input_ids"][0, 1] = VIDEO
    with pytest.warns(UserWarning, match=MESSAGE):
        logits(model, inputs)


@pytest.mark.filterwarnings("error:.*no pixels came with it")
def test_nothing_is_said_of_features_or_of_sampled_tokens(plain: TinyVLM, method: Method | Combination):
    model = method.attach(plain.build())
    base = model.get_base_model()
    logits(model, plain.inputs(base, "t4 i t6", "t9"))
    logits(model, plain.inputs(base, "t9"))
    generate(plain, model, "t4 i t6", "t9")  # which encodes the image beforehand
    generate(plain, model, "t4 i t9", prompt_lookup_num_tokens=3)
    for cache in (None, StaticCache(config=base.config.get_text_config(), max_cache_len=64)):
        cache = prefill(plain, model, "t4 i t9", stop=9, cache=cache)
        for length in (1, 2):
            sampled = dict(
                input_ids=torch.full((1, length), IMAGE),
                position_ids=plain.inputs(base, "t30")["position_ids"][..., 9 : 9 + length],
            )
            logits(model, sampled, **{CACHE: cache}, use_cache=True)


@pytest.mark.parametrize(("name", "num_images"), [("kosmos-2", 1), ("kosmos-2.5", 2)])
def test_a_text_model_that_puts_features_in_itself(name: str, num_images: int):
    """The memory holds them where the model's mask has them, as long as the model itself reads them."""
    tiny = ARCHITECTURES[name].tiny
    model = METHODS["pvm"].attach(tiny.build())
    base = model.get_base_model()
    features = []
    base.image_to_text_projection.register_forward_hook(lambda module, args, output: features.append(output[0]))
    first_turn = tiny.inputs(base, "t4 i t3")["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**tiny.inputs(base, "t4 i t3 i t6", stop=first_turn), use_cache=True)[CACHE]
        model(**tiny.inputs(base, "t4 i t3 i t6", start=first_turn), **{CACHE: cache}, use_cache=True)
    memory = memory_of(cache)
    assert memory.slots.tolist() == [[4, 5, 6, 7, 11, 12, 13, 14][: 4 * num_images]]
    assert torch.equal(memory.embeddings, torch.cat(features[:num_images], 1))

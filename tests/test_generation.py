"""What adapters remember follows the KV cache, whatever generation does with it: for every method."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from environment import on_a_cpu
from forwards import (
    GENERATE,
    LAST,
    PROMPTS,
    TOLERANCE,
    difference,
    generate,
    length_of,
    logits,
    prefill,
    resume,
    static_caches_crop,
)
from methods_under_test import METHODS, Method
from peft import LoraConfig, PeftModel
from tiny_vlms import EOS, FAMILIES, GEMMA4_SHARED, IMAGE, VIDEO, TinyVLM
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cli.serving.model_manager import ModelManager
from transformers.generation.continuous_batching import ContinuousBatchingManager

from peft_pvm import DIPEConfig
from peft_pvm.tokens.tap import Tap
from peft_pvm.utils.packages import CACHE


@pytest.fixture
def model(tiny: TinyVLM, method: Method) -> PeftModel:
    return method.attach(tiny.build())


def test_greedy_uses_the_adapter_and_equals_no_cache(family: TinyVLM, method: Method):
    model = method.attach(family.build_precise())
    cached = generate(family, model, *PROMPTS)
    uncached = generate(family, model, *PROMPTS, use_cache=False)
    with model.disable_adapter():
        base = generate(family, model, *PROMPTS)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert difference(torch.stack(cached.logits), torch.stack(uncached.logits)) < TOLERANCE
    assert difference(cached.logits[0][:2], base.logits[0][:2]) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "arguments",
    [
        dict(do_sample=True, num_return_sequences=3, seed=0),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2, do_sample=True, seed=0),
    ],
    ids=["sampling", "beams", "beam sampling"],
)
def test_expanded_rows_equal_no_cache(tiny: TinyVLM, model: PeftModel, arguments: dict):
    check_equal(
        (id(tiny), str(arguments)),
        model,
        lambda: generate(tiny, model, *PROMPTS, **arguments),
        lambda: generate(tiny, model, *PROMPTS, use_cache=False, **arguments),
    )


# What `check_equal` found of base models, the same for every method: whether two ways agree, or why one fails.
OF_BASES: dict[Hashable, bool | RuntimeError] = {}


def check_equal(key: Hashable, model: PeftModel, one_way: Callable, other_way: Callable) -> None:
    """Two ways to generate agree, in tokens and logits, provided they do without the adapter.

    Args:
        key: Of the base model and the two ways.
        model: The model with an adapter.
        one_way: Generates.
        other_way: Likewise.
    """

    def agree() -> bool:
        one, other = one_way(), other_way()
        return torch.equal(one.sequences, other.sequences) and all(
            difference(*step) < TOLERANCE for step in zip(one.logits, other.logits)
        )

    if key not in OF_BASES:
        with model.disable_adapter():
            try:
                OF_BASES[key] = agree()
            except RuntimeError as error:
                OF_BASES[key] = error.with_traceback(None)
    if isinstance(OF_BASES[key], RuntimeError):
        pytest.skip(f"transformers {transformers.__version__} fails without the adapter: {OF_BASES[key]}")
    if not OF_BASES[key]:
        pytest.skip(f"in transformers {transformers.__version__} the two differ without the adapter")
    assert agree()


@pytest.mark.parametrize(
    "kind", ["prompt lookup", "assisted", pytest.param("static cache", marks=on_a_cpu), "chunked prefill"]
)
def test_other_ways_to_decode_equal_greedy(tiny: TinyVLM, model: PeftModel, kind: str):
    prompt = PROMPTS[0]
    arguments = {
        "prompt lookup": dict(prompt_lookup_num_tokens=3),
        "assisted": dict(assistant_model=tiny.build(seed=1)),
        "static cache": dict(cache_implementation="static"),
        "chunked prefill": dict(prefill_chunk_size=4),
    }[kind]
    ways = (lambda: generate(tiny, model, prompt, **arguments), lambda: generate(tiny, model, prompt))
    check_equal((id(tiny), kind), model, *ways)


def test_layers_that_compute_the_last_tokens_alone(method: Method, request):
    """Of a prompt, the last layers of this Gemma 4 compute only the tokens whose logits are wanted."""
    model = method.attach(GEMMA4_SHARED.build())
    base = model.get_base_model()
    inputs = GEMMA4_SHARED.inputs(base, *PROMPTS)
    widths = []
    attention = base.model.language_model.layers[-1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    with model.disable_adapter():
        logits(model, inputs, logits_to_keep=1)
    if widths != [1]:
        pytest.skip(f"transformers {transformers.__version__} computes all tokens")
    if request.node.callspec.id in ("pvm-hidden-states", "var"):
        with pytest.raises(RuntimeError, match="in layers that compute the whole prompt"):
            logits(model, inputs, logits_to_keep=1)
    else:
        last, whole = logits(model, inputs, logits_to_keep=1), logits(model, inputs)
        assert difference(last, whole[:, -1:]) < TOLERANCE


def test_two_generations_do_not_leak(tiny: TinyVLM, model: PeftModel):
    alone = generate(tiny, model, PROMPTS[1])
    generate(tiny, model, PROMPTS[0])
    again = generate(tiny, model, PROMPTS[1])
    assert torch.equal(torch.stack(again.logits), torch.stack(alone.logits))


# ---- operations on the cache between two forwards


def test_deepcopied_cache(tiny: TinyVLM, model: PeftModel):
    conversation = "t4 i t9"
    length = length_of(tiny, model, conversation)
    cache = prefill(tiny, model, conversation, stop=length - LAST)
    twin = copy.deepcopy(cache)
    expected = logits(model, tiny.inputs(model.get_base_model(), conversation), use_cache=False)[:, -LAST:]
    assert difference(resume(tiny, model, cache, conversation, length - LAST), expected) < TOLERANCE
    assert difference(resume(tiny, model, twin, conversation, length - LAST), expected) < TOLERANCE


def static_cache(model: PeftModel) -> StaticCache:
    return StaticCache(config=model.get_base_model().config.get_text_config(), max_cache_len=64)


@pytest.mark.parametrize(
    "new_cache", [lambda model: None, pytest.param(static_cache, marks=static_caches_crop)], ids=["dynamic", "static"]
)
@pytest.mark.parametrize("number", [3, 1])
def test_crop_forgets_images(plain: TinyVLM, method: Method, number: int, new_cache: Callable):
    """Cut a cache in front of its second image and go on, by some tokens or one, as if that had never been."""
    model = method.attach(plain.build())
    whole = "t4 i t3 i t6"
    length = length_of(plain, model, whole)
    cache = prefill(plain, model, whole, cache=new_cache(model))
    kept = length_of(plain, model, "t4 i t3")
    cache.crop(kept - length)
    inputs = plain.inputs(model.get_base_model(), whole, stop=kept)
    text = torch.tensor([[11, 12, 13]])[:, :number]
    positions = inputs["position_ids"].amax(-1, keepdim=True) + torch.arange(1, number + 1)
    mask = torch.ones(1, kept + number, dtype=torch.long)
    after = dict(input_ids=text, position_ids=positions, attention_mask=mask)
    cropped = logits(model, after, **{CACHE: cache}, use_cache=True)
    begun = prefill(plain, model, whole, stop=kept, cache=new_cache(model))
    fresh = logits(model, after, **{CACHE: begun}, use_cache=True)
    assert difference(cropped, fresh) < TOLERANCE

    cache.crop(-(kept + number - 2))  # in front of all images
    after = dict(input_ids=text, position_ids=positions, attention_mask=mask[:, : 2 + number])
    on = logits(model, after, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    if method.text_alone != "changed":
        with model.disable_adapter():
            assert torch.equal(on, logits(model, after, **{CACHE: cache}, use_cache=True))


def test_crop_to_nothing_is_a_new_cache(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    cache = prefill(plain, model, "t4 i t9")
    cache.crop(-cache.get_seq_length())
    inputs = plain.inputs(model.get_base_model(), "t7 i t2 i t3")
    expected = logits(model, inputs, use_cache=False)
    assert difference(logits(model, inputs, **{CACHE: cache}, use_cache=True), expected) < TOLERANCE


def test_crop_takes_the_image_from_one_row_alone(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    base = model.get_base_model()
    early, late = "t2 i t14", "t12 i t4"
    inputs = plain.inputs(base, early, late)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    cache.crop(11 - cache.get_seq_length())
    after = dict(
        input_ids=torch.tensor([[11, 12], [11, 12]]),
        position_ids=inputs["position_ids"][..., 11:13],
        attention_mask=torch.ones(2, 13, dtype=torch.long),
    )
    on = logits(model, after, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    with model.disable_adapter():
        off = logits(model, after, **{CACHE: cache}, use_cache=True)
    assert difference(on[0], off[0]) > 100 * TOLERANCE
    if method.text_alone == "untouched":
        assert torch.equal(on[1], off[1])
    elif method.text_alone == "equal":
        assert difference(on[1], off[1]) < TOLERANCE


def test_row_operations(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    conversations = ("t4 i t9", "t6 i t7")
    length = length_of(plain, model, conversations[0])
    assert length == length_of(plain, model, conversations[1])
    prefix = plain.inputs(model.get_base_model(), *conversations, stop=length - LAST)
    with torch.no_grad():
        cache = model(**prefix, use_cache=True)[CACHE]
    rest = plain.inputs(model.get_base_model(), *conversations)
    rest = {
        "input_ids": rest["input_ids"][:, -LAST:],
        "position_ids": rest["position_ids"][..., -LAST:],
        "attention_mask": rest["attention_mask"],
    }

    def after(operation, rows: list[int]) -> torch.Tensor:
        changed = copy.deepcopy(cache)
        operation(changed)
        inputs = {
            name: tensor[:, rows] if name == "position_ids" and tensor.dim() == 3 else tensor[rows]
            for name, tensor in rest.items()
        }
        return logits(model, inputs, **{CACHE: changed}, use_cache=True)

    expected = logits(model, rest, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    cases = {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    }
    for name, (operation, rows) in cases.items():
        assert difference(after(operation, rows), expected[rows]) < TOLERANCE, name


def test_reset_static_cache_forgets(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    base = model.get_base_model()
    cache = prefill(plain, model, "t4 i t9", cache=static_cache(model))
    cache.reset()
    inputs = plain.inputs(base, "t9")
    expected = logits(model, inputs, use_cache=False)
    found = logits(model, inputs, **{CACHE: cache}, use_cache=True)
    assert difference(found, expected) < TOLERANCE
    if method.text_alone != "changed":
        with model.disable_adapter():
            assert difference(found, logits(model, inputs, use_cache=False)) < TOLERANCE


def test_cache_from_before_attaching_is_refused(plain: TinyVLM, method: Method):
    base = plain.build()
    conversation = "t4 i t9"
    cache = DynamicCache()
    inputs = plain.inputs(base, conversation)
    length = inputs["input_ids"].shape[1]
    logits(base, plain.inputs(base, conversation, stop=length - LAST), **{CACHE: cache}, use_cache=True)
    model = method.attach(base)
    with pytest.raises(ValueError, match="tokens of this KV cache were computed without the adapter knowing"):
        resume(plain, model, cache, conversation, length - LAST)


def test_tokens_that_the_tap_did_not_read_are_refused(plain: TinyVLM, method: Method):
    """Also in a cache that it knows: grown while unloaded, or by embeddings of unknown kind while disabled."""
    model = method.attach(plain.build())
    base = model.get_base_model()
    first, whole = "t4 i t3", "t4 i t3 i t9"
    stop, length = length_of(plain, model, first), length_of(plain, model, whole)
    known = prefill(plain, model, whole, stop=stop)
    with model.disable_adapter():
        own = base.get_input_embeddings()(torch.tensor([[11, 12]]))
        positions = plain.inputs(base, whole, start=stop, stop=stop + 2)["position_ids"]
        grown = copy.deepcopy(known)
        logits(model, dict(inputs_embeds=own, position_ids=positions), **{CACHE: grown}, use_cache=True)
    with pytest.raises(ValueError, match=r"^2 tokens of this KV cache"):
        logits(model, dict(input_ids=torch.tensor([[11]]), position_ids=positions[..., -1:]), **{CACHE: grown})

    base = model.unload()
    middle = plain.inputs(base, whole, start=stop, stop=length - LAST)
    logits(base, middle, **{CACHE: known}, use_cache=True)
    with pytest.raises(ValueError, match="tokens of this KV cache were computed without"):
        resume(plain, method.attach(base), known, whole, length - LAST)


def test_tokens_of_a_static_cache_that_the_tap_did_not_read_are_refused(plain: TinyVLM, method: Method):
    """The length of a static cache is not asked for at every step, but when an adapter was taken off meanwhile."""
    model = method.attach(plain.build())
    whole = "t4 i t3 i t9"
    stop, length = length_of(plain, model, "t4 i t3"), length_of(plain, model, whole)
    cache = prefill(plain, model, whole, stop=stop, cache=static_cache(model))
    base = model.unload()
    middle = plain.inputs(base, whole, start=stop, stop=length - LAST)
    logits(base, middle, **{CACHE: cache}, use_cache=True)
    model = method.attach(base)
    for end in (length, length - LAST + 1):
        rest = plain.inputs(base, whole, start=length - LAST, stop=end)
        with pytest.raises(ValueError, match="tokens of this KV cache were computed without"):
            logits(model, rest, **{CACHE: copy.deepcopy(cache)}, use_cache=True)


def test_pickled_cache(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    conversation = "t4 i t9"
    length = length_of(plain, model, conversation)
    cache = prefill(plain, model, conversation, stop=length - LAST)
    twin = pickle.loads(pickle.dumps(cache))
    results = [resume(plain, model, each, conversation, length - LAST) for each in (cache, twin)]
    assert torch.equal(*results)
    twin.reset()
    assert twin.visual_memory.is_empty


@on_a_cpu
def test_context_may_be_moved_between_layers(plain: TinyVLM, method: Method):
    """accelerate moves keyword arguments to each layer's device: another one than the memory's, but for its name."""
    model = method.attach(plain.build())
    first, whole = "t4 i t3", "t4 i t3 i t9"
    stop, length = length_of(plain, model, first), length_of(plain, model, whole)
    expected = logits(model, plain.inputs(model.get_base_model(), whole), use_cache=False)[:, -LAST:]

    def move(module, args, kwargs):
        return args, {**kwargs, "visual_context": kwargs["visual_context"].to("cpu:0")}

    for layer in model.get_base_model().model.language_model.layers:
        layer.register_forward_pre_hook(move, with_kwargs=True)
    cache = prefill(plain, model, whole, stop=stop)
    with torch.no_grad():
        middle = plain.inputs(model.get_base_model(), whole, start=stop, stop=length - LAST)
        cache = model(**middle, **{CACHE: cache}, use_cache=True)[CACHE]
    assert difference(resume(plain, model, cache, whole, length - LAST), expected) < TOLERANCE


def test_two_threads_on_one_model(plain: TinyVLM, method: Method):
    model = method.attach(plain.build())
    base = model.get_base_model()
    inputs = [plain.inputs(base, "t4 i t6"), plain.inputs(base, "t5 i i t8 i t3")]
    expected = [logits(model, each) for each in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda number: logits(model, inputs[number % 2]), range(20)))
    assert all(torch.equal(logits_, expected[number % 2]) for number, logits_ in enumerate(found))


# ---- inputs that are not the usual ones


def test_disabled_adapter_refuses_nothing(plain: TinyVLM, method: Method):
    """What an active adapter must refuse, the base takes: with the adapter disabled it must go on taking it."""
    base = plain.build()
    conversation = "t4 i t9"
    inputs = plain.inputs(base, conversation)
    length = inputs["input_ids"].shape[1]
    text = plain.inputs(base, "t9")
    own = dict(inputs_embeds=base.get_input_embeddings()(text["input_ids"]), attention_mask=text["attention_mask"])
    packed = dict(text, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    cache = DynamicCache()
    logits(base, plain.inputs(base, conversation, stop=length - LAST), **{CACHE: cache}, use_cache=True)
    rest = plain.inputs(base, conversation, start=length - LAST)

    def everything(model) -> list[torch.Tensor]:
        old = {CACHE: copy.deepcopy(cache), "use_cache": True}
        return [logits(model, own), logits(model, packed), logits(model, rest, **old)]

    expected = everything(base)
    model = method.attach(base)
    with model.disable_adapter():
        assert all(torch.equal(*pair) for pair in zip(everything(model), expected))
        manager = base.init_continuous_batching(generation_config=GenerationConfig(eos_token_id=EOS, pad_token_id=0))
        assert manager is not None
    for refused in (own, packed):
        with pytest.raises((ValueError, NotImplementedError)):
            logits(model, refused)


def test_own_inputs_embeds(tiny: TinyVLM, model: PeftModel, method: Method):
    base = model.get_base_model()
    if tiny is FAMILIES["qwen3_vl"]:
        tiny = FAMILIES["qwen2_5_vl"]  # DeepStack would still want the images
        model = method.attach(tiny.build())
        base = model.get_base_model()
    inputs = tiny.inputs(base, "t4 i t6")
    seen = []
    text_model = base.model.language_model
    handle = text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = logits(model, inputs)
    handle.remove()
    own = dict(inputs_embeds=seen[0], attention_mask=inputs["attention_mask"], position_ids=inputs["position_ids"])
    visual_mask = inputs["input_ids"] == IMAGE
    assert torch.equal(logits(model, own, visual_mask=visual_mask), expected)
    with pytest.raises(ValueError, match="Pass visual_mask, a bool tensor of shape"):
        logits(model, own)
    with pytest.raises(ValueError, match="must be a bool tensor"):
        logits(model, own, visual_mask=visual_mask[:, 1:])

    if "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters:
        return  # generate takes none for this family
    if hasattr(base.model, "get_rope_index"):
        return  # without input_ids the base places the image on one line, so nothing else equals this
    greedy = generate(tiny, model, "t4 i t6")
    generated = model.generate(
        inputs_embeds=seen[0],
        attention_mask=own["attention_mask"],
        visual_mask=visual_mask,
        do_sample=False,
        **GENERATE,
    )
    assert torch.equal(torch.stack(generated.logits), torch.stack(greedy.logits))


def test_rows_packed_by_positions_are_refused(method: Method):
    tiny = FAMILIES["llava"]
    model = method.attach(tiny.build())
    one, other = (tiny.inputs(model.get_base_model(), row) for row in ("t4 i t6", "t9"))
    packed = {name: torch.cat([one[name], other[name]], -1) for name in ("input_ids", "position_ids")}
    with pytest.raises(NotImplementedError, match="position_ids that start again given"):
        logits(model, {**packed, "pixel_values": one["pixel_values"]})


@pytest.mark.parametrize("kind", ["bool", "float", "dict", "static cache", "flex"])
def test_rows_packed_by_a_mask_are_refused(kind: str):
    """Positions may start again or not. A mask that hides padding, or an image from some text, parts no row."""
    tiny = FAMILIES["llava"]
    model = METHODS["pvm"].attach(tiny.build(attn_implementation="flex_attention" if kind == "flex" else "eager"))
    one, other = (tiny.inputs(model.get_base_model(), row) for row in ("t4 i t6", "t9"))
    first, length = one["input_ids"].shape[1], one["input_ids"].shape[1] + 9
    inputs = {"input_ids": torch.cat([one["input_ids"], other["input_ids"]], 1), "pixel_values": one["pixel_values"]}
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden, padded, packed = causal.clone(), causal.clone(), causal.clone()
    hidden[first:, 4 : first - 6] = padded[:, :2] = packed[first:, :first] = False

    def given(mask: torch.Tensor) -> dict[str, Any]:
        if kind == "flex":
            blocks = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, length, length, device="cpu")
            return {**inputs, "attention_mask": blocks}
        mask = mask[None, None]
        as_scores = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        if kind == "static cache":
            cache = static_cache(model)
            return {**inputs, "attention_mask": F.pad(mask, (0, cache.layers[0].max_cache_len - length)), CACHE: cache}
        forms = {"bool": mask, "float": as_scores, "dict": {"full_attention": mask, "sliding_attention": mask}}
        return {**inputs, "attention_mask": forms[kind]}

    with torch.compiler.set_stance("force_eager"):  # flex attention would compile for half a minute
        if kind != "dict":  # of which LLaVA knows nothing
            for mask in (causal, hidden, padded):
                logits(model, given(mask))
        with pytest.raises(NotImplementedError, match="a mask that parts rows given"):
            logits(model, given(packed))


def test_features_without_placeholders_are_refused(method: Method):
    """An unlisted model may mark its videos by another token than its config says."""
    tiny = FAMILIES["qwen2_vl"]
    base = tiny.build()
    inputs = tiny.inputs(base, "t4 v t6")
    model = method.attach(base)
    find_tap(model).vlm.placeholder_ids["video"] = (299,)
    with pytest.raises(ValueError, match=r"brings video features, but none of the placeholder ids .*\(299,\)"):
        logits(model, inputs)


def find_tap(model: PeftModel) -> Tap:
    return next(m.__dict__["_visual_tap"] for m in model.modules() if "_visual_tap" in m.__dict__)


@pytest.mark.parametrize("token", [IMAGE, VIDEO])
def test_sampled_placeholder_is_text(plain: TinyVLM, token: int, method: Method):
    model = method.attach(plain.build())
    base = model.get_base_model()
    conversation = "t4 i t4"
    cache = prefill(plain, model, conversation)
    length = cache.get_seq_length()
    positions = plain.inputs(base, conversation)["position_ids"].amax(-1, keepdim=True) + 1
    step = dict(
        input_ids=torch.tensor([[token]]),
        position_ids=positions,
        attention_mask=torch.ones(1, length + 1, dtype=torch.long),
    )
    on = logits(model, step, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    with model.disable_adapter():
        off = logits(model, step, **{CACHE: copy.deepcopy(cache)}, use_cache=True)
    assert difference(on, off) > 100 * TOLERANCE, "a text token is not silenced"
    assert copy.deepcopy(cache).visual_memory.slots.shape[1] == cache.visual_memory.slots.shape[1]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.video], indirect=True)
def test_video(family: TinyVLM, method: Method):
    model = method.attach(family.build())
    base = model.get_base_model()
    inputs = family.inputs(base, "t4 v t6")
    num_visual = int((inputs["input_ids"] == VIDEO).sum() + (inputs["input_ids"] == IMAGE).sum())
    whole = logits(model, inputs)
    with model.disable_adapter():
        assert difference(whole[:, -6:], logits(model, inputs)[:, -6:]) > 100 * TOLERANCE
    cache = prefill(family, model, "t4 v t6", stop=inputs["input_ids"].shape[1] - LAST)
    assert cache.visual_memory.slots.shape[1] == num_visual
    rest = resume(family, model, cache, "t4 v t6", inputs["input_ids"].shape[1] - LAST)
    assert difference(rest, whole[:, -LAST:]) < TOLERANCE


def test_continuous_batching_takes_no_images():
    """As docs/how-to/serve.md says. Where this fails, memories may have to follow the requests of a paged cache."""
    taken = inspect.signature(ContinuousBatchingManager.add_request).parameters
    assert {name for name, parameter in taken.items() if parameter.kind != parameter.VAR_KEYWORD} == {
        *("self", "input_ids", "request_id", "max_new_tokens", "streaming", "record_timestamps", "eos_token_id"),
    }


@pytest.mark.parametrize("kind", [LoraConfig, DIPEConfig])
def test_transformers_serve_takes_no_adapters(kind: type, tmp_path: Path):
    """As docs/how-to/serve.md says. Where this fails, try it with ours."""
    kind(**({"target_modules": ["q_proj"]} if kind is LoraConfig else {})).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Should have a `model_type` key in its config"):
        ModelManager()._load_model(f"{tmp_path}@main")


def test_continuous_batching_is_refused(plain: TinyVLM, method: Method):
    base = plain.build()
    model = method.attach(base)
    config = GenerationConfig(max_new_tokens=2, eos_token_id=EOS, pad_token_id=0)
    for owner in (model, base):
        with pytest.raises(
            NotImplementedError, match="continuous batching would put several conversations into one row"
        ):
            owner.generate_batch(inputs=[[5, 6, 7]], generation_config=config)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q given"):
        logits(model, plain.inputs(base, "t9"), cu_seq_lens_q=torch.tensor([0, 4, 9]))
    unloaded = model.unload()
    assert unloaded.init_continuous_batching.__func__ is type(unloaded).init_continuous_batching

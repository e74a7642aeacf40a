"""Text stands up to a distance after each image: against an independent computation, and what must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from allocations import Allocations
from forwards import TOLERANCE, difference, in_double, logits, prompt_and_step
from oracle import oracle
from peft import LoraConfig, get_peft_model
from tiny_vlms import FAMILIES, GEMMA4_SHARED, REPRESENTATIVE, TinyVLM
from transformers import DynamicCache, StaticCache

from peft_pvm import DIPEConfig, TDRSConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.rotation import rotate, rotation_tables, unit
from peft_pvm.methods.dipe.method import AnchoredPositions
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.keys import Keys
from peft_pvm.utils.packages import CACHE


BATCH = ("t4 i t9 i t3 i t12", "i t12 i t8", "t5 i i t7", "t9")  # three images, two, one run of two, none
ONE_LAYOUT = ("t4 i t9 i t3 i t12",) * 2
SETTINGS = {
    "each run": {"image_gap": 1},
    "no distance": {"max_distance": 0, "image_gap": 1},
    "near runs together": {"image_gap": 8},
    "two images told apart": {"image_gap": 1, "max_images": 2},
    "one image": {"image_gap": 1, "max_images": 1},
}


def by_image(**fields) -> DIPEConfig:
    return DIPEConfig(**{"anchor": "image", "max_distance": 3, "image_gap": 1, **fields})


def agrees(family: TinyVLM, config: DIPEConfig, batch: tuple[str, ...] = BATCH) -> bool:
    model = family.build_precise()
    inputs = family.inputs(model, *batch)
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=config) as reference:
        expected = logits(reference, in_double(inputs))[real]
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), expected) < 2e-5


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_agrees_with_the_oracle(family: TinyVLM, fields: dict):
    """Rows with different numbers of images, and by modality where all rows have one layout."""
    assert agrees(family, by_image(**fields))
    assert agrees(family, by_image(**fields), ONE_LAYOUT)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_beside_tdrs_it_agrees_with_the_oracle(name: str):
    family, config = FAMILIES[name], by_image()
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    with oracle(family.build(), inputs, dipe=config, tdrs=TDRSConfig()) as reference:
        expected = logits(reference, in_double(inputs))[real]
    with attached(model, config, TDRSConfig()):
        assert difference(logits(model, inputs)[real].double(), expected) < 4e-5


@pytest.mark.parametrize("image_gap", [1, 8])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.video])
def test_videos(name: str, image_gap: int):
    """Frames are runs where there is text between them."""
    assert agrees(FAMILIES[name], by_image(image_gap=image_gap), ("t3 v t9 v t10", "t2 v t3 v t4"))


def test_one_image_and_its_text_are_as_by_run(family: TinyVLM):
    """To the bit, in a prefill and in decoding."""
    model = family.build()
    inputs = family.inputs(model, "t4 i t9")
    prompt, step = prompt_and_step(family, model, "i t9")
    for max_distance in (0, 3):
        results = []
        for anchor in ("run", "image"):
            with attached(model, DIPEConfig(anchor=anchor, max_distance=max_distance)):
                cache = DynamicCache(config=model.config.get_text_config())
                logits(model, prompt, **{CACHE: cache}, use_cache=True)
                results.append([logits(model, inputs), logits(model, step, **{CACHE: cache}, use_cache=True)])
        for by_run, other in zip(*results):
            assert torch.equal(by_run, other)


def test_up_to_its_distance_the_model_is_the_bases(family: TinyVLM, monkeypatch):
    """To the bit: nothing is farther from any image, and no query is turned."""
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    base = logits(model, inputs)[real]
    with attached(model, by_image(max_distance=4)):
        assert difference(logits(model, inputs)[real], base) > 100 * TOLERANCE
    monkeypatch.setattr(AnchoredPositions, "anchored_queries", None)
    with attached(model, by_image(max_distance=200)):
        assert torch.equal(logits(model, inputs)[real], base)


@pytest.mark.parametrize("config", [DIPEConfig(max_distance=3), by_image()], ids=["run", "image"])
def test_the_last_tokens_alone(config: DIPEConfig):
    """Layers that share keys and values compute no others."""
    model = GEMMA4_SHARED.build()
    inputs = GEMMA4_SHARED.inputs(model, "t4 i t9 i t12")
    with attached(model, config):
        assert difference(logits(model, inputs, logits_to_keep=4), logits(model, inputs)[:, -4:]) < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "llava", "gemma3", "glm4v"])
def test_many_turns_on_one_cache(name: str, kind: str):
    """Images arrive in later turns, and text goes on token by token, also beyond the images that are told apart."""
    family = FAMILIES[name]
    turns = ["t4 i t9", " i t3", " i t2 i t9"]
    model = get_peft_model(family.build(), by_image(max_images=3)).eval()
    base = model.get_base_model()
    whole = "".join(turns)
    expected = logits(model, family.inputs(base, whole), use_cache=False)
    stops = [family.inputs(base, "".join(turns[: n + 1]))["input_ids"].shape[1] for n in range(len(turns))]
    cuts = sorted({0, stops[-1], *(stop - back for stop in stops for back in (0, 1, 2))})
    config = base.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=80) if kind == "static" else DynamicCache(config=config)
    pieces = [
        logits(model, family.inputs(base, whole, start=start, stop=stop), **{CACHE: cache}, use_cache=True)
        for start, stop in itertools.pairwise(cuts)
    ]
    assert difference(torch.cat(pieces, 1), expected) < TOLERANCE


def test_images_follow_the_cache():
    """Cropped back into an earlier turn, repeated and chosen by row, a conversation goes on as if it were new."""
    family = FAMILIES["qwen3_vl"]
    model = get_peft_model(family.build(), by_image()).eval()
    base = model.get_base_model()
    earlier, given_up, later = "t4 i t9 i t9", "t4 i t9 i t9 i t3 i t9", "t4 i t9 i t9 t6 i t9"
    length, stop = (family.inputs(base, text)["input_ids"].shape[1] for text in (earlier, later))
    rest = family.inputs(base, later, start=length)
    results = []
    for is_new in (True, False):
        cache = DynamicCache()
        logits(model, family.inputs(base, later, stop=length), **{CACHE: cache}, use_cache=True)
        if not is_new:
            logits(model, family.inputs(base, given_up, start=length), **{CACHE: cache}, use_cache=True)
            cache.crop(length - cache.get_seq_length())
            cache.batch_repeat_interleave(3)
            cache.batch_select_indices(torch.tensor([2]))
        rows = logits(model, rest, **{CACHE: cache}, use_cache=True)
        step = {
            "input_ids": torch.tensor([[11]]),
            "position_ids": rest["position_ids"][..., -1:] + 1,
            "attention_mask": torch.ones(1, stop + 1, dtype=torch.long),
        }
        results.append((rows, logits(model, step, **{CACHE: cache}, use_cache=True)))
    for new, old in zip(*results):
        assert difference(new, old) < TOLERANCE


def test_images_follow_rows_that_change_places():
    """As beams do, between steps of decoding."""
    family = FAMILIES["qwen3_vl"]
    model = get_peft_model(family.build(), by_image()).eval()
    inputs = family.inputs(model.get_base_model(), "t4 i t9 i t3 i t12", "i t12 i t8")
    places = torch.tensor([1, 0])
    step = {
        "input_ids": torch.tensor([[11], [12]]),
        "position_ids": inputs["position_ids"][..., -1:] + 1,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
    }
    moved = {name: tensor.index_select(tensor.dim() - 2, places) for name, tensor in step.items()}
    results = []
    for places_of_step, of_step in ((None, step), (places, moved)):
        cache = DynamicCache()
        logits(model, inputs, **{CACHE: cache}, use_cache=True)
        if places_of_step is not None:
            cache.reorder_cache(places_of_step)
        results.append(logits(model, of_step, **{CACHE: cache}, use_cache=True))
    assert difference(results[0][places], results[1]) < TOLERANCE


def test_gradients_equal_the_oracles(family: TinyVLM):
    """With LoRA in the text model, and recomputed under checkpointing."""
    config = by_image()
    inputs = family.inputs(family.build(), *BATCH)
    real = inputs["attention_mask"].bool()
    results = []
    for kind in ("oracle", "plain", "checkpointed"):
        model = family.build()
        lora = get_peft_model(model, LoraConfig(r=4, target_modules=r".*(language|text)_model.*\.(q_proj|k_proj)"))
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(lora.named_parameters()):
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1)
        if kind == "oracle":
            with oracle(model, inputs, dipe=config) as reference:
                reference(**in_double(inputs)).logits[real].square().mean().backward()
        else:
            get_peft_model(model, config, "by-image")
            model.train()
            if kind == "checkpointed":
                model.gradient_checkpointing_enable()
            model(**inputs, use_cache=False).logits[real].square().mean().backward()
        results.append({name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad})
    expected, *others = results
    assert max(gradient.abs().max() for gradient in expected.values()) > 5e-4
    for found in others:
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert difference(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("other", [{"anchor": "run"}, {"image_gap": 2}, {"max_images": 3}], ids=str)
def test_two_anchors_in_one_layer_are_refused(other: dict):
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, *BATCH)
    with attached(model, by_image(), by_image()):
        logits(model, inputs)
    refusal = pytest.raises(ValueError, match="both decide the positions of attention in decoder layer 0")
    with attached(model, by_image(), by_image(**other)), refusal:
        logits(model, inputs)


def test_what_only_images_need_makes_no_difference_by_run():
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, *BATCH)
    with attached(model, DIPEConfig(max_distance=2), DIPEConfig(max_distance=2, image_gap=1, max_images=2)):
        logits(model, inputs)


REACHED, IMAGES, IMAGES_OF_KEYS = AnchoredPositions.reached, VisualContext.images, Keys.images


def _moved(change):
    """Where queries stand for images, changed."""

    def reached(positions: AnchoredPositions, context: VisualContext, num_queries: int) -> torch.Tensor:
        return change(REACHED(positions, context, num_queries), context)

    return "reached", reached


def _on_one_axis(reached: torch.Tensor, context: VisualContext) -> torch.Tensor:
    own, _ = context.noted()
    return torch.cat([reached[..., :1], own.unsqueeze(1)[..., 1:].expand_as(reached[..., 1:])], -1)


def _as_by_run(reached: torch.Tensor, context: VisualContext) -> torch.Tensor:
    own, anchors = context.noted()
    return torch.minimum(own, anchors.unsqueeze(-1) + 3).unsqueeze(1).expand_as(reached)


def _limit_on_keys(positions: AnchoredPositions, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of an image are turned towards the query as if all queries were the last, and queries are not."""
    own = call.context.noted()[0]
    moves = own.unsqueeze(1) - positions.reached(call.context, call.query.shape[2])
    nearer = [
        rotate(call.module, call.key, unit(rotation_tables(positions.rotary, move, positions.layer_type)))
        for move in moves.amax(2, keepdim=True).expand_as(moves).unbind(1)
    ]
    keys = call.key
    for key, members in zip(nearer, positions.members(call)):
        keys = torch.where(members[:, None, :, None], key, keys)
    return torch.cat([call.query, call.query * 0], -1), torch.cat([keys, keys * 0], -1)


def _ends_one_image_on(context: VisualContext, image_gap: int, max_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts, ends = IMAGES(context, image_gap, max_images)
    return starts, ends.roll(1, 1)


def _one_image_back(keys: Keys, image_gap: int, max_images: int) -> torch.Tensor:
    return (IMAGES_OF_KEYS(keys, image_gap, max_images) - 1).clamp(min=0)


def _first_of_far_images(context: VisualContext, image_gap: int, max_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images too many to be told apart stand where the text behind the first of them begins."""
    starts, _ = IMAGES(context, image_gap, max_images)
    _, every = IMAGES(context, image_gap, 64)
    return starts, every[:, : starts.shape[1]]


WRONG = {
    "as it is": (AnchoredPositions, *_moved(lambda reached, context: reached)),
    "one too far": (AnchoredPositions, *_moved(lambda reached, context: reached + 1)),
    "one too near": (AnchoredPositions, *_moved(lambda reached, context: reached - 1)),
    "on the first axis": (AnchoredPositions, *_moved(_on_one_axis)),
    "by run": (AnchoredPositions, *_moved(_as_by_run)),
    "on keys": (AnchoredPositions, "widen", _limit_on_keys),
    "another image's end": (VisualContext, "images", _ends_one_image_on),
    "keys of the image before": (Keys, "images", _one_image_back),
    "far images by the first of them": (VisualContext, "images", _first_of_far_images),
}


@pytest.mark.parametrize("variant", WRONG)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_wrong_variants_are_noticed(name: str, variant: str, monkeypatch):
    monkeypatch.setattr(*WRONG[variant])
    is_right = variant == "as it is" or (variant == "on the first axis" and name == "llava")  # which has one
    assert agrees(FAMILIES[name], by_image(max_images=2)) == is_right


@pytest.mark.parametrize("images", [1, 4])
def test_decoding_allocates_nothing_of_the_caches_size(images: int):
    """A row of scores for each image, and no keys."""
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(attn_implementation="sdpa"), by_image()).eval()
    base = model.get_base_model()
    prompt, step = prompt_and_step(family, base, "t4 " + "i t3 " * images + "t9")
    cache = StaticCache(config=base.config.get_text_config(), max_cache_len=2000)
    logits(model, prompt, **{CACHE: cache}, use_cache=True)
    with Allocations() as allocations:
        logits(model, step, **{CACHE: cache}, use_cache=True)
    largest = max(allocations.sizes)
    # Scores of four heads for text and for each image, against keys of two heads with 16 channels.
    assert largest[0] <= 4 * (1 + images) * 2000, largest
    assert largest[0] < cache.layers[0].keys.numel(), largest

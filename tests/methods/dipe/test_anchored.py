"""What DIPE promises beyond its formula: gradients, no copy of the cache, other rotations, wrong variants noticed."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from environment import on_a_cpu
from forwards import TOLERANCE, difference, in_double, logits, prompt_and_step
from oracle import oracle
from peft import LoraConfig, get_peft_model
from tiny_vlms import FAMILIES, TinyVLM
from transformers import DynamicCache, StaticCache

from peft_pvm import DIPEConfig, attached
from peft_pvm.attention.call import AttentionCall
from peft_pvm.attention.rotation import rotate, rotation_tables, unit
from peft_pvm.methods.dipe.method import AnchoredPositions
from peft_pvm.tokens.context import VisualContext
from peft_pvm.utils.packages import CACHE


BATCH = ("t4 i t3 i t6", "t7 i i t5", "i t9", "t9")


def agrees_with_the_oracle(family: TinyVLM, build=None, **fields) -> bool:
    build, config = build or family.build, DIPEConfig(**{"max_distance": 0, **fields})
    model = build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    with oracle(build(), inputs, dipe=config) as reference:
        expected = logits(reference, in_double(inputs))[real]
    with attached(model, config):
        return difference(logits(model, inputs)[real].double(), expected) < 2e-5


def test_gradients_equal_the_oracles(family: TinyVLM):
    """With LoRA in the text model, the paper's real use, and with checkpointing."""
    inputs = family.inputs(family.build(), *BATCH)
    real = inputs["attention_mask"].bool()
    results = []
    for kind in ("oracle", "plain", "checkpointed"):
        model = family.build()
        lora = LoraConfig(r=4, target_modules=r".*(language|text)_model.*\.(q_proj|k_proj)")
        lora = get_peft_model(model, lora, "lora")
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(lora.named_parameters()):
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.1)
        if kind == "oracle":
            with oracle(model, inputs, dipe=DIPEConfig(max_distance=0)) as reference:
                reference(**in_double(inputs)).logits[real].square().mean().backward()
        else:
            get_peft_model(model, DIPEConfig(max_distance=0), "dipe")
            model.train()
            if kind == "checkpointed":
                model.gradient_checkpointing_enable()
            model(**inputs, use_cache=False).logits[real].square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    expected, *others = results
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for found in others:
        assert found.keys() == expected.keys()
        for parameter, gradient in found.items():
            assert difference(gradient.double(), expected[parameter].double()) < 2e-5, parameter


def _no_swap(positions: AnchoredPositions, call: AttentionCall):
    """Visual queries hold their halves in the order of text queries."""
    query, (anchored,) = call.query, positions.anchored_queries(call)
    visual_keys = call.visual_keys[:, None, :, None]
    split = [call.key.masked_fill(visual_keys, 0), call.key.masked_fill(~visual_keys, 0)]
    return torch.cat([query, anchored], -1), torch.cat(split, -1)


def _anchor_of_the_key(positions: AnchoredPositions, call: AttentionCall):
    """Between modalities, the key stands where its run began, and the query where it is."""
    position_ids, anchors = call.context.noted()  # of a whole forward: of queries and keys alike
    tables = unit(rotation_tables(positions.rotary, anchors.unsqueeze(-1) - position_ids, positions.layer_type))
    anchored = rotate(call.module, call.key, tables)
    visual_queries = call.visual_queries[:, None, :, None]
    visual_keys = call.visual_keys[:, None, :, None]
    in_text, in_visual = call.query.masked_fill(visual_queries, 0), call.query.masked_fill(~visual_queries, 0)
    # What text meets, and what visual tokens meet: keys of the same modality as they are, of the other anchored.
    by_text, by_visual = (
        torch.where(visual_keys, anchored, call.key),
        torch.where(visual_keys, call.key, anchored),
    )
    return torch.cat([in_text, in_visual], -1), torch.cat([by_text, by_visual], -1)


def _first_token_as_anchor(context: VisualContext, position_ids: torch.Tensor) -> None:
    """Every run is anchored at the start of the row, not at its own."""
    NOTE_POSITIONS(context, position_ids)
    if context.anchors is not None:
        context.anchors = context.anchors[:, :1].expand_as(context.anchors)


NOTE_POSITIONS = VisualContext.note_positions
WRONG = {
    "no swap of halves": (AnchoredPositions, "widen", _no_swap),
    "anchor of the key": (AnchoredPositions, "widen", _anchor_of_the_key),
    "anchor of the row": (VisualContext, "note_positions", _first_token_as_anchor),
}


@pytest.mark.parametrize("variant", [None, *WRONG])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_wrong_variants_are_noticed(name: str, variant: str | None, monkeypatch):
    if variant is not None:
        monkeypatch.setattr(*WRONG[variant])
    assert agrees_with_the_oracle(FAMILIES[name]) == (variant is None)


def _reaching(reach):
    """Queries stand where `reach` says, from positions and anchors of all axes and the distance."""

    def reached(positions: AnchoredPositions, context: VisualContext, num_queries: int) -> torch.Tensor:
        position_ids, anchors = context.noted()
        found = reach(position_ids, anchors.unsqueeze(-1).expand_as(position_ids), positions.max_distance)
        return found[:, -num_queries:].unsqueeze(1)

    return reached


def _on_one_axis(own: torch.Tensor, anchors: torch.Tensor, limit: int) -> torch.Tensor:
    reached = torch.minimum(own, anchors + limit)
    return torch.cat([reached[..., :1], own[..., 1:]], -1)


def _on_keys(positions: AnchoredPositions, call: AttentionCall):
    """Between modalities, the key stands up to so far behind where its run began, and the query where it is."""
    position_ids, anchors = call.context.noted()
    reached = torch.minimum(position_ids, anchors.unsqueeze(-1) + positions.max_distance)
    tables = unit(rotation_tables(positions.rotary, reached - position_ids, positions.layer_type))
    anchored = rotate(call.module, call.key, tables)
    visual_queries, visual_keys = call.visual_queries[:, None, :, None], call.visual_keys[:, None, :, None]
    in_text, in_visual = call.query.masked_fill(visual_queries, 0), call.query.masked_fill(~visual_queries, 0)
    by_text, by_visual = torch.where(visual_keys, anchored, call.key), torch.where(visual_keys, call.key, anchored)
    return torch.cat([in_text, in_visual], -1), torch.cat([by_text, by_visual], -1)


WRONG_LIMITS = {
    "as it is": ("reached", _reaching(lambda own, anchors, limit: torch.minimum(own, anchors + limit))),
    "one too far": ("reached", _reaching(lambda own, anchors, limit: torch.minimum(own, anchors + limit + 1))),
    "one too near": ("reached", _reaching(lambda own, anchors, limit: torch.minimum(own, anchors + limit - 1))),
    "always the distance": ("reached", _reaching(lambda own, anchors, limit: anchors + limit)),
    "on the first axis": ("reached", _reaching(_on_one_axis)),
    "on keys": ("widen", _on_keys),
}


@pytest.mark.parametrize("variant", WRONG_LIMITS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_wrong_limits_are_noticed(name: str, variant: str, monkeypatch):
    family = FAMILIES[name]
    monkeypatch.setattr(AnchoredPositions, *WRONG_LIMITS[variant])
    is_right = variant == "as it is" or (variant == "on the first axis" and name == "llava")  # which has one
    assert agrees_with_the_oracle(family, max_distance=3) == is_right


def test_up_to_its_distance_the_model_is_the_bases(family: TinyVLM, monkeypatch):
    """In a prefill to the bit: nothing is farther, and no query is turned. In decoding to rounding."""
    turned, moved = [], AnchoredPositions._moved

    def noted(positions: AnchoredPositions, call: AttentionCall) -> tuple:
        turned.append(call.query.shape[2])
        return moved(positions, call)

    monkeypatch.setattr(AnchoredPositions, "_moved", noted)
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    prompt, step = prompt_and_step(family, model, "t4 i t9")
    results = []
    for configs in ([], [DIPEConfig(max_distance=100)]):
        with attached(model, *configs):
            cache = DynamicCache(config=model.config.get_text_config())
            logits(model, prompt, **{CACHE: cache}, use_cache=True)
            results.append((logits(model, inputs), logits(model, step, **{CACHE: cache}, use_cache=True)))
    (base, base_step), (limited, limited_step) = results
    real = inputs["attention_mask"].bool()
    assert torch.equal(limited[real], base[real])
    assert set(turned) == {1}
    assert difference(limited_step, base_step) < TOLERANCE


@pytest.mark.parametrize("max_distance", [0, None])
def test_no_distance_is_the_papers_form(max_distance: int | None):
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    with attached(model, DIPEConfig(max_distance=0)):
        expected = logits(model, inputs)
    with attached(model, DIPEConfig(max_distance=max_distance)):
        assert torch.equal(logits(model, inputs), expected)


def test_two_distances_in_one_layer_are_refused():
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, *BATCH)
    refusal = pytest.raises(ValueError, match="both decide the positions of attention in decoder layer 0")
    with attached(model, DIPEConfig(max_distance=2), DIPEConfig(max_distance=3)), refusal:
        logits(model, inputs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations(rope: dict):
    """YaRN also multiplies attention by a factor; the dynamic kind changes with the length of the sequence."""
    family = FAMILIES["llava"]

    def build() -> torch.nn.Module:
        config = family.config()
        config.text_config.rope_parameters = {"rope_theta": 10000.0, **rope}
        if rope["rope_type"] == "dynamic":
            config.text_config.max_position_embeddings = 12
        scaled = TinyVLM(family.model_class, lambda: config, family.image)
        return scaled.build()

    assert agrees_with_the_oracle(family, build)


def test_bfloat16():
    """As near to the full precision as the base's own bfloat16 is."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    inputs = family.inputs(model, *BATCH)
    real = inputs["attention_mask"].bool()
    rounded = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with attached(model, DIPEConfig(max_distance=0)):
        on = logits(model, inputs)[real]
    off = logits(model, inputs)[real]
    model = model.bfloat16()
    base_error = difference(logits(model, rounded)[real].float(), off)
    with attached(model, DIPEConfig(max_distance=0)):
        assert difference(logits(model, rounded)[real].float(), on) < 2 * base_error
        cache = DynamicCache()
        logits(model, rounded, **{CACHE: cache}, use_cache=True)
        assert cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "internvl"])
def test_decoding_allocates_nothing_of_the_caches_size(name: str, kernel: str):
    """A static cache, so that the base itself allocates nothing of that size either."""
    family = FAMILIES[name]
    model = family.build(attn_implementation=kernel)
    model = get_peft_model(model, DIPEConfig(max_distance=0)).eval()
    base = model.get_base_model()
    inputs = family.inputs(base, "t4 i t9")
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=base.config.get_text_config(), max_cache_len=2000)
    logits(model, inputs, **{CACHE: cache}, use_cache=True)
    step = dict(
        input_ids=torch.tensor([[11]]),
        position_ids=inputs["position_ids"][..., -1:] + 1,
        attention_mask=torch.ones(1, length + 1, dtype=torch.long),
    )
    whole = cache.layers[0].keys.numel()
    with Allocations() as allocations:
        on = logits(model, step, **{CACHE: cache}, use_cache=True)
    largest = max(allocations.sizes)
    assert largest[0] < whole / 2, largest
    with model.disable_adapter():
        assert difference(on, logits(model, step, **{CACHE: cache}, use_cache=True)) > 100 * TOLERANCE


@on_a_cpu
def test_prefill_runs_on_the_fused_kernel(monkeypatch):
    """Not on the one that holds whole score matrices."""
    family = FAMILIES["llava"]
    model = family.build(attn_implementation="sdpa")
    inputs = family.inputs(model, "t4 i t9")
    with attached(model, DIPEConfig(max_distance=0)), torch.profiler.profile() as profile:
        logits(model, inputs)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] >= 3  # one for each decoder layer
    assert "aten::_scaled_dot_product_attention_math" not in calls

"""What is recorded of attention, against the weights that eager attention returns."""

from __future__ import annotations

import pytest
import torch
from forwards import TOLERANCE
from methods_under_test import METHODS, Method
from tiny_vlms import FAMILIES, GEMMA4_SHARED, TinyVLM
from transformers.models.llama import modeling_llama

from peft_pvm.attention.call import AttentionCall
from peft_pvm.probe.measures import find_sinks
from peft_pvm.probe.observers import AttentionObserver, observed
from peft_pvm.tokens.families import find_vlm


CONVERSATION = "t4 i t3 i t6"
NUM_QUERIES = 5
ADAPTERS: dict[str, Method | None] = {name: METHODS.get(name) for name in ("base", "dipe", "tdrs", "tdrs-inter")}


def build(family: TinyVLM, kernel: str, adapters: str) -> torch.nn.Module:
    model = family.build(attn_implementation=kernel)
    method = ADAPTERS[adapters]
    return model if method is None else method.attach(model).get_base_model()


def observe(model: torch.nn.Module, inputs: dict, num_queries: int = NUM_QUERIES, **kwargs) -> AttentionObserver:
    observer = AttentionObserver(num_queries)
    with torch.no_grad(), observed(find_vlm(model), observer):
        model(**inputs, use_cache=False, **kwargs)
    return observer


def eager_weights(family: TinyVLM, adapters: str) -> dict[int, torch.Tensor]:
    """By layer index, `(heads, num_queries, num_keys)`: by another way, in which the model itself returns them."""
    model = build(family, "eager", adapters)
    # Qwen2-VL does not pass the argument on to its attention in transformers 5.16, which T-DRS then asks the config.
    model.config.get_text_config().output_attentions = True
    with torch.no_grad():
        output = model(**family.inputs(model, CONVERSATION), output_attentions=True, use_cache=False)
    returned = [weights for weights in output.attentions if weights is not None]
    return {index: weights[0] for index, weights in zip(find_vlm(model).self_attentions, returned, strict=True)}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_masses_are_sums_of_eager_weights(family: TinyVLM, adapters: str):
    weights = eager_weights(family, adapters)
    for kernel in ("sdpa", "eager"):
        if kernel == "sdpa" and family is FAMILIES["paligemma2"]:
            continue  # Gemma 2 has eager attention alone
        model = build(family, kernel, adapters)
        inputs = family.inputs(model, CONVERSATION)
        visual = inputs["input_ids"][0] == model.config.image_token_id
        assert 0 < int(visual.sum()) < visual.numel()
        masses = observe(model, inputs).masses
        assert masses.keys() == weights.keys()
        for layer_idx, recorded in masses.items():
            expected = weights[layer_idx][:, -NUM_QUERIES:].transpose(0, 1)
            assert (recorded.visual - expected[..., visual].sum(-1)).abs().max() < TOLERANCE
            assert (recorded.text - expected[..., ~visual].sum(-1)).abs().max() < TOLERANCE
            assert (recorded.per_token - expected[..., visual].mean(1)).abs().max() < TOLERANCE
            assert (recorded.visual + recorded.text - 1).abs().max() < TOLERANCE
            seen = (expected.amax(1) > 0)[:, ~visual].sum(-1)
            assert torch.equal(recorded.text_tokens, seen)


@pytest.mark.parametrize("adapters", ["base", "dipe"])
def test_scores_below_zero_are_counted(adapters: str, monkeypatch):
    """Those that eager attention makes, of the visual keys that a query sees: those between the images see one."""
    family, expected, since_image = FAMILIES["llava"], {}, 13
    model = build(family, "eager", adapters)
    inputs = family.inputs(model, CONVERSATION)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    eager = modeling_llama.eager_attention_forward

    def counting(module, query, key, value, attention_mask, scaling, **kwargs):
        if value.shape[-1] == module.head_dim and value.dtype == query.dtype and module.layer_idx not in expected:
            scores = query @ modeling_llama.repeat_kv(key, module.num_key_value_groups).mT * scaling
            below = (scores[0] < 0) & visual & (attention_mask[0] == 0)
            sees = ((attention_mask[0, 0] == 0) & visual).sum(-1)
            expected[module.layer_idx] = (below.sum(-1).float().mean(0) / sees)[-since_image:]
            assert len(set(sees[-since_image:].tolist())) > 1
        return eager(module, query, key, value, attention_mask, scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counting)
    base = family.build(attn_implementation="eager")
    with torch.no_grad():
        base(**inputs)
    monkeypatch.undo()
    for kernel in ("eager", "sdpa"):
        recorded = observe(build(family, kernel, adapters), inputs, since_image).masses
        assert 0 < recorded[0].below_zero.mean() < 1
        assert (recorded[0].below_zero - expected[0]).abs().max() < TOLERANCE
        if adapters == "base":  # which DIPE changes in later layers, by what it does in the first
            assert all((recorded[idx].below_zero - expected[idx]).abs().max() < TOLERANCE for idx in expected)


@pytest.mark.parametrize("adapters", ["base", "dipe"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_flex_attention_shows_the_same(name: str, adapters: str):
    family, recorded = FAMILIES[name], []
    for kernel in ("eager", "flex_attention"):
        model = build(family, kernel, adapters)
        with torch.compiler.set_stance("force_eager"):  # it would compile for half a minute
            recorded.append(observe(model, family.inputs(model, CONVERSATION)).masses)
    for layer_idx, masses in recorded[0].items():
        assert (recorded[1][layer_idx].visual - masses.visual).abs().max() < TOLERANCE
        assert torch.equal(recorded[1][layer_idx].text_tokens, masses.text_tokens)


def test_more_visual_tokens_than_a_head_is_wide():
    """They come in several pieces, the last of them not full."""
    family = FAMILIES["llava_next"]
    conversation = "t2 " + "i " * 4 + "t6"
    models = {kernel: build(family, kernel, "base") for kernel in ("sdpa", "eager")}
    inputs = family.inputs(models["sdpa"], conversation)
    visual = inputs["input_ids"][0] == models["sdpa"].config.image_token_id
    assert int(visual.sum()) > 2 * 16
    with torch.no_grad():
        weights = models["eager"](**inputs, output_attentions=True).attentions
    for layer_idx, recorded in observe(models["sdpa"], inputs).masses.items():
        expected = weights[layer_idx][0, :, -NUM_QUERIES:, visual].mean(0)
        assert (recorded.per_token - expected).abs().max() < TOLERANCE


def test_layers_that_compute_the_last_tokens_alone():
    model = GEMMA4_SHARED.build()
    inputs = GEMMA4_SHARED.inputs(model, "t4 i t9")
    everything = observe(model, inputs).masses
    last_alone = observe(model, inputs, logits_to_keep=NUM_QUERIES).masses
    for layer_idx, recorded in last_alone.items():
        assert (recorded.visual - everything[layer_idx].visual).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", ["base", "dipe", "tdrs", "pvm"])
def test_being_observed_changes_no_bit(plain: TinyVLM, method: str):
    model = plain.build()
    inputs = plain.inputs(model, CONVERSATION)
    if method in METHODS:
        model = METHODS[method].attach(model).get_base_model()
    with torch.no_grad():
        alone = model(**inputs).logits
        observer = AttentionObserver(NUM_QUERIES)
        with observed(find_vlm(model), observer):
            assert torch.equal(model(**inputs).logits, alone)
    assert observer.masses
    assert torch.equal(model(**inputs).logits, alone)


def test_a_planted_sink_is_found():
    """Every query meets one visual token's key, and no other's."""
    family, planted = FAMILIES["llava_next"], 7
    model = family.build()
    inputs = family.inputs(model, "t4 i t9")
    position = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[planted])
    attention = find_vlm(model).layers[1].self_attn
    direction = torch.zeros(attention.head_dim)
    direction[-1] = 4.0  # the channel that turns slowest with distance

    def every_head(output: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return strength[None, :, None] * direction.repeat(output.shape[-1] // len(direction))

    length = inputs["input_ids"].shape[1]
    only_planted = torch.zeros(length)
    only_planted[position] = 1.0
    attention.q_proj.register_forward_hook(lambda module, args, output: every_head(output, torch.ones(length)))
    attention.k_proj.register_forward_hook(lambda module, args, output: every_head(output, only_planted))
    masses = observe(model, inputs).masses
    sinks = {layer_idx: find_sinks(recorded.per_token, 5.0, 0.9) for layer_idx, recorded in masses.items()}
    assert sinks == {0: [], 1: [planted], 2: []}


def test_a_sink_draws_attention_in_enough_of_the_queries():
    per_token = torch.full((10, 20), 0.001)
    per_token[:9, 3] = 0.5
    per_token[:8, 5] = 0.5
    assert find_sinks(per_token, sink_factor=5, sink_share=0.9) == [3]
    assert find_sinks(per_token, sink_factor=5, sink_share=0.8) == [3, 5]
    assert find_sinks(per_token, sink_factor=11, sink_share=0.8) == []  # two of twenty: ten times the mean


def test_context_that_does_not_arrive_is_noticed():
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, CONVERSATION)
    attention = find_vlm(model).layers[1].self_attn

    def drop(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "visual_context"}

    attention.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=r"layers \[1\]"):
        observe(model, inputs)


def test_observers_come_after_the_output(monkeypatch: pytest.MonkeyPatch):
    """So that even one that writes into what it attends with cannot change anything."""
    order: list[str] = []
    attend = AttentionCall.attend

    def noted(call: AttentionCall):
        order.append("attend")
        return attend(call)

    monkeypatch.setattr(AttentionCall, "attend", noted)
    monkeypatch.setattr(AttentionObserver, "__call__", lambda self, call: order.append("observe"))
    model = FAMILIES["llava"].build()
    with pytest.raises(NotImplementedError):  # nothing was recorded
        observe(model, FAMILIES["llava"].inputs(model, CONVERSATION))
    assert order == ["attend", "observe"] * 3

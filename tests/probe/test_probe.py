"""What a probe says, against computing it directly; and that it leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from forwards import TOLERANCE
from methods_under_test import METHODS, Together, give_weight
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import DIPEConfig, PAIConfig, PVMConfig, VAFConfig, attached
from peft_pvm.attention.dispatch import ConfigView
from peft_pvm.probe import probe
from peft_pvm.probe.inputs import extended, visual_grids
from peft_pvm.probe.observers import AttentionObserver, layers_observed
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tuners.active import acting_adapters, only
from peft_pvm.tuners.layers import VisualTunerLayer
from peft_pvm.utils.packages import CACHE


NUM_TOKENS = 8
ROUNDING = 1e-5  # relative: numbers are rounded to six digits


def lora(model: torch.nn.Module) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def state(model: torch.nn.Module) -> dict:
    """Everything that a probe could leave behind."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in base.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()],
        "views": [m.config.users for m in base.modules() if isinstance(getattr(m, "config", None), ConfigView)],
        "training": [module.training for module in base.modules()],
        "trainable": [parameter.requires_grad for parameter in base.parameters()],
        "active": [(list(m.active_adapters), m.disable_adapters) for m in base.modules() if hasattr(m, "merged")],
        "rope_deltas": [id(m.rope_deltas) for m in base.modules() if hasattr(m, "rope_deltas")],
        "weights": [parameter.clone() for parameter in base.parameters()],
    }


def assert_same(a: dict, b: dict) -> None:
    for key in a.keys() - {"weights"}:
        assert a[key] == b[key], key
    for before, after in zip(a["weights"], b["weights"], strict=True):
        assert torch.equal(before, after)


@contextlib.contextmanager
def plain_model(model):
    yield model


@contextlib.contextmanager
def with_everything(model):
    """By transformers: three LoRAs, of which two act and are frozen, and T-DRS, disabled. By PEFT: PVM and DIPE."""
    for name in ("lora", "second", "idle"):
        model.add_adapter(lora(model), name)
    model.set_adapter(["lora", "second"])
    model.requires_grad_(False)
    together = Together(model, pvm=METHODS["pvm"], dipe=METHODS["dipe"], tdrs=METHODS["tdrs"]).eval()
    together.peft_models[-1].base_model.disable_adapter_layers()
    for layer in model.modules():
        if isinstance(layer, VisualTunerLayer) and layer.active_adapters != ["tdrs"]:
            layer.enable_adapters(True)  # PEFT has disabled those of every type
        elif hasattr(layer, "lora_A"):
            layer.enable_adapters(True)
            layer.requires_grad_(False)
    yield model


STATES = {"plain": plain_model, "everything": with_everything}


@pytest.mark.parametrize("adapters", STATES)
@pytest.mark.parametrize("training", [False, True])
def test_a_probe_leaves_no_trace(plain: TinyVLM, adapters: str, training: bool, probed):
    name = next(name for name, family in FAMILIES.items() if family is plain)
    with STATES[adapters](plain.build()) as model:
        inputs = plain.prompt(model, "t4 i t5")
        alone = model(**inputs).logits
        model.train(training)
        before = state(model)
        probed(model, name)
        assert_same(state(model), before)
        assert torch.equal(model.eval()(**inputs).logits, alone)


@pytest.mark.parametrize("adapters", STATES)
def test_nor_does_one_that_fails(plain: TinyVLM, adapters: str, probed, monkeypatch: pytest.MonkeyPatch):
    name = next(name for name, family in FAMILIES.items() if family is plain)
    with STATES[adapters](plain.build()) as model:
        model(**plain.prompt(model, "t4 i t5"))  # transformers marks its modules in the first forward
        before = state(model)

        def fail(observer, call):
            raise RuntimeError("planted")

        monkeypatch.setattr(AttentionObserver, "__call__", fail)
        with pytest.raises(RuntimeError, match="planted"):
            probed(model, name)
        assert_same(state(model), before)


def test_a_conversation_goes_on_after_a_probe(probed):
    """Qwen's models keep on themselves by how much the positions of an answer are shifted."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()

    def answer(interrupted: bool) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**family.prompt(model, "t4 i t3"), use_cache=True)[CACHE]
            if interrupted:
                probed(model, "qwen3_vl", "t3 i t2 i t4")
            return model(torch.tensor([[20]]), **{CACHE: cache}).logits

    assert torch.equal(answer(interrupted=True), answer(interrupted=False))


def test_the_full_forward_predicts_what_was_generated(family: TinyVLM):
    """Prompt and answer in one forward give, to rounding, the logits that `generate` chose from."""
    model = METHODS["pvm"].attach(family.build()).get_base_model()
    inputs = family.prompt(model, "t4 i t5")
    generated = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    length = inputs["input_ids"].shape[1]
    token_ids = generated.sequences[0, length:].tolist()
    whole = extended(model, inputs, token_ids[:-1])
    with torch.no_grad():
        logits = model(**whole, logits_to_keep=5).logits[0]
    chosen_from = torch.cat(generated.logits)
    # What a model took for an image without features, the full forward may not.
    until = next((i for i, token_id in enumerate(token_ids) if token_id >= 300), 5) + 1
    assert (logits - chosen_from)[:until].abs().max() < TOLERANCE
    assert until > 1


def test_divergence_is_that_of_the_predictions(probed):
    model = METHODS["pvm"].attach(FAMILIES["llava"].build())
    base = model.get_base_model()
    result = probed(model)
    whole = extended(base, FAMILIES["llava"].prompt(base, "t4 i t5"), result.token_ids[:-1])
    with torch.no_grad():
        on = model(**whole).logits[0, -NUM_TOKENS:].double().log_softmax(-1)
        with model.disable_adapter():
            off = model(**whole).logits[0, -NUM_TOKENS:].double().log_softmax(-1)
    expected = (on.exp() * (on - off)).sum(-1)
    assert min(expected) > 1e-3
    together = next(forward for forward in result.forwards if forward.name == "adapters")
    assert together.kl_to_base == pytest.approx(expected.tolist(), rel=1e-3)
    assert result.base.kl_to_base == [0] * NUM_TOKENS
    assert [adapter.kl_alone for adapter in result.adapters] == [together.kl_to_base]


def test_what_the_base_would_say(probed):
    """By itself, and in the place of each token that the model with adapters wrote."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    base = model.get_base_model()
    inputs = family.prompt(base, "t4 i t5")
    result = probed(model, decode=lambda token_id: f"<{token_id}>")
    with torch.no_grad(), model.disable_adapter():
        arguments = dict(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        alone = base.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()
        logits = base(**extended(base, inputs, result.token_ids[:-1])).logits[0, -NUM_TOKENS:]
    assert result.base_token_ids == alone != result.token_ids
    assert result.base_tokens == [f"<{token_id}>" for token_id in alone]
    assert result.base.choice_ids == logits.argmax(-1).tolist()
    assert result.base.choices == [f"<{token_id}>" for token_id in result.base.choice_ids]
    changed = [chosen != written for chosen, written in zip(result.base.choice_ids, result.token_ids)]
    assert 1 - result.base.agreement == pytest.approx(sum(changed) / NUM_TOKENS)


def test_maps_add_up_to_the_attention_on_the_image(result):
    for forward in result.forwards:
        assert list(forward.maps) == list(range(NUM_TOKENS)), "a short answer has a map for each token"
        assert [sum(weights) for weights in forward.maps.values()] == pytest.approx(forward.mean_mass, rel=1e-4)
        assert sum(forward.mean_map) == pytest.approx(sum(forward.mean_mass) / NUM_TOKENS, rel=1e-4)
    assert max(result.base.mean_map) > 1.01 * min(result.base.mean_map), "everywhere alike: nothing is tested"


def test_each_adapter_alone_is_the_model_with_it_alone(probed):
    """Also where they came by different ways and are of different types."""
    model = FAMILIES["llava"].build()
    with with_everything(model):
        result = probed(model)
        assert [(a.name, a.method, a.active) for a in result.adapters] == [
            ("lora", "LORA", True),
            ("second", "LORA", True),
            ("idle", "LORA", False),
            ("pvm", "PVM", True),
            ("dipe", "DIPE", True),
            ("tdrs", "TDRS", False),
        ]
        assert [forward.name for forward in result.forwards] == [
            "base", "adapters", "only lora", "only second", "only pvm", "only dipe",
        ]  # fmt: skip
        whole = extended(model, FAMILIES["llava"].prompt(model, "t4 i t5"), result.token_ids[:-1])
        lora_weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}

    # Alone on a fresh model.
    fresh = FAMILIES["llava"].build()
    with torch.no_grad():
        off = fresh(**whole).logits[0, -NUM_TOKENS:].double().log_softmax(-1)

    def expected(attached_model) -> list[float]:
        with torch.no_grad():
            on = attached_model(**whole).logits[0, -NUM_TOKENS:].double().log_softmax(-1)
        return (on.exp() * (on - off)).sum(-1).tolist()

    alone = {adapter.name: adapter.kl_alone for adapter in result.adapters}
    with attached(fresh, DIPEConfig(max_distance=0)):
        assert alone["dipe"] == pytest.approx(expected(fresh), rel=1e-3, abs=1e-7)
    assert alone["pvm"] == pytest.approx(
        expected(METHODS["pvm"].attach(FAMILIES["llava"].build(), "pvm")), rel=1e-3, abs=1e-7
    )
    with_lora = FAMILIES["llava"].build()
    with_lora.add_adapter(lora(with_lora), "lora")
    with_lora.load_state_dict(lora_weights, strict=False)
    assert alone["lora"] == pytest.approx(expected(with_lora), rel=1e-3, abs=1e-7)
    assert alone["idle"] is None


def test_only_begins_nothing_and_ends_everything():
    with with_everything(FAMILIES["llava"].build()) as model:
        before = state(model)
        acting = ["lora", "second", "pvm", "dipe"]
        assert acting_adapters(model) == acting
        for names in ([], ["pvm"], ["second", "dipe"], ["idle", "tdrs"]):
            with only(model, names):
                assert acting_adapters(model) == [name for name in acting if name in names]
            assert_same(state(model), before)


def test_modules_to_save_belong_to_their_adapter():
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, "t4 i t5")
    off = model(**inputs).logits
    model = get_peft_model(model, PVMConfig(r=32, modules_to_save=["lm_head"])).eval()
    base = model.get_base_model()
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.mul_(2)
    on = model(**inputs).logits
    assert not torch.equal(on, off)
    with only(base, []):
        assert torch.equal(base(**inputs).logits, off)
    assert torch.equal(base(**inputs).logits, on)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "glm4v", "llava_cohere"])
def test_lens_reads_every_layer_as_the_last(name: str, probed):
    model = FAMILIES[name].build()
    result = probed(model, name)
    whole = extended(model, FAMILIES[name].prompt(model, "t4 i t5"), result.token_ids[:-1])
    with torch.no_grad():
        output = model(**whole, output_hidden_states=True)
    text_model = find_vlm(model).text_model
    *earlier, last = output.hidden_states[1:]  # the first is the embeddings, the last comes out of the final norm
    with torch.no_grad():
        read = [model.lm_head(text_model.norm(hidden)) for hidden in earlier] + [model.lm_head(last)]
    predictions = [logits[0, -NUM_TOKENS:].double().log_softmax(-1) for logits in read]
    final = predictions[-1]
    assert len(result.base.lens) == len(predictions) == len(text_model.layers)
    for recorded, prediction in zip(result.base.lens, predictions):
        expected = (final.exp() * (final - prediction)).sum(-1)
        assert recorded == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert min(result.base.lens[0]) > 1e-3
    assert result.base.lens[-1] == [0] * NUM_TOKENS


def test_hidden_states_are_kept_as_they_were():
    """Qwen3-VL adds to what a layer gave in place: what the lens reads must not move with it."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    with torch.no_grad(), layers_observed(find_vlm(model), 3) as kept:
        model(**family.inputs(model, "t4 i t5"))
    assert [tensor.shape[1] for tensor in kept] == [3] * len(find_vlm(model).layers)


@pytest.mark.parametrize("name", ["llava", "gemma3", "llava_cohere"])
def test_updates_are_what_the_branch_added(name: str, probed):
    """The stream before the FFN, and what comes out of the FFN with and without the branch, by hooks of our own."""
    model = METHODS["pvm"].attach(FAMILIES[name].build())
    base = model.get_base_model()
    result = probed(model, name)
    whole = extended(base, FAMILIES[name].prompt(base, "t4 i t5"), result.token_ids[:-1])
    vlm = find_vlm(base)
    assert {branch.layer_idx for branch in result.branches} == set(base.peft_config["default"].layers_to_transform)
    for branch in result.branches:
        layer, seen = vlm.layers[branch.layer_idx], {}

        def keep(key, value, seen=seen):
            seen[key] = value.clone()

        ffn = getattr(layer, vlm.block.ffn_end)
        handles = [
            layer.register_forward_pre_hook(lambda module, args, keep=keep: keep("input", args[0])),
            layer.self_attn.register_forward_hook(
                lambda module, args, output, keep=keep: keep("attention", output[0])
            ),
            ffn.register_forward_hook(lambda module, args, output, keep=keep: keep("without", output), prepend=True),
            ffn.register_forward_hook(lambda module, args, output, keep=keep: keep("with", output)),
        ]
        if vlm.block.ffn_norm == "pre_feedforward_layernorm":  # what attention adds is normed first
            handles.append(
                layer.post_attention_layernorm.register_forward_hook(
                    lambda module, args, output, keep=keep: keep("attention", output)
                )
            )
        with torch.no_grad():
            base(**whole, use_cache=False)
        for handle in handles:
            handle.remove()
        update = (seen["with"] - seen["without"])[0, -NUM_TOKENS:]
        stream = (seen["input"] + seen["attention"])[0, -NUM_TOKENS:]
        expected = update.norm(dim=-1) / stream.norm(dim=-1)
        assert min(expected) > 1e-3
        assert branch.relative_update == pytest.approx(expected.tolist(), rel=1e-3)
        gate = layer.pvm.pvm_gate["default"].weight.item()
        assert branch.gate == pytest.approx(gate, rel=ROUNDING)


@pytest.mark.parametrize("visibility", ["causal", "sample"])
def test_retrieval_is_the_branchs_own_cross_attention(visibility: str, probed, monkeypatch: pytest.MonkeyPatch):
    """Queries, keys and mask as the branch hands them to its kernel; the softmax in plain loops."""
    model = METHODS["pvm"].attach(
        FAMILIES["llava"].build(attn_implementation="eager"), memory_visibility=visibility, layers_to_transform=[1]
    )
    base = model.get_base_model()
    conversation = "t4 i t5 i t2"
    result = probed(model, conversation=conversation, retrieval_tokens=list(range(NUM_TOKENS)))
    whole = extended(base, FAMILIES["llava"].prompt(base, conversation), result.token_ids[:-1])
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **kwargs):
        calls.append((query, key, attn_mask))
        return kernel(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    with torch.no_grad():
        base(**whole)
    ((query, key, mask),) = calls
    (branch,) = result.branches
    heads, num_visual = query.shape[1], key.shape[2]
    for token in range(NUM_TOKENS):
        mean = [0.0] * num_visual
        row = query.shape[2] - NUM_TOKENS + token
        for head in range(heads):
            keys = key[0, head * key.shape[1] // heads]
            scores = [float(query[0, head, row] @ each) / math.sqrt(query.shape[-1]) for each in keys]
            visible = [True] * num_visual if mask is None else mask[0, 0, row].tolist()
            powers = [math.exp(score) if sees else 0.0 for score, sees in zip(scores, visible)]
            mean = [have + power / sum(powers) / heads for have, power in zip(mean, powers)]
        assert branch.retrieval[token] == pytest.approx(mean, rel=1e-3)
        assert sum(branch.retrieval[token]) == pytest.approx(1, abs=1e-5)
    assert max(branch.retrieval[0]) > 1.5 / num_visual, "they look everywhere alike: nothing is tested"


@pytest.mark.parametrize("memory_source", ["embeddings", "hidden_states"])
def test_retrieval_of_every_token_adds_up(memory_source: str):
    """To 1 where the branch reads, and to 0 where it does not: image tokens, what stands before them, other rows."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), memory_source=memory_source, layers_to_transform=[1])
    base = model.get_base_model()
    inputs = family.inputs(base, "t4 i t3 i t6", "t7 i t5", "t9")
    sums = []

    def add_up(layer, args, output):
        sums.append(layer.pvm_branches["default"][0].retrieval(*args).sum(-1))
        assert torch.equal(output[..., 0] != 0, sums[-1][:, 0] > 0)

    base.get_submodule(find_vlm(base).layer_name(1)).pvm.register_forward_hook(add_up)
    with torch.no_grad():
        cache = base(**inputs, use_cache=True)[CACHE]
        base(
            torch.full((3, 1), 20),
            attention_mask=F.pad(inputs["attention_mask"], (0, 1), value=1),
            **{CACHE: cache},
        )
    visual = inputs["input_ids"] == base.config.image_token_id
    reads = (visual.cumsum(1) > 0) & ~visual
    assert torch.allclose(sums[0], reads.float().unsqueeze(1).expand_as(sums[0]), atol=1e-6)
    assert torch.allclose(sums[1].flatten(1), torch.tensor([[1.0], [1.0], [0.0]]).expand(3, sums[1].shape[1]))


def test_retrieval_is_causal():
    """What stands between two images reads the first alone."""
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build(), layers_to_transform=[1])
    base = model.get_base_model()
    inputs = family.inputs(base, "t4 i t3 i t6")
    kept = []
    layer = base.get_submodule(find_vlm(base).layer_name(1)).pvm
    layer.register_forward_hook(
        lambda layer, args, output: kept.append(layer.pvm_branches["default"][0].retrieval(*args))
    )
    with torch.no_grad():
        base(**inputs)
    (weights,) = kept
    assert weights.shape[2:] == (21, 8)
    between, after = weights[0, :, 8:11], weights[0, :, 15:]
    assert torch.equal(between[..., 4:], torch.zeros_like(between[..., 4:]))
    assert between[..., :4].min() > 0
    assert after.min() > 0


def test_default_retrieval_tokens_are_those_with_the_largest_updates(result):
    (size,) = {len(branch.relative_update) for branch in result.branches}
    mean = [sum(branch.relative_update[token] for branch in result.branches) for token in range(size)]
    assert result.retrieval_tokens == sorted(sorted(range(size), key=mean.__getitem__)[-6:])


def test_every_number_is_rounded(result):
    """So that what is drawn is what is saved."""

    def walk(content) -> int:
        if isinstance(content, dict | list):
            return sum(walk(value) for value in (content.values() if isinstance(content, dict) else content))
        assert not isinstance(content, float) or content == float(f"{content:.6g}")
        return int(isinstance(content, float))

    assert walk(json.loads(result.to_json())) > 100


def test_linear_attention_is_left_out_and_said_so(probed):
    result = probed(FAMILIES["qwen3_5"].build(), "qwen3_5")
    assert result.unobserved_layers == [0]
    assert [layer.layer_idx for layer in result.base.attention] == [1, 2, 3]


def test_grids_of_images(probed):
    one = probed(FAMILIES["qwen3_vl"].build(), "qwen3_vl")
    assert (one.num_visual_tokens, one.grids) == (4, [(2, 2)])
    two = probed(FAMILIES["qwen3_vl"].build(), "qwen3_vl", "t2 i t3 i t4")
    assert (two.num_visual_tokens, two.grids) == (8, [(2, 2), (2, 2)])
    llava = FAMILIES["llava"].build()
    assert probed(llava, "llava").grids == [(2, 2)]
    assert probed(llava, "llava", "t2 i t3 i t4").grids == []
    assert probed(llava, "llava", "t2 i t3 i t4 i t1 i t5").grids == [], "sixteen tokens, but of four images"
    assert probed(FAMILIES["llava_next"].build(), "llava_next").grids == []
    assert probed(FAMILIES["qwen3_vl"].build(), "qwen3_vl", "t2 v t3").grids == []


def test_tokens_that_fill_no_square_have_no_grid():
    vlm = find_vlm(FAMILIES["llava"].build())
    pixels = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    assert visual_grids(vlm, pixels, 9) == [(3, 3)]
    assert visual_grids(vlm, pixels, 10) == []
    assert visual_grids(vlm, {"pixel_values": torch.zeros(1, 3, 28, 112)}, 16) == []
    assert visual_grids(vlm, {"pixel_values": torch.zeros(1, 16, 48)}, 16) == []


def test_a_method_that_multiplies_scores_comes_with_a_warning(probed):
    """It names the layers that the adapter acts on, and the base's share there."""
    model = FAMILIES["llava"].build()
    with attached(model, VAFConfig(layers_to_transform=[0, 2])), pytest.warns(match="multiplies scores") as caught:
        found = probed(model)
    shares = {layer.layer_idx: layer.share_below_zero for layer in found.base.attention}
    assert all(0 < share < 1 for share in shares.values())
    said = str(next(warning.message for warning in caught if "multiplies scores" in str(warning.message)))
    assert said.endswith(f"so many are below 0: layer 0 {shares[0]:.0%}, layer 2 {shares[2]:.0%}.")
    with attached(model, PAIConfig()), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*multiplies scores")
        probed(model)


def test_without_adapters_there_is_the_base_alone(probed):
    result = probed(FAMILIES["llava"].build())
    assert [forward.name for forward in result.forwards] == ["base"]
    assert result.base.agreement == 1
    assert result.adapters == result.branches == []


def test_what_cannot_be_probed_is_refused(probed):
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].prompt(model, "t4 i t5")
    with pytest.raises(ValueError, match=r"input_ids of shape \(1, seq_len\); got \(2, 13\)"):
        probe(model, {**inputs, "input_ids": inputs["input_ids"].repeat(2, 1)})
    with pytest.raises(ValueError, match="no image"):
        probe(model, FAMILIES["llava"].prompt(model, "t9"))
    with pytest.raises(ValueError, match="no image"):
        probe(model, {name: value for name, value in inputs.items() if name != "pixel_values"})
    for name, value in (("max_new_tokens", 0), ("sink_factor", 0.0), ("sink_factor", math.nan), ("sink_share", 1.5)):
        with pytest.raises(ValueError, match=name):
            probe(model, inputs, **{name: value})
    with pytest.raises(ValueError, match=r"retrieval_tokens names \[8\]"):
        probed(model, retrieval_tokens=[0, 8])
    merged = get_peft_model(copy.deepcopy(model), lora(model))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        probed(merged)
    attention = find_vlm(model).layers[1].self_attn
    attention.sinks = 4
    with pytest.raises(ValueError, match="attention sinks"):
        probed(model)


def test_prompt_learning_is_refused(probed):
    model = FAMILIES["llava"].build()
    tokens = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=3)
    tokens.num_attention_heads = 4
    with pytest.raises(NotImplementedError, match="tokens of its own"):
        probed(get_peft_model(model, tokens))


def test_progress_counts_tokens_and_forwards(probed):
    steps: list[tuple[str, int, int]] = []
    model = FAMILIES["llava"].build()
    with attached(model, PVMConfig(r=32), DIPEConfig(max_distance=0)):
        give_weight(model)
        probed(model, progress=lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "generating"] == [
        ("generating", count, NUM_TOKENS) for count in [*range(NUM_TOKENS + 1), NUM_TOKENS]
    ] * 2, "with the adapters and without"
    assert [step[1:] for step in steps if step[0] != "generating"] == [(done, 4) for done in range(5)]

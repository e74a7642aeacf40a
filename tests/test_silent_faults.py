"""No model is wrong in silence: one that is not built as adapters take for granted is refused for its true reason."""

from __future__ import annotations

from unittest import mock

import pytest
import tiny_vlms
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from forwards import TOLERANCE, difference, in_dtype, logits
from methods_under_test import METHODS
from peft import get_peft_model
from transformers import PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from peft_pvm import DIPEConfig, LogBiasConfig, PAIConfig, TDRSConfig, VAFConfig


BATCH = ("t4 i t3 i t6", "t7 i t5", "t9")
STEERING = {
    "dipe": DIPEConfig(max_distance=0),
    "tdrs": TDRSConfig(),
    "vaf": VAFConfig(),
    "log_bias": LogBiasConfig(),
    "pai": PAIConfig(alpha=1.0),
}


# ---- the base sees its own kernel's name


class AsksForTheKernelsName(LlamaAttention):
    """Computes something else on a kernel that it does not know, as models with block-sparse masks do."""

    def forward(self, hidden_states, *args, **kwargs):
        kernel = self.config._attn_implementation
        known = kernel in ("eager", "sdpa") and kernel == "sdpa" and kernel != "eager" and f"{kernel}" == "sdpa"
        return super().forward(hidden_states if known else 2 * hidden_states, *args, **kwargs)


def _changed(attention_cls: type) -> torch.nn.Module:
    model = tiny_vlms.FAMILIES["llava"].build()
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = attention_cls
    return model.requires_grad_(False)


@pytest.mark.parametrize("config", STEERING.values(), ids=STEERING)
def test_the_base_sees_its_kernels_name(config):
    model = _changed(AsksForTheKernelsName)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH)
    base = logits(model, inputs)
    attached = get_peft_model(model, config)
    assert difference(logits(attached, inputs), base) > 100 * TOLERANCE
    with attached.disable_adapter():
        assert torch.equal(logits(attached, inputs), base)


class AsksASet(LlamaAttention):
    """Looks the kernel's name up in a table of its own, in which no name of a steered kernel is."""

    def forward(self, hidden_states, *args, **kwargs):
        known = self.config._attn_implementation in {"eager", "sdpa"}
        return super().forward(hidden_states if known else 2 * hidden_states, *args, **kwargs)


class AsksForTheConfigsClass(LlamaAttention):
    """Computes something else with a config of another class."""

    def forward(self, hidden_states, *args, **kwargs):
        known = isinstance(self.config, PreTrainedConfig)
        return super().forward(hidden_states if known else 2 * hidden_states, *args, **kwargs)


@pytest.mark.parametrize("config", STEERING.values(), ids=STEERING)
@pytest.mark.parametrize("attention_cls", [AsksASet, AsksForTheConfigsClass])
@pytest.mark.parametrize("training", [False, True])
def test_a_base_that_an_adapter_changes_when_it_is_off_is_noticed(attention_cls, config, training):
    """With dropout in training, too."""
    model = _changed(LlamaAttention).train(training)
    layer = model.model.language_model.layers[1]
    layer.self_attn.attention_dropout = 0.5
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH)
    model(**inputs)
    attached = get_peft_model(model, config).train(training)
    attached(**inputs)
    attached = get_peft_model(attached.unload(), config).train(training)
    layer.self_attn.__class__ = attention_cls
    with pytest.raises(NotImplementedError, match=rf"{attention_cls.__name__} \(decoder layer 1\) computes something"):
        attached(**inputs)


class NothingSeenIsNothing(LlamaAttention):
    """Its kernel makes NaN of a row that sees no key, as some do."""

    def forward(self, hidden_states, *args, attention_mask, **kwargs):
        output, weights = super().forward(hidden_states, *args, attention_mask=attention_mask, **kwargs)
        sees = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        return output.masked_fill(~sees.any(-1)[:, 0, :, None], torch.nan), weights


@pytest.mark.parametrize("config", STEERING.values(), ids=STEERING)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("attention_cls", [LlamaAttention, NothingSeenIsNothing])
def test_padding_behind_a_row_is_no_fault(config, attention_cls, kernel):
    model = _changed(attention_cls)
    model.set_attn_implementation(kernel)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, "t2 i t1", "t7 i t9")
    inputs["input_ids"][0], inputs["attention_mask"][0] = (
        tensor[0].roll(-int((inputs["attention_mask"][0] == 0).sum()))
        for tensor in (inputs["input_ids"], inputs["attention_mask"])
    )
    assert inputs["attention_mask"][0, -4:].sum() == 0
    assert logits(get_peft_model(model, config), inputs).isfinite()[1].all()


# ---- the rotation is the last thing done to queries and keys, by the rotary embedding that adapters take


class NormsAfterwards(LlamaAttention):
    """Its keys pass a norm with weights after their rotation."""

    def forward(self, hidden_states, position_embeddings, *args, **kwargs):
        weights = torch.linspace(1, 1.5, self.head_dim)
        cosines, sines = position_embeddings
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", _scaled_by(weights)):
            return super().forward(hidden_states, (cosines, sines), *args, **kwargs)


def _scaled_by(weights):
    def apply(query, key, *tables):
        query, key = APPLY(query, key, *tables)
        return query, key * weights.to(key.dtype)

    return apply


class AnotherRotation(LlamaAttention):
    """Rotates by half of what it is given."""

    def forward(self, hidden_states, position_embeddings, *args, **kwargs):
        angles = torch.atan2(*reversed(position_embeddings)) / 2
        return super().forward(hidden_states, (angles.cos(), angles.sin()), *args, **kwargs)


APPLY = modeling_llama.apply_rotary_pos_emb
ROTATING = {name: config for name, config in STEERING.items() if config.rotates}


@pytest.mark.parametrize("config", ROTATING.values(), ids=ROTATING)
@pytest.mark.parametrize("attention_cls", [NormsAfterwards, AnotherRotation])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_after_the_rotation_is_noticed(attention_cls, config, dtype):
    model = _changed(attention_cls).to(dtype)
    inputs = in_dtype(tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH), dtype)
    attached = get_peft_model(model, config)
    for _ in range(2):  # it is not checked once only, if it fails
        with pytest.raises(NotImplementedError, match=rf"{attention_cls.__name__} \(decoder layer 0\) changes"):
            logits(attached, inputs)
    with attached.disable_adapter():
        assert logits(attached, inputs).isfinite().all()


@pytest.mark.parametrize("config", ROTATING.values(), ids=ROTATING)
def test_another_rotary_embedding_is_noticed(config):
    """Of the last layer, which alone is given other rotations."""
    model = tiny_vlms.FAMILIES["llava"].build()
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH)

    def replace(module, args, kwargs):
        cosines, sines = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cosines, -sines)}

    model.model.language_model.layers[2].register_forward_pre_hook(replace, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=r"\(decoder layer 2\) is given other rotations"):
        logits(get_peft_model(model, config), inputs)


class RotatedFirst(DeepseekV3Attention):
    """Its keys begin with the channels that are rotated."""

    def expand_kv(self, *latents):
        keys, values = super().expand_kv(*latents)
        return keys.roll(self.qk_rope_head_dim, -1), values


@pytest.mark.parametrize("config", ROTATING.values(), ids=ROTATING)
def test_other_channels_of_latent_attention_are_noticed(config):
    family = ARCHITECTURES["llava/deepseek_v3"].tiny
    model = family.build()
    model.model.language_model.layers[1].self_attn.__class__ = RotatedFirst
    with pytest.raises(NotImplementedError, match=r"RotatedFirst \(decoder layer 1\) changes"):
        logits(get_peft_model(model, config), family.inputs(model, *BATCH))


EAGER = modeling_llama.eager_attention_forward


def with_something_more(*args, **kwargs):
    """Eager attention that does not spend all weight on values, as with attention sinks that are the module's own."""
    output, weights = EAGER(*args, **kwargs)
    return 0.9 * output, weights


@pytest.mark.parametrize("config", STEERING.values(), ids=STEERING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_kernel_is_noticed(config, dtype, monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", with_something_more)
    model = tiny_vlms.FAMILIES["llava"].build().to(dtype)
    model.set_attn_implementation("eager")
    inputs = in_dtype(tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH), dtype)
    attached = get_peft_model(model, config)
    for _ in range(2):  # it is not checked once only, if it fails
        with pytest.raises(
            NotImplementedError, match=r"LlamaAttention \(decoder layer 0\) computes attention from more"
        ):
            logits(attached, inputs)
    with attached.disable_adapter():
        assert logits(attached, inputs).isfinite().all()


class Inherits(LlamaAttention):
    """Of a module that has an eager kernel too, which the inherited `forward` does not call."""


@pytest.mark.parametrize("config", STEERING.values(), ids=STEERING)
def test_the_kernel_is_that_of_whoever_calls_it(config, monkeypatch):
    monkeypatch.setitem(globals(), "eager_attention_forward", with_something_more)
    model = _changed(Inherits)
    model.set_attn_implementation("eager")
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH)
    base = logits(model, inputs)
    attached = get_peft_model(model, config)
    assert logits(attached, inputs).isfinite().all()
    with attached.disable_adapter():
        assert torch.equal(logits(attached, inputs), base)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernels_rounding_is_no_fault(dtype, kernel):
    """In half precision, large scores as trained models have them are rounded by more than a weight."""
    family = tiny_vlms.FAMILIES["llava"]
    model = family.build(attn_implementation=kernel).to(dtype)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 200
    inputs = in_dtype(family.inputs(model, "t40 i t30 i t60", "t7 i t50", "t90"), dtype)
    assert logits(get_peft_model(model, VAFConfig()), inputs).isfinite().all()


@pytest.mark.parametrize("config", [VAFConfig(), LogBiasConfig()], ids=["vaf", "log_bias"])
def test_what_does_not_rotate_does_not_ask(config):
    model = _changed(NormsAfterwards)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(model, *BATCH)
    assert logits(get_peft_model(model, config), inputs).isfinite().all()


@pytest.mark.parametrize("config", ROTATING.values(), ids=ROTATING)
def test_modules_are_checked_once(config):
    family = tiny_vlms.FAMILIES["qwen3_vl"]
    model = get_peft_model(family.build(), config)
    attention = model.get_base_model().model.language_model.layers[1].self_attn
    assert len(attention._forward_pre_hooks) == 1
    with model.disable_adapter():
        logits(model, family.inputs(model.get_base_model(), *BATCH))
    assert len(attention._forward_pre_hooks) == 1, "nothing was checked while the adapter was off"
    logits(model, family.inputs(model.get_base_model(), *BATCH))
    assert not attention._forward_pre_hooks
    model.add_adapter("second", config)
    assert not attention._forward_pre_hooks


# ---- the branch reads the stream that the layer adds to


class Changed(LlamaDecoderLayer):
    """Llama's layer, whose FFN may be scaled, gated or normed before it is added."""

    def forward(self, hidden_states, *args, **kwargs):
        after = hidden_states + self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)[0]
        return self.joined(after)


class Scaled(Changed):
    def joined(self, after):
        return after + 0.5 * self.mlp(self.post_attention_layernorm(after))


class Gated(Changed):
    def joined(self, after):
        return after * 0.7 + self.mlp(self.post_attention_layernorm(after))


class NormedTwice(Changed):
    def joined(self, after):
        return after + F.rms_norm(self.mlp(self.post_attention_layernorm(after)), after.shape[-1:])


class Plain(Changed):
    """Right, whatever the whole is multiplied by."""

    def joined(self, after):
        return (after + self.mlp(self.post_attention_layernorm(after))) * 0.3


class GoesOn(Changed):
    """Right: another module reads the sum, as in Gemma 4 with inputs by layer."""

    def joined(self, after):
        total = after + self.mlp(self.post_attention_layernorm(after))
        return total + 0.1 * self.input_layernorm(total)


class NormLast(Changed):
    """The norm before the FFN comes after it."""

    def joined(self, after):
        return after + self.post_attention_layernorm(self.mlp(after))


class DropsOut(Changed):
    """Right, with dropout of what is added; wrong, where that is scaled as well."""

    dropout, scale = 0.5, 1.0

    def joined(self, after):
        rate = self.dropout if isinstance(self.dropout, float) else self.dropout.p
        update = self.mlp(self.post_attention_layernorm(after))
        return after + self.scale * F.dropout(update, rate, self.training)


class DropsOutByModule(DropsOut):
    dropout = torch.nn.Dropout(0.5)


def _with_layer(layer_cls: type, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = tiny_vlms.FAMILIES["llava"].build()
    for layer in model.model.language_model.layers:
        layer.__class__ = layer_cls
    return METHODS["pvm"].attach(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_cls", [Scaled, Gated, NormedTwice])
def test_what_is_not_a_sum_is_noticed(layer_cls, dtype):
    attached = _with_layer(layer_cls, dtype)
    inputs = in_dtype(tiny_vlms.FAMILIES["llava"].inputs(attached.get_base_model(), *BATCH), dtype)
    for _ in range(2):  # it is not checked once only, if it fails
        with pytest.raises(NotImplementedError, match=rf"^{layer_cls.__name__} does not return the sum"):
            logits(attached, inputs)
    with attached.disable_adapter():
        assert logits(attached, inputs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_cls", [Plain, GoesOn])
def test_a_sum_that_is_scaled_as_a_whole_or_read_is_one(layer_cls, dtype):
    attached = _with_layer(layer_cls, dtype)
    inputs = in_dtype(tiny_vlms.FAMILIES["llava"].inputs(attached.get_base_model(), *BATCH), dtype)
    assert logits(attached, inputs).isfinite().all()


@pytest.mark.parametrize("layer_cls", [DropsOut, DropsOutByModule])
def test_with_dropout_layers_are_checked_in_evaluation(layer_cls):
    attached = _with_layer(layer_cls)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(attached.get_base_model(), *BATCH)
    assert logits(attached.train(), inputs).isfinite().all()
    attached = _with_layer(type("Wrong", (layer_cls,), {"scale": 0.5}))
    assert logits(attached.train(), inputs).isfinite().all()
    with pytest.raises(NotImplementedError, match=r"^Wrong does not return the sum"):
        logits(attached.eval(), inputs)


def test_another_order_is_noticed():
    """Nor does a stream of an earlier forward take the place of one that comes too late."""
    attached = _with_layer(NormLast)
    inputs = tiny_vlms.FAMILIES["llava"].inputs(attached.get_base_model(), *BATCH)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"PVM did not act in decoder layers.*or not in the order"):
            logits(attached, inputs)


def test_layers_are_checked_once():
    family = tiny_vlms.FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    layer = model.get_base_model().model.language_model.layers[1]
    with model.disable_adapter():
        logits(model, family.inputs(model.get_base_model(), *BATCH))
    assert layer._forward_hooks, "nothing was checked while the adapter was off"
    logits(model, family.inputs(model.get_base_model(), *BATCH))
    assert not layer._forward_hooks
    model.add_adapter("second", METHODS["pvm"].config())
    assert not layer._forward_hooks


# ---- visual embeddings are there


@pytest.mark.parametrize("source", ["embeddings", "hidden_states"])
def test_a_memory_of_zeros_is_noticed(source):
    family = tiny_vlms.FAMILIES["llava"]
    attached = METHODS["pvm"].attach(family.build(), memory_source=source)
    base = attached.get_base_model()

    projector = base.model.multi_modal_projector
    projector.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    inputs = family.inputs(base, *BATCH)
    logits(attached, family.inputs(base, "t9"))
    if source == "hidden_states":
        assert logits(attached, inputs).isfinite().all()
        return
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"LlavaForCond.*memory_source='hidden_states'"):
            logits(attached, inputs)
    with attached.disable_adapter():
        assert logits(attached, inputs).isfinite().all()

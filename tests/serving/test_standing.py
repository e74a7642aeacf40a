"""What our classes stand on in vLLM is checked before they do.

It needs vLLM beside a torch for the CPU: `make test-vllm`.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm brings it")

from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend

from peft_pvm.integrations.vllm.choices import SWITCH
from peft_pvm.integrations.vllm.families import FAMILIES
from peft_pvm.integrations.vllm.standing import (
    refuse_other_layer,
    refuse_other_lora,
    refuse_other_model,
    refuse_other_text_model,
    refuse_what_breaks,
    warn_of_other_version,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_parallel_size": 2}, "tensor parallelism only"),
        ({"decode_context_parallel_size": 2}, "tensor parallelism only"),
        ({"prefill_context_parallel_size": 2}, "tensor parallelism only"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"is_pruned": True}, "pruning of videos"),
    ],
)
def test_what_was_not_made_to_work_is_refused(change: dict, message: str):
    def config(**changes) -> SimpleNamespace:
        multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: changes.get("is_pruned", False))
        sizes = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
        return SimpleNamespace(
            parallel_config=SimpleNamespace(**{size: changes.get(size, 1) for size in sizes}),
            speculative_config=changes.get("speculative_config"),
            use_v2_model_runner=changes.get("use_v2_model_runner", False),
            model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        )

    refuse_what_breaks(config(), has_anchors=True)
    with pytest.raises(NotImplementedError, match=message):
        refuse_what_breaks(config(**change), has_anchors=True)
    refuse_what_breaks(config(use_v2_model_runner=True), has_anchors=False)


def test_a_version_that_nobody_compared_is_named(monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_version()
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    with pytest.warns(UserWarning, match=r"tested with vLLM 0\.32\. and 0\.33\., but this is 0\.34\.0"):
        warn_of_other_version()


class Model:
    """As vLLM's that count tokens."""

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs): ...


class SelfAttention(nn.Module):
    """As vLLM's."""

    head_dim = num_heads = num_kv_heads = scaling = 1

    def __init__(self):
        super().__init__()
        self.rotary_emb = nn.Identity()
        self.attn = Attention.__new__(Attention)
        nn.Module.__init__(self.attn)
        self.attn.layer_name, self.attn.head_size, self.attn.sliding_window = "", 1, None
        self.attn.attn_backend = AttentionBackend

    def forward(self, positions, hidden_states, **kwargs): ...


class Layer(nn.Module):
    """As vLLM's."""

    def __init__(self):
        super().__init__()
        self.self_attn = SelfAttention()

    def forward(self, positions, hidden_states, residual, **kwargs): ...


def test_another_model_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    counts, makes = FAMILIES["gemma3"], FAMILIES["qwen3_vl"]
    refuse_other_model(Model, counts)
    with pytest.raises(
        NotImplementedError, match=r"test_standing\.Model makes the positions of a prompt\. In this one"
    ):
        refuse_other_model(Model, makes)
    with monkeypatch.context() as other:
        other.setattr(Model, "supports_mrope", True, raising=False)
        other.setattr(Model, "get_mrope_input_positions", lambda self, input_tokens: None, raising=False)
        with pytest.raises(NotImplementedError, match="takes input_tokens, mm_features"):
            refuse_other_model(Model, makes)
        other.setattr(Model, "get_mrope_input_positions", lambda self, input_tokens, mm_features, grid: None)
        with pytest.raises(NotImplementedError, match="takes input_tokens, mm_features and wants nothing else"):
            refuse_other_model(Model, makes)
        other.setattr(Model, "get_mrope_input_positions", lambda self, input_tokens, mm_features, grid=None: None)
        refuse_other_model(Model, makes)
    with monkeypatch.context() as other:
        other.setattr(Model, "forward", lambda self, positions, input_ids: None)
        with pytest.raises(
            NotImplementedError, match="takes input_ids, positions, intermediate_tensors, inputs_embeds"
        ):
            refuse_other_model(Model, counts)
    monkeypatch.setattr("peft_pvm.integrations.vllm.standing.CALLED", {Attention.forward: ("query", "value", "key")})
    with pytest.raises(NotImplementedError, match=r"Attention\.forward takes query, value, key"):
        refuse_other_model(Model, counts)


def test_another_decoder_layer_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    refuse_other_layer(Layer(), attends=True)
    with monkeypatch.context() as other:
        other.setattr(Layer, "forward", lambda self, hidden_states, residual, positions: None)
        refuse_other_layer(Layer(), attends=True)  # we name what we hand on
        other.setattr(Layer, "forward", lambda self, hidden_states, positions: None)
        with pytest.raises(NotImplementedError, match="takes positions, hidden_states, residual"):
            refuse_other_layer(Layer(), attends=False)
    with monkeypatch.context() as other:
        other.delattr(SelfAttention, "scaling")
        with pytest.raises(NotImplementedError, match=r"test_standing\.SelfAttention has scaling"):
            refuse_other_layer(Layer(), attends=True)
    layer = Layer()
    layer.self_attn.attn = nn.Identity()
    with pytest.raises(NotImplementedError, match="attends by Attention"):
        refuse_other_layer(layer, attends=True)


def test_a_model_for_which_vllm_has_no_lora_takes_choices_alone():
    def asked(*target_modules: str) -> SimpleNamespace:
        return SimpleNamespace(lora_config=SimpleNamespace(target_modules=list(target_modules) or None, max_loras=4))

    pvm = {"pvm": False}
    refuse_other_lora(SimpleNamespace(lora_config=None), Model, None, {})
    refuse_other_lora(asked(SWITCH), Model, SWITCH, pvm)
    with pytest.raises(NotImplementedError, match="pvm hold a LoRA, of which vLLM would leave out"):
        refuse_other_lora(asked(SWITCH), Model, SWITCH, {"pvm": True, "dipe": False})
    for config, choices in ((asked(), pvm), (asked(SWITCH, "q_proj"), pvm), (asked(SWITCH), {})):
        with pytest.raises(NotImplementedError, match="vLLM has no LoRA for Model"):
            refuse_other_lora(config, Model, SWITCH if choices else None, choices)


def test_a_cache_that_would_mix_choices_is_refused(monkeypatch: pytest.MonkeyPatch):
    config = SimpleNamespace(lora_config=SimpleNamespace(target_modules=[SWITCH], max_loras=4))

    def by_name_of_none(request):
        return [("lora", bool(request.lora_request))]

    monkeypatch.setattr("vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys", by_name_of_none)
    with pytest.raises(NotImplementedError, match="by_name_of_none makes other keys for other LoRAs"):
        refuse_other_lora(config, Model, SWITCH, {"pvm": False, "dipe": False})


def test_a_place_for_no_lora_stays_empty_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    class WithLora(Model):
        supports_lora = True
        packed_modules_mapping: ClassVar[dict] = {}
        embedding_modules: ClassVar[dict] = {}

    def asked(max_loras: int) -> SimpleNamespace:
        return SimpleNamespace(lora_config=SimpleNamespace(target_modules=None, max_loras=max_loras))

    two = {"pvm": False, "dipe": False}
    refuse_other_lora(asked(2), WithLora, None, {})
    refuse_other_lora(asked(3), WithLora, SWITCH, two)
    for max_loras, switch, choices in ((1, None, {}), (2, SWITCH, two)):
        with pytest.raises(NotImplementedError, match=f"start it with --max-loras {max_loras + 1} or more"):
            refuse_other_lora(asked(max_loras), WithLora, switch, choices)
    monkeypatch.setattr("peft_pvm.integrations.vllm.standing.current_platform", SimpleNamespace(is_cpu=lambda: False))
    refuse_other_lora(asked(1), WithLora, None, {})


def test_a_text_model_that_was_not_taken_is_refused():
    built = nn.Identity()
    model = SimpleNamespace(language_model=SimpleNamespace(model=built))
    with pytest.raises(NotImplementedError, match="Identity has embed_input_ids"):
        refuse_other_text_model(model, nn.Identity)
    built.embed_input_ids = nn.Identity()
    refuse_other_text_model(model, nn.Identity)
    with pytest.raises(NotImplementedError, match="builds its text model as Linear"):
        refuse_other_text_model(model, type("Ours", (nn.Linear,), {}))
    with pytest.raises(NotImplementedError, match="SimpleNamespace has language_model"):
        refuse_other_text_model(SimpleNamespace(), nn.Identity)

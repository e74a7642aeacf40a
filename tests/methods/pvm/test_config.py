"""Bad values are refused where they are given; the rest is what the paper says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftConfig
from transformers import LlamaConfig, Qwen3VLTextConfig

from peft_pvm import PVMConfig
from peft_pvm.methods.pvm.branch import fresh_weights
from peft_pvm.methods.pvm.config import WEIGHTS, BranchShape
from peft_pvm.methods.pvm.model import strided_layers
from peft_pvm.utils.text import LONGEST


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(r=0), "PVMConfig.r is 0, but must be an integer from 1 to 1048576"),
        (dict(r=2**40), "PVMConfig.r is 1099511627776, but must be an integer from 1 to 1048576"),
        (dict(r=51.2), "PVMConfig.r is 51.2"),
        (dict(r=True), "PVMConfig.r is True"),
        (dict(layers_to_transform="all"), "is 'all', but must be 'strided', 'auto' or a non-empty list"),
        (dict(layers_to_transform=[]), r"layers_to_transform is \[\]"),
        (dict(layers_to_transform=[-1]), r"layers_to_transform is \[-1\]"),
        (dict(layers_to_transform=[2, 2]), r"layers_to_transform is \[2, 2\], but must be a list without repetitions"),
        (dict(layers_to_transform=None), "layers_to_transform is None"),
        (dict(init_gate="zero"), "init_gate is 'zero', but must be a number that fits fp16"),
        (dict(memory_visibility="all"), r"memory_visibility is 'all', but must be one of \('causal', 'sample'\)"),
        (
            dict(memory_source="pixels"),
            r"memory_source is 'pixels', but must be one of \('embeddings', 'hidden_states'\)",
        ),
        (dict(init_gate=float("nan")), "init_gate is nan"),
        (dict(init_gate=1e308), "must be a number that fits fp16"),
        (dict(init_gate=10**400), "init_gate is 1000000"),
        (dict(init_gate=-65_505), "init_gate is -65505"),
        (dict(r=10**5000), "PVMConfig.r is "),
        (dict(layers_to_transform=[0] * 2_000_000), r"layers_to_transform is \[0, 0, "),
        (dict(layers_to_transform=[10**400]), "layers_to_transform is "),
        (dict(mlp_ratio=1e308), "mlp_ratio is 1e"),
        (dict(mlp_ratio=10**400), "mlp_ratio is 1000"),
        (dict(branches=[{}] * 1000), "None or a list of up to 64 dicts"),
        (dict(lineage="\x1b[31m<script>"), r"lineage is '\\x1b\[31m<script>', but must be a hash of 16 hexadecimal"),
        (dict(modules_to_save=[""]), r"modules_to_save is \[''\], but must be a list of module names"),
        (dict(modules_to_save=["x"] * 65), "but must be a list of module names"),
        (dict(base_model_name_or_path=[1]), r"base_model_name_or_path is \[1\], but must be a name or None"),
        (dict(base_model_name_or_path="a" * 10**8), "base_model_name_or_path is 'aaaa"),
        (dict(revision={"a": 1}), "revision is {'a': 1}, but must be a name"),
        (dict(task_type="t" * 10**6), "task_type is 'ttt"),
        (dict(inference_mode="yes"), "inference_mode is 'yes', but must be True or False"),
        (dict(auto_mapping={"a": [[[[]]]]}), "auto_mapping is "),
        (dict(format_version="9" * 10**6), "format_version is '999"),
        (dict(init_gate=True), "init_gate is True"),
        (dict(mlp_ratio=float("inf")), "mlp_ratio is inf"),
        (dict(init_weights="no"), "init_weights is 'no', but must be True or False"),
        (dict(modules_to_save="lm_head"), "modules_to_save is 'lm_head', but must be a list of module names"),
        (dict(mlp_ratio=0), "mlp_ratio is 0, but must be None or a number above 0"),
    ],
)
def test_bad_values(fields: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint) as refusal:
        PVMConfig(**fields)
    assert len(str(refusal.value)) <= LONGEST


def test_every_field_has_help():
    own = {field.name: field for field in dataclasses.fields(PVMConfig)}
    for name in own.keys() - {field.name for field in dataclasses.fields(PeftConfig)}:
        assert own[name].metadata["help"]
        assert f"        {name}: " in PVMConfig.__doc__


def test_one_layer_may_be_given_as_a_number():
    assert PVMConfig(layers_to_transform=3).layers_to_transform == [3]


def test_round_trip(tmp_path):
    config = PVMConfig(r=64, layers_to_transform=[1, 3], memory_visibility="sample", mlp_ratio=2.0)
    config.save_pretrained(tmp_path)
    assert PVMConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("text_config", "layers"),
    [
        (Qwen3VLTextConfig(num_hidden_layers=36, hidden_size=4096), [8, 16, 24]),  # 8B, arXiv 2605.00814
        (Qwen3VLTextConfig(num_hidden_layers=36, hidden_size=2560), [5, 11, 17]),  # 4B
        (LlamaConfig(num_hidden_layers=36), [8, 16, 24]),
        (LlamaConfig(num_hidden_layers=32), [7, 14, 21]),
        (LlamaConfig(num_hidden_layers=6), [1, 3, 4]),
        (LlamaConfig(num_hidden_layers=1), [0]),
    ],
)
def test_strided_layers(text_config, layers: list[int]):
    assert strided_layers(text_config) == layers


@pytest.mark.parametrize(
    ("r", "heads", "kv_heads", "branch_heads", "branch_kv_heads"),
    [(512, 32, 8, 4, 1), (2048, 32, 8, 16, 4), (1024, 32, 32, 8, 8), (768, 32, 8, 6, 1), (1280, 32, 8, 10, 2)],
)
def test_heads_follow_the_bases_grouping(r: int, heads: int, kv_heads: int, branch_heads: int, branch_kv_heads: int):
    text_config = LlamaConfig(hidden_size=4096, num_attention_heads=heads, num_key_value_heads=kv_heads)
    shape = BranchShape.of(PVMConfig(r=r), text_config)
    assert (shape.num_heads, shape.num_key_value_heads) == (branch_heads, branch_kv_heads)


def test_sizes_of_weights_are_those_of_the_modules():
    config, text_config = PVMConfig(r=512), LlamaConfig(hidden_size=1024, num_attention_heads=8, num_key_value_heads=2)
    shape = BranchShape.of(config, text_config)
    with torch.device("meta"):
        fresh = fresh_weights(config, shape)
    assert shape.weights() == {name: tuple(module.weight.shape) for name, module in fresh.items()}
    assert shape.weights().keys() == set(WEIGHTS)


@pytest.mark.parametrize(("base", "branch"), [("gelu", "gelu"), ("xielu", "silu")])
def test_activation_is_the_bases_unless_it_has_weights(base: str, branch: str):
    text_config = LlamaConfig(hidden_size=1024, num_attention_heads=8, hidden_act=base)
    assert BranchShape.of(PVMConfig(), text_config).hidden_act == branch


def test_mlp_width():
    text_config = Qwen3VLTextConfig(hidden_size=4096, intermediate_size=12288, num_attention_heads=32)
    assert BranchShape.of(PVMConfig(), text_config).intermediate_size == 1536
    assert BranchShape.of(PVMConfig(mlp_ratio=2), text_config).intermediate_size == 1024

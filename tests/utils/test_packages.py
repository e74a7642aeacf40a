"""The private names of other packages that are touched mean what we think, in the versions that are installed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from tiny_vlms import FAMILIES
from torch import nn

from peft_pvm import PVMConfig
from peft_pvm.utils import packages as internals


@pytest.fixture
def model() -> nn.Module:
    """With a LoRA and a PVM, each with a module of the base that is saved along."""
    base = FAMILIES["llava"].build()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), base, "lora")
    inject_adapter_in_model(PVMConfig(r=16, layers_to_transform=[1], modules_to_save=["lm_head"]), base, "pvm")
    return base


def test_which_adapters_a_layer_holds(model: nn.Module):
    kinds = {
        type(layer).__name__: internals.held_by(layer)
        for layer in internals.adapter_layers(model)
        if type(layer).__name__ in ("Linear", "PVMLayer", "ModulesToSaveWrapper")
    }
    assert kinds == {"Linear": {"lora"}, "PVMLayer": {"pvm"}, "ModulesToSaveWrapper": {"lora", "pvm"}}


def test_what_adapters_brought(model: nn.Module):
    base = FAMILIES["llava"].build().state_dict()
    parts = internals.adapter_parts(model)
    kept = {internals.base_name(key) for key in model.state_dict() if not key.startswith(parts)}
    assert kept == base.keys()
    assert [type(module) for module in internals.saved_along(model, "pvm").values()] == [ModulesToSaveWrapper]
    assert internals.saved_along(model, "other") == {}
    beside = [module for module in model.modules() if internals.is_tuner_child(module)]
    assert {type(module).__name__ for module in beside} == {"PVMLayer"}
    assert all(isinstance(module, BaseTunerLayer) for module in beside)


def test_whether_transformers_counts_adapters():
    model = FAMILIES["llava"].build()
    assert not internals.loads_adapters_itself(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert internals.loads_adapters_itself(model)
    internals.forget_adapters(model)
    assert not internals.loads_adapters_itself(model)
    assert not internals.loads_adapters_itself(
        get_peft_model(FAMILIES["llava"].build(), LoraConfig(target_modules=["q_proj"]))
    )


def test_which_arguments_go_to_the_hub():
    given = {"revision": "main", "token": "secret", "subfolder": "part", "return_unused_kwargs": True}
    assert internals.hub_arguments(given) == {"revision": "main", "token": "secret", "subfolder": "part"}
    assert given["return_unused_kwargs"]


def test_what_generate_does():
    model = FAMILIES["llava"].build()
    mask = torch.ones(1, 3, dtype=torch.long)
    assert internals.next_inputs(model, {"attention_mask": mask})["attention_mask"].shape == (1, 4)


def test_how_attention_is_computed():
    assert internals.attn_implementation(FAMILIES["llava"].build().config.text_config) == "sdpa"


def test_where_accelerate_runs_a_module():
    from accelerate import cpu_offload

    layer = nn.Linear(2, 2)
    assert internals.execution_device(layer) is None
    cpu_offload(nn.Sequential(layer), execution_device=torch.device("cpu"))
    assert internals.execution_device(layer) == torch.device("cpu")


def test_patterns_of_a_class():
    class Renamed(nn.Module):
        _checkpoint_conversion_mapping = {"^old": "new"}  # noqa: RUF012

    assert internals.conversion_of(Renamed()) == {"^old": "new"}
    assert internals.conversion_of(nn.Module()) is None


def test_the_source_of_a_configuration_is_no_field(tmp_path):
    PVMConfig().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert PVMConfig().source is None
    assert config.source.path == str(tmp_path)
    assert not {"source", "_source"} & config.to_dict().keys()


@pytest.mark.parametrize("heads", [4, 6])
def test_flex_attention_gives_the_sums_of_its_rows(heads: int):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, count, 5, 8, generator=generator) for count in (heads, 2, 2))
    with torch.compiler.set_stance("force_eager"):
        mask = internals.block_mask(lambda batch, head, query, key: key < query, 1, 5, key)
        output, sums = internals.flex_attention_with_sums(query, key, value, mask, 0.5)
    scores = query @ key.repeat_interleave(heads // 2, 1).transpose(2, 3) * 0.5
    scores = scores.masked_fill(~torch.ones(5, 5).tril(-1).bool(), -torch.inf)
    assert torch.allclose(sums, scores.logsumexp(-1), atol=1e-5)
    expected = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(heads // 2, 1)
    assert torch.allclose(output, expected, atol=1e-5)

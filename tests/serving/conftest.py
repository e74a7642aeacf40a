"""Adapters for the lab's tiny Qwen3-VL, as folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from methods_under_test import give_weight
from peft import LoraConfig, get_peft_model

from peft_pvm import DIPEConfig, LogBiasConfig, PVMConfig, VAFConfig
from peft_pvm.demo.tiny_vlm import load_tiny_vlm


SHIPPED = Path(__file__).parents[2] / "adapters"


def save_branches(folder: Path) -> Path:
    """A PVM adapter of two branches, of which one looks up hidden states."""
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=64, layers_to_transform=[1, 4]), "first")
    model.add_adapter("second", PVMConfig(r=32, layers_to_transform=[4, 5], memory_source="hidden_states"))
    give_weight(model)
    model.base_model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["both"])
    return folder / "both"


def save_lora(folder: Path) -> Path:
    """A LoRA on layers of the language model, which acts at once."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)",
        init_lora_weights=False,
    )
    get_peft_model(load_tiny_vlm(), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    DIPEConfig(layers_to_transform=[0, 2, 3], max_distance=3).save_pretrained(folder / "dipe-some-layers")
    VAFConfig(visual=1.6, before=0.6).save_pretrained(folder / "vaf")
    LogBiasConfig(t0=4.0).save_pretrained(folder / "log-bias")
    return {
        "pvm": SHIPPED / "pvm-tiny-vlm",
        "dipe": SHIPPED / "dipe",
        "t-drs": SHIPPED / "t-drs",
        "dipe-some-layers": folder / "dipe-some-layers",
        "branches": save_branches(folder),
        "vaf": folder / "vaf",
        "log-bias": folder / "log-bias",
        "lora": save_lora(folder / "lora"),
    }


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the processor that vLLM wants, which takes torchvision."""
    from served_models import save_base

    return save_base(tmp_path_factory.mktemp("base"))

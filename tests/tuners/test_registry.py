"""PEFT knows our types as its own, and loudly refuses to have two of one name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tiny_vlms import FAMILIES

import peft_pvm
from peft_pvm import PVMConfig, PVMModel
from peft_pvm.methods import METHODS
from peft_pvm.tuners.registry import extend_peft, register, with_cards


def test_is_a_real_member():
    assert PeftType("PVM") is PeftType.PVM is PeftType["PVM"]
    assert PeftType.PVM in list(PeftType)
    assert PeftType.PVM == "PVM"
    assert PeftType.PVM.value == PeftType.PVM.name == "PVM"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PVM] is PVMConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["PVM"] is PVMModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PVM] == "pvm_"


@pytest.mark.parametrize("config", [row.config() for row in METHODS], ids=[row.name for row in METHODS])
def test_mixed_models_are_refused(config: PeftConfig):
    """PEFT keeps its own list of what PeftMixedModel takes."""
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(FAMILIES["llava"].build(), config, mixed=True)


def test_registering_again_changes_nothing():
    members, loader = list(PeftType), PeftConfig.from_pretrained.__func__
    register(PVMConfig, PVMModel)
    extend_peft()
    assert list(PeftType) == members
    assert PeftConfig.from_pretrained.__func__ is loader


def test_a_taken_name_is_refused():
    class Taken(PVMConfig):
        method = "lora"

    with pytest.raises(RuntimeError, match="PEFT already has a method 'LORA'"):
        register(Taken, PVMModel)


def test_a_model_without_our_adapters_is_pushed_as_ever(tmp_path: Path):
    """What lies in its folder is nobody's business."""
    (tmp_path / "adapter_config.json").write_text("damaged")
    push = with_cards(lambda model, folder: sorted(path.name for path in folder.iterdir()))
    assert push(FAMILIES["llava"].build(), tmp_path) == ["adapter_config.json"]


def test_importing_registers_and_nothing_else():
    """But for PeftConfig.from_pretrained, which also remembers where a config came from."""
    script = (
        "import json, sys, peft, transformers\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = (sorted(peft.PeftType), sorted(functions.keys()), sorted(sys.modules))\n"
        "import peft_pvm\n"
        "after = (sorted(peft.PeftType), sorted(functions.keys()), sorted(sys.modules))\n"
        "print(json.dumps([[str(x) for x in set(b) - set(a)] for a, b in zip(before, after)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    types, functions, modules = json.loads(run.stdout)
    assert sorted(types) == sorted(f"PeftType.{row.config.method.upper()}" for row in METHODS)
    assert functions == []
    heavy = ("matplotlib", "sklearn", "rich", "trl", "datasets", "vllm", "peft_pvm.demo")
    assert not [name for name in modules if name.startswith(heavy)]


def test_public_names():
    assert set(peft_pvm.__all__) <= set(dir(peft_pvm))

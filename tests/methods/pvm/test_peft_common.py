"""PEFT's own test suite for tuners, run on PVMConfig.

The suite is not part of the installed package, so the source distribution of the installed version is fetched from the
package index, once, into pytest's cache.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from filelock import FileLock
from methods_under_test import METHODS
from tiny_vlms import FAMILIES
from transformers import Qwen3VLForConditionalGeneration

from peft_pvm import PVMConfig


APPLICABLE = (  # listed, because collecting tests must not download
    "_test_model_attr",
    "_test_adapter_name",
    "_test_prepare_for_training",
    "_test_load_model_low_cpu_mem_usage",
    "_test_save_pretrained",
    "_test_save_pretrained_selected_adapters",
    "_test_save_pretrained_adapter_name_substring",
    "_test_from_pretrained_config_construction",
    "_test_load_multiple_adapters",
    "_test_add_adapter_no_autocast_adapter_dtype",
    "_test_generate",
    "_test_generate_pos_args",
    "_test_generate_half_prec",
    "_test_training",
    "_test_inference_safetensors",
    "_test_training_layer_indexing",
    "_test_training_gradient_checkpointing",
    "_test_peft_model_device_map",
    "_test_delete_adapter",
    "_test_delete_inactive_adapter",
    "_test_delete_unknown_adapter_raises",
    "_test_unload_adapter",
    "_test_disable_adapter",
    "_test_lora_conversion",
    "_test_get_base_model_state_dict",
)
MERGING = "PVM computes what no weight of the base can express: merging raises NotImplementedError"
BY_ROW = "runs for the tuners that PEFT lists only (adapter_names is tested in test_adapters_by_row.py)"
NOT_APPLICABLE = {
    "_test_mixed_adapter_batches": BY_ROW,
    "_test_generate_with_mixed_adapter_batches_and_beam_search": BY_ROW,
    "_test_merge_layers": MERGING,
    "_test_merge_layers_fp16": MERGING,
    "_test_merge_layers_nan": MERGING,
    "_test_merge_layers_multi": MERGING,
    "_test_merge_layers_is_idempotent": MERGING,
    "_test_safe_merge": MERGING,
    "_test_passing_input_embeds_works": "with inputs_embeds, PVM asks for visual_mask (tested in test_generation.py)",
    "_test_training_prompt_learning_tasks": "for prompt learning only",
    "_test_weighted_combination_of_adapters": "for LoRA and IA3 only",
    "_test_weighted_combination_of_adapters_lora": "a helper of the suite, not a test",
    "_test_weighted_combination_of_adapters_ia3": "a helper of the suite, not a test",
    "_test_adding_multiple_adapters_with_bias_raises": "PVMConfig has no bias",
}
FURTHER_ARGUMENTS = {
    "_test_generate_pos_args": {"raises_err": False},
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
}
CONFIG = {"r": 32, "init_weights": False}


@pytest.fixture(scope="session")
def suite(pytestconfig) -> type:
    folder = Path(pytestconfig.cache.mkdir("peft-source"))
    source = folder / f"peft-{peft.__version__}"
    with FileLock(folder / "lock"):  # tests run in several processes
        if not (source / "tests").is_dir():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "-d", str(folder)]
            run = subprocess.run([*command, f"peft=={peft.__version__}"], capture_output=True, text=True)
            if run.returncode:
                pytest.skip(f"PEFT's tests could not be fetched from the package index: {run.stderr.strip()[-300:]}")
            with tarfile.open(folder / f"{source.name}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
    package = types.ModuleType("peft_tests")
    package.__path__ = [str(source / "tests")]
    sys.modules["peft_tests"] = package
    with stand_ins(diffusers="StableDiffusionPipeline", datasets="load_dataset"):
        return importlib.import_module("peft_tests.testing_common").PeftCommonTester


@contextmanager
def stand_ins(**attributes: str) -> Iterator[None]:
    """Packages that the suite imports for other tests than ours, where they are not installed; gone again afterwards,
    for a test that asks whether one is installed."""
    missing = [name for name in attributes if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = stand_in = types.ModuleType(name)
        setattr(stand_in, attributes[name], type(attributes[name], (), {}))
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


@pytest.fixture(scope="session")
def model_id(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("peft-internal-testing") / "tiny-qwen3-vl"
    model = FAMILIES["qwen3_vl"].build()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", APPLICABLE)
def test_peft(suite: type, model_id: str, name: str):
    if not hasattr(suite, name):
        pytest.skip(f"PEFT {peft.__version__} does not have this test")

    class Tester(suite):
        transformers_class = Qwen3VLForConditionalGeneration

        def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
            return FAMILIES["qwen3_vl"].prompt(self.transformers_class.from_pretrained(model_id), "t4 i t3", "t2 i t5")

    config = copy.deepcopy(CONFIG)
    if name == "_test_from_pretrained_config_construction":
        config["layers_to_transform"] = [0]  # with "strided", the model keeps a copy that names the layers
    getattr(Tester(), name)(model_id, PVMConfig, config, **FURTHER_ARGUMENTS.get(name, {}))


def test_nothing_of_the_suite_is_left_out(suite: type):
    existing = {name for name, _ in inspect.getmembers(suite, inspect.isfunction) if name.startswith("_test_")}
    assert existing - set(APPLICABLE) - NOT_APPLICABLE.keys() == set()


def test_merging_is_refused_with_the_reason():
    model = METHODS["pvm"].attach(FAMILIES["qwen3_vl"].build())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"no weight of the base model can express.*unload\(\)"):
            merge()

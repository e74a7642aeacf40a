"""New weights in place: what a fresh load gives, without touching modules, also in a compiled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forwards import TOLERANCE, counted_graphs, difference, logits, prompt_and_step
from methods_under_test import METHODS, give_weight
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM
from transformers import StaticCache

from peft_pvm import DIPEConfig, PVMConfig, hotswap_adapter
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5", "t9")


def save(tiny: TinyVLM, folder: Path, seed: int, **fields) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(tiny.build(), PVMConfig(**{"r": 32, "layers_to_transform": [1, 2], **fields}))
    give_weight(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def old(tiny: TinyVLM, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "old", 1)


@pytest.fixture
def new(tiny: TinyVLM, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "new", 2)


def test_it_is_as_if_loaded(tiny: TinyVLM, old: Path, new: Path):
    expected = PeftModel.from_pretrained(tiny.build(), new)
    inputs = tiny.inputs(expected.get_base_model(), *ROWS)
    model = PeftModel.from_pretrained(tiny.build(), old, adapter_name="mine")
    before = logits(model, inputs)
    modules = {name: id(module) for name, module in model.named_modules()}
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hotswap_adapter(model, new, "mine")
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    assert difference(logits(model, inputs), before) > 100 * TOLERANCE
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert model.peft_config["mine"].lineage == expected.peft_config["default"].lineage


def test_on_a_model_of_transformers_own_api(tiny: TinyVLM, old: Path, new: Path):
    model = tiny.build()
    inputs = tiny.inputs(model, *ROWS)
    model.load_adapter(old, adapter_name="mine")
    hotswap_adapter(model, str(new), "mine")
    assert torch.equal(logits(model.eval(), inputs), logits(PeftModel.from_pretrained(tiny.build(), new), inputs))


def test_other_adapters_stay(tiny: TinyVLM, old: Path, new: Path):
    model = PeftModel.from_pretrained(tiny.build(), old, adapter_name="one")
    model.load_adapter(old, adapter_name="two")
    inputs = tiny.inputs(model.get_base_model(), *ROWS)
    expected = logits(model, inputs)
    hotswap_adapter(model, new, "two")
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("wrapped", [False, True], ids=["base compiled", "PeftModel compiled"])
def test_a_compiled_model_is_not_compiled_again(wrapped: bool, tmp_path: Path):
    """Decoding on a static cache, counted in graphs."""
    tiny = FAMILIES["llava"]
    old, new = save(tiny, tmp_path / "old", 1), save(tiny, tmp_path / "new", 2)
    model = PeftModel.from_pretrained(tiny.build(), old)
    base = model.get_base_model()
    prompt, step = prompt_and_step(tiny, base, "t4 i t9")
    graphs, backend = counted_graphs()
    compiled = torch.compile(model if wrapped else base, backend=backend)
    results, numbers = [], []
    for folder in (old, new, old):
        hotswap_adapter(compiled if wrapped else model, folder, "default")
        cache = StaticCache(config=base.config.get_text_config(), max_cache_len=64)
        logits(base, prompt, **{CACHE: cache}, use_cache=True)
        results.append(logits(compiled, step, **{CACHE: cache}, use_cache=True))
        numbers.append(len(graphs))
        fresh = PeftModel.from_pretrained(tiny.build(), folder)
        cache = StaticCache(config=base.config.get_text_config(), max_cache_len=64)
        logits(fresh, prompt, **{CACHE: cache}, use_cache=True)
        assert difference(results[-1], logits(fresh, step, **{CACHE: cache}, use_cache=True)) < TOLERANCE
    assert numbers[0] > 0
    assert numbers == [numbers[0]] * 3
    assert difference(results[0], results[1]) > 100 * TOLERANCE


def _damage(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.language_model.layers.1.pvm.pvm_k_proj.weight"].fill_(torch.nan)
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 64}, r"differ in r: \[32, 64\]"),
        ({"layers_to_transform": [0, 2]}, r"differ in layers_to_transform: \[\[1, 2\], \[0, 2\]\]"),
        ({"memory_visibility": "sample"}, "differ in memory_visibility"),
        ({"mlp_ratio": 0.5}, "differ in mlp_ratio"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight belongs to nothing"),
        (None, "holds NaN"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict | None, message: str):
    family = FAMILIES["llava"]
    old, new = save(family, tmp_path / "old", 1), save(family, tmp_path / "new", 2, **(fields or {}))
    if fields is None:
        _damage(new)
    model = PeftModel.from_pretrained(family.build(), old)
    inputs = family.inputs(model.get_base_model(), *ROWS)
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, new, "default")
    assert torch.equal(logits(model, inputs), before)


def test_only_pvm_and_only_what_is_there(tmp_path: Path):
    family = FAMILIES["llava"]
    model = METHODS["pvm"].attach(family.build())
    get_peft_model(family.build(), DIPEConfig(max_distance=0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no PVM adapter 'other'"):
        hotswap_adapter(model, tmp_path, "other")
    with pytest.raises(ValueError, match=r"an adapter of type .*DIPE.*, not PVM"):
        hotswap_adapter(model, tmp_path, "default")

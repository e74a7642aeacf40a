"""What an adapter's file may hold, and how its keys are read: the same at every way in, never tensors of the base."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forwards import logits
from methods_under_test import METHODS, Method, give_weight
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from peft_pvm import PVMConfig, TDRSConfig, attached, hotswap_adapter
from peft_pvm.folders.inspection import inspect_adapter
from peft_pvm.methods.pvm.checkpoints import merge_adapters, read_adapter
from peft_pvm.tuners.loading import load_adapters
from peft_pvm.utils.packages import LOADS_MODULES_TO_SAVE
from peft_pvm.utils.text import LONGEST


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPT = "t4 i t3"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def tiny() -> TinyVLM:
    return FAMILIES["llava"]


def save(method: Method, tiny: TinyVLM, folder: Path, **fields) -> Path:
    torch.manual_seed(0)
    method.attach(tiny.build(), **fields).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def second(model: PreTrainedModel, folder: Path, whole: Path) -> None:
    PeftModel.from_pretrained(model, whole).load_adapter(folder, "second")


def again(model: PreTrainedModel, folder: Path, whole: Path) -> None:
    PeftModel.from_pretrained(model, whole).load_adapter(folder, "default")


def swap(model: PreTrainedModel, folder: Path, whole: Path) -> None:
    hotswap_adapter(PeftModel.from_pretrained(model, whole), folder, "default")


def attach(model: PreTrainedModel, folder: Path, whole: Path) -> None:
    with attached(model, PeftConfig.from_pretrained(folder)):
        pass


# By name: loads the adapter in the second folder onto a model; in the third is one of the same configuration.
ENTRIES: dict[str, Callable[[PreTrainedModel, Path, Path], object]] = {
    "from_pretrained": lambda model, folder, whole: PeftModel.from_pretrained(model, folder),
    "from_pretrained with config": lambda model, folder, whole: PeftModel.from_pretrained(
        model, folder, config=PeftConfig.from_pretrained(whole)
    ),
    "a second adapter": second,
    "new weights": again,
    "transformers": lambda model, folder, whole: model.load_adapter(str(folder)),
    "transformers with config": lambda model, folder, whole: model.load_adapter(
        str(folder), peft_config=PeftConfig.from_pretrained(whole)
    ),
    "transformers with tensors": lambda model, folder, whole: model.load_adapter(
        peft_config=PeftConfig.from_pretrained(whole), adapter_state_dict=load_file(folder / WEIGHTS)
    ),
    "load_adapters": lambda model, folder, whole: load_adapters(model, [str(folder)]),
}
METHOD_ENTRIES = [(method, entry) for method in ("pvm", "dipe", "tdrs") for entry in ENTRIES.items()]
METHOD_ENTRIES += [("pvm", ("hotswap", swap)), ("dipe", ("attached", attach)), ("tdrs", ("attached", attach))]


@pytest.mark.parametrize(("method", "entry"), METHOD_ENTRIES, ids=[f"{m}-{name}" for m, (name, _) in METHOD_ENTRIES])
@pytest.mark.parametrize("key", [HEAD, "base_model.model.model.language_model.layers.0.mlp.up_proj.weight"])
def test_no_adapter_brings_tensors_of_the_base(tiny: TinyVLM, tmp_path: Path, method: str, entry: tuple, key: str):
    whole = save(METHODS[method], tiny, tmp_path / "whole")
    folder = save(METHODS[method], tiny, tmp_path / "adapter")
    model = tiny.build()
    tensor = model.state_dict()[key.removeprefix("base_model.model.")]
    edit(folder, lambda tensors: tensors.update({key: torch.ones_like(tensor)}))
    inputs = tiny.inputs(model, PROMPT)
    before, base = state_of(model), logits(model, inputs)
    _, load = entry
    with pytest.raises(ValueError, match=re.escape(key.removeprefix("base_model.model."))) as refusal:
        load(model, folder, whole)
    assert len(str(refusal.value)) <= LONGEST
    after = {name.replace("base_model.model.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("method", ["pvm", "dipe", "tdrs"])
def test_tools_refuse_them_as_well(tiny: TinyVLM, tmp_path: Path, method: str):
    folder = save(METHODS[method], tiny, tmp_path / "adapter")
    edit(folder, lambda tensors: tensors.update({HEAD: torch.zeros(2)}))
    with pytest.raises(ValueError, match=HEAD):
        inspect_adapter(folder)
    if method == "pvm":
        with pytest.raises(ValueError, match=HEAD):
            merge_adapters([folder, folder], [0.5, 0.5], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_modules_to_save_names_lands_beside_the_base(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter", modules_to_save=["lm_head"])
    edit(folder, lambda tensors: tensors.update({HEAD: 2 * tensors[HEAD]}))
    for load in (ENTRIES["from_pretrained"], ENTRIES["transformers"]):
        model = tiny.build()
        inputs = tiny.inputs(model, PROMPT)
        base, head = logits(model, inputs), model.lm_head.weight.clone()
        if load is ENTRIES["transformers"] and not LOADS_MODULES_TO_SAVE:
            with pytest.raises(NotImplementedError, match="does not load what modules_to_save trained"):
                load(model, folder, folder)
            assert torch.equal(logits(model, inputs), base)
            continue
        load(model, folder, folder)
        assert not torch.equal(logits(model, inputs), base)
        assert torch.equal(model.lm_head.original_module.weight, head)
        assert torch.equal(model.lm_head.modules_to_save["default"].weight, 2 * head)
    assert inspect_adapter(folder).parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_module_that_is_saved_along_keeps_the_dtype_of_the_base(
    tiny: TinyVLM, tmp_path: Path, low_cpu_mem_usage: bool
):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter", modules_to_save=["lm_head"])
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].bfloat16()}))
    model = PeftModel.from_pretrained(tiny.build(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert logits(model, tiny.inputs(model.get_base_model(), PROMPT)).isfinite().all()


def test_two_adapters_may_save_one_module(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter", modules_to_save=["lm_head"])
    model = PeftModel.from_pretrained(tiny.build(), folder)
    model.load_adapter(folder, "second")
    assert set(model.get_base_model().lm_head.modules_to_save) == {"default", "second"}


@pytest.mark.parametrize(
    ("modules_to_save", "complaint"),
    [
        (["pvm"], r"'pvm', which is also the end of '\S+layers\.\d\.pvm'"),
        (["q_proj"], r"'q_proj', which is also the end of '\S+layers\.\d\.pvm\.pvm_q_proj'"),
        (["pvm_gate"], "a part of an adapter"),
        (["gate"], r"pvm\.pvm_gate"),
        (["layers.1"], "or a module with one inside"),
        (["language_model"], "or a module with one inside"),
        (["head_of_another_model"], "but no module of the model is called so"),
    ],
)
def test_modules_to_save_are_modules_of_the_base(tiny: TinyVLM, modules_to_save: list[str], complaint: str):
    model = tiny.build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(model, PVMConfig(r=32, layers_to_transform=[1], modules_to_save=modules_to_save))
    assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, PVMConfig(r=32, modules_to_save=["self_attn.q_proj", "language_model.norm"]))


def test_modules_to_save_are_not_those_of_another_adapter(tiny: TinyVLM):
    lora = get_peft_model(tiny.build(), LoraConfig(target_modules=["v_proj"]), "lora")
    with pytest.raises(ValueError, match="a part of an adapter"):
        get_peft_model(lora.get_base_model(), PVMConfig(r=32, modules_to_save=["self_attn.v_proj"]), "pvm")


@pytest.mark.parametrize("field", ["task_type", "peft_type", "lineage"])
@pytest.mark.parametrize("value", ["\x1b[2J", "\u202eabc", "x" * 10**6])
def test_what_is_refused_is_quoted_fit_to_print(tiny: TinyVLM, tmp_path: Path, field: str, value: str):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=r"task type|not the configuration|lineage|task_type") as refusal:
        PeftModel.from_pretrained(tiny.build(), folder)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) <= LONGEST


# ---- the file is not read before its header fits


def sparse(path: Path, key: str, size: int) -> None:
    header = json.dumps({key: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("method", ["pvm", "dipe"])
def test_a_huge_file_is_refused_by_its_header(tiny: TinyVLM, tmp_path: Path, method: str):
    folder = save(METHODS[method], tiny, tmp_path / "adapter")
    sparse(folder / WEIGHTS, "base_model.model.model.language_model.layers.1.pvm.pvm_q_proj.weight", 20 * 2**30)
    model = tiny.build()
    start = time.process_time()
    for load in (ENTRIES["from_pretrained"], ENTRIES["transformers"], lambda model, *folders: read_adapter(folder)):
        with pytest.raises(ValueError, match=r"pvm_q_proj|not PVM"):
            load(model, folder, folder)
    with pytest.raises(ValueError, match="pvm_q_proj"):
        inspect_adapter(folder)
    assert time.process_time() - start < 10


def test_sizes_go_together_without_a_base_model(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    key = "base_model.model.model.language_model.layers.1.pvm.pvm_{}.weight"
    for name, shape in {"q_proj": (32, 33), "k_proj": (16,), "gate": (2,), "output_expander": (63, 32)}.items():
        whole = load_file(folder / WEIGHTS)
        edit(folder, lambda tensors, name=name, shape=shape: tensors.update({key.format(name): torch.zeros(shape)}))
        with pytest.raises(ValueError, match="which does not go with the others"):
            read_adapter(folder)
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    edit(folder, lambda tensors: tensors.update({"other" + key.format("gate"): torch.zeros(1)}))
    with pytest.raises(ValueError, match="its layers have different names"):
        read_adapter(folder)


def test_too_long_a_header_is_not_parsed(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    header = b"{" + b" " * 3 * 2**20 + b"}"
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="its header would be 3,145,730 bytes long"):
        ENTRIES["from_pretrained"](tiny.build(), folder, folder)


# ---- keys are renamed, then checked


def to_old_layout(key: str) -> str:
    """As LLaVA's modules were called before transformers 4.52."""
    return key.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.lm_head.", "model.language_model.lm_head."
    )


OLD_LAYOUT_ENTRIES = {
    **{name: ENTRIES[name] for name in ("from_pretrained", "transformers", "load_adapters")},
    "new weights": again,
    "hotswap": swap,
    "another key_mapping": lambda model, folder, whole: PeftModel.from_pretrained(
        model, folder, key_mapping={r"^language_model\.model\.(.*)": r"model.language_model.\1"}
    ),
    "another weight_mapping": lambda model, folder, whole: model.load_adapter(
        str(folder), weight_mapping=[WeightRenaming(r"^language_model\.model\.", "model.language_model.")]
    ),
}


@pytest.mark.parametrize("entry", OLD_LAYOUT_ENTRIES)
def test_an_older_layout_of_the_base_is_known(tiny: TinyVLM, tmp_path: Path, entry: str):
    whole = save(METHODS["pvm"], tiny, tmp_path / "whole")
    old = save(METHODS["pvm"], tiny, tmp_path / "old")
    save_file({to_old_layout(key): 1.5 * tensor for key, tensor in load_file(old / WEIGHTS).items()}, old / WEIGHTS)
    edit(whole, lambda tensors: tensors.update({key: 1.5 * tensor for key, tensor in tensors.items()}))
    expected = PeftModel.from_pretrained(tiny.build(), whole)
    inputs = tiny.inputs(expected.get_base_model(), PROMPT)
    model = tiny.build()
    OLD_LAYOUT_ENTRIES[entry](model, old, whole)
    assert torch.equal(logits(model.eval(), inputs), logits(expected, inputs))


def test_an_older_layout_with_modules_to_save(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter", modules_to_save=["lm_head"])
    edit(folder, lambda tensors: tensors.update({HEAD: 2 * tensors[HEAD]}))
    expected = PeftModel.from_pretrained(tiny.build(), folder)
    inputs = tiny.inputs(expected.get_base_model(), PROMPT)
    save_file({to_old_layout(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    model = PeftModel.from_pretrained(tiny.build(), folder)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))


def test_a_mapping_that_leads_nowhere_is_refused(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.nowhere\.layers\.\S+ belongs to nothing in this model|is missing"):
        PeftModel.from_pretrained(tiny.build(), folder, key_mapping={"language_model": "nowhere"})


# ---- numbers that cannot work


def test_weights_beyond_fp16_are_refused(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    key = "base_model.model.model.language_model.layers.1.pvm.pvm_gate.weight"
    edit(folder, lambda tensors: tensors.update({key: torch.full((1,), 1e5)}))
    for load in (*ENTRIES.values(), lambda *_: read_adapter(folder)):
        with pytest.raises(
            ValueError, match=r"pvm_gate\.weight holds 1e\+05, which is larger than any number of fp16"
        ):
            load(tiny.build().half(), folder, save(METHODS["pvm"], tiny, tmp_path / "whole"))


@pytest.mark.parametrize("weights", [[float("nan"), 1], [float("inf"), 1], [1e39, 1 - 1e39], [10**400, 1]])
@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_weights_that_are_no_numbers_make_no_adapter(
    tiny: TinyVLM, tmp_path: Path, weights: list[float], combination_type: str
):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    with pytest.raises(ValueError, match="are not numbers from -65504 to 65504"):
        merge_adapters([folder, folder], weights, tmp_path / "out", combination_type=combination_type)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_could_not_be_loaded_is_not_made(tiny: TinyVLM, tmp_path: Path):
    folder = save(METHODS["pvm"], tiny, tmp_path / "adapter")
    edit(folder, lambda tensors: tensors.update({key: torch.full_like(t, 100) for key, t in tensors.items()}))
    with pytest.raises(ValueError, match=r"could not be loaded: .*pvm_gate.weight holds 1e"):
        merge_adapters([folder], [1000], tmp_path / "out", combination_type="cat")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["sd_strength", "dc_strength", "re_strength"])
def test_the_strongest_t_drs_is_finite(tiny: TinyVLM, field: str):
    for form in ("weights", "logits"):
        model = get_peft_model(tiny.build(), TDRSConfig(**{field: 65_504, "form": form})).eval()
        assert logits(model, tiny.inputs(model.get_base_model(), PROMPT)).isfinite().all()
    for value in (1e39, 10**400, float("nan"), -1):
        with pytest.raises(ValueError, match=f"{field} is .* must be a number from 0 to 65504"):
            TDRSConfig(**{field: value})


def test_the_largest_gate_is_finite(tiny: TinyVLM):
    model = get_peft_model(tiny.build(), PVMConfig(r=32)).eval()
    give_weight(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pvm_gate." in name:
                parameter.fill_(65_504)
    assert logits(model, tiny.inputs(model.get_base_model(), PROMPT)).isfinite().all()

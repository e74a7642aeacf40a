"""Adapters of several types on one model, through PEFT alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from forwards import TOLERANCE, difference, logits
from methods_under_test import METHODS, give_weight
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig, add_adapters, attached, load_adapters, save_adapter
from peft_pvm.tuners import loading
from peft_pvm.tuners.active import acting_adapters
from peft_pvm.tuners.layers import VisualTunerLayer
from peft_pvm.tuners.loading import loaded
from peft_pvm.utils.packages import adapter_layers


LORA = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PROMPTS = ("t4 i t3 i t6", "t7 i t5", "t9")


@pytest.fixture
def saved(tiny: TinyVLM, tmp_path: Path) -> list[str]:
    """A PVM, a DIPE and a LoRA adapter, and what a model with all three computes."""
    METHODS["pvm"].attach(tiny.build()).save_pretrained(tmp_path / "pvm")
    METHODS["dipe"].attach(tiny.build()).save_pretrained(tmp_path / "dipe")
    torch.manual_seed(0)
    get_peft_model(tiny.build(), LoraConfig(**LORA)).save_pretrained(tmp_path / "lora")
    return [str(tmp_path / name) for name in ("pvm", "dipe", "lora")]


def one_inside_the_other(tiny: TinyVLM, saved: list[str]) -> torch.Tensor:
    model = tiny.build()
    for source in saved:
        PeftModel.from_pretrained(model, source, adapter_name=Path(source).name)
    return logits(model.eval(), tiny.inputs(model, *PROMPTS))


def test_saved_adapters_of_several_types(tiny: TinyVLM, saved: list[str]):
    expected = one_inside_the_other(tiny, saved)
    model = tiny.build().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_adapters(model, saved) == ["pvm", "dipe", "lora"]
    assert difference(logits(model, tiny.inputs(model, *PROMPTS)), expected) < 1e-6
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "pvm_" in name)
    with attached(model, TDRSConfig()):
        assert difference(logits(model, tiny.inputs(model, *PROMPTS)), expected) > 1e-3


def test_fresh_adapters_of_several_types(tiny: TinyVLM):
    model = tiny.build()
    inputs = tiny.inputs(model, *PROMPTS)
    with attached(model, DIPEConfig(max_distance=0)):
        expected = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        add_adapters(
            model,
            {
                "pvm": PVMConfig(r=32),
                "dipe": DIPEConfig(max_distance=0),
                "lora": LoraConfig(target_modules=["q_proj"]),
            },
        )
    assert difference(logits(model, inputs), expected) < 1e-6
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if "pvm_" in name or "lora_" in name}
    give_weight(model)
    assert difference(logits(model, inputs), expected) > 1e-3


def test_each_is_saved_as_peft_saves_it(tiny: TinyVLM, saved: list[str], tmp_path: Path):
    expected = one_inside_the_other(tiny, saved)
    model = tiny.build()
    names = load_adapters(model, saved)
    again = [str(save_adapter(model, name, tmp_path / "again" / name)) for name in names]
    for before, after in zip(saved, again):
        assert load_file(Path(before) / "adapter_model.safetensors").keys() == (
            load_file(Path(after) / "adapter_model.safetensors").keys()
        )
    assert difference(one_inside_the_other(tiny, again), expected) < 1e-6
    with pytest.raises(ValueError, match=r"has no adapter 'lota'. Its adapters: \['dipe', 'lora', 'pvm'\]"):
        save_adapter(model, "lota", tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_those_that_were_there_stop_acting(tiny: TinyVLM, saved: list[str], merged: bool):
    model = tiny.build()
    load_adapters(model, saved[2:])
    if merged:
        for layer in adapter_layers(model):
            layer.merge()
    load_adapters(model, saved[:1])
    alone = METHODS["pvm"].attach(tiny.build())
    inputs = tiny.inputs(model, *PROMPTS)
    assert difference(logits(model, inputs), logits(alone, inputs)) < TOLERANCE


def test_one_adapter_is_given_in_a_list_too(tiny: TinyVLM, saved: list[str]):
    with pytest.raises(TypeError, match="given as a list of folders or Hub ids"):
        load_adapters(tiny.build(), saved[0])


def test_what_was_merged_is_merged_again_after_a_block(tiny: TinyVLM, saved: list[str]):
    model = tiny.build()
    load_adapters(model, saved[2:])
    inputs = tiny.inputs(model, *PROMPTS)
    for layer in adapter_layers(model):
        layer.merge()
    before = logits(model, inputs)
    with loaded(model, saved[:1]):
        assert difference(logits(model, inputs), before) > 100 * TOLERANCE
    assert all(layer.merged for layer in adapter_layers(model))
    assert difference(logits(model, inputs), before) < TOLERANCE


@pytest.mark.parametrize("first", [False, True], ids=["on a plain model", "beside another"])
def test_adapters_for_a_block(tiny: TinyVLM, saved: list[str], first: bool, recwarn: pytest.WarningsRecorder):
    """They leave nothing behind, and what acted before acts again: twice, and if the block fails."""
    model = tiny.build()
    inputs = tiny.inputs(model, *PROMPTS)
    if first:
        load_adapters(model, saved[1:2])
    expected, expected_inside = logits(model, inputs), one_inside_the_other(tiny, saved)

    def state() -> list[object]:
        hooks = {
            name: {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            for name, module in model.named_modules()
        }
        learns = [parameter.requires_grad for parameter in model.parameters()]
        return [hooks, learns, acting_adapters(model), sorted(getattr(model, "peft_config", {}))]

    before = state()
    for error in (None, None, KeyboardInterrupt):
        with contextlib.ExitStack() as stack:
            if error is not None:
                stack.enter_context(pytest.raises(error))
            names = stack.enter_context(loaded(model, saved))
            assert acting_adapters(model) == names == ["pvm", "dipe-2" if first else "dipe", "lora"]
            assert difference(logits(model, inputs), expected_inside) < 1e-6
            if error is not None:
                raise error
        assert state() == before
        assert torch.equal(logits(model, inputs), expected)
    assert [str(warning.message) for warning in recwarn if "active" in str(warning.message)] == []


def test_all_are_attached_or_none(tiny: TinyVLM, saved: list[str], tmp_path: Path):
    """What acted before acts on, and a second try finds the names free."""
    model, inputs = tiny.build(), tiny.inputs(tiny.build(), *PROMPTS)
    for before in ([], saved[1:2]):
        load_adapters(model, before)
        expected, there = logits(model, inputs), {name for name, _ in model.named_modules()}
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with pytest.raises(ValueError, match="nowhere"):
            load_adapters(model, [saved[0], saved[2], str(tmp_path / "nowhere")])
        with pytest.raises(ValueError, match="layers_to_transform"):
            add_adapters(model, {"pvm": PVMConfig(), "far": DIPEConfig(layers_to_transform=[99])})
        assert torch.equal(logits(model, inputs), expected)
        ours = {name for name, module in model.named_modules() if isinstance(module, VisualTunerLayer)}
        assert ours <= there
        assert all(parameter.requires_grad for parameter in learning)
        assert hasattr(model, "peft_config") == bool(before)
    assert load_adapters(model, saved[:1]) == ["pvm"]


OTHER_SETTINGS = {
    "memory_source": (lambda value: PVMConfig(r=32, memory_source=value), "embeddings", "hidden_states"),
    "max_distance": (lambda value: DIPEConfig(max_distance=value), 3, 8),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_new_weights_for_other_settings_are_refused(tiny: TinyVLM, tmp_path: Path, name: str):
    """PEFT would take the weights, where there are any, and leave the settings as they are."""
    config, value, other = OTHER_SETTINGS[name]
    model = get_peft_model(tiny.build(), config(value))
    model.save_pretrained(tmp_path / "same")
    get_peft_model(tiny.build(), config(other)).save_pretrained(tmp_path / "other")
    get_peft_model(tiny.build(), TDRSConfig()).save_pretrained(tmp_path / "t-drs")
    model.load_adapter(tmp_path / "same", "default")
    with pytest.raises(ValueError, match=f"was saved with {name} = .*{other}.*, but .* has .*{value}"):
        model.load_adapter(tmp_path / "other", "default")
    with pytest.raises(ValueError, match="is an adapter of type TDRS"):
        model.load_adapter(tmp_path / "t-drs", "default")


def test_one_configuration_on_two_models(tiny: TinyVLM, tmp_path: Path):
    config = DIPEConfig()
    first = get_peft_model(tiny.build(), config)
    get_peft_model(FAMILIES["idefics3"].build(), config)
    first.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "it lacks "),
        (
            lambda tensors: tensors.update({"base_model.model.stray": torch.ones(1)}),
            "nothing takes its .*stray",
        ),
    ],
)
def test_half_an_adapter_of_another_type_is_refused(saved: list[str], tiny: TinyVLM, change, message: str):
    file = Path(saved[2]) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    model = tiny.build()
    base = logits(model, tiny.inputs(model, *PROMPTS))
    with pytest.raises(ValueError, match=rf"lora does not fit .*{message}"):
        load_adapters(model, saved)
    model.eval()
    with pytest.raises(ValueError, match="does not fit"):
        load_adapters(model, saved[2:])
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, tiny.inputs(model, *PROMPTS)), base)  # PVM and DIPE came before it


@pytest.mark.parametrize("number", [0, 1, 2], ids=["pvm", "dipe", "lora"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_adapter_without_its_weights_does_not_stay(
    saved: list[str], tiny: TinyVLM, number: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    """Whatever goes wrong between the layers and the weights; and then it can be loaded."""
    source, others = saved[number], saved[:number] + saved[number + 1 :]
    model = tiny.build()
    load_adapters(model, others)
    inputs = tiny.inputs(model, *PROMPTS)
    expected, configs = logits(model, inputs), list(model.peft_config)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loading, "set_peft_model_state_dict", fail)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            load_adapters(model, [source])
    assert list(model.peft_config) == configs
    assert torch.equal(logits(model, inputs), expected)
    assert load_adapters(model, [source]) == [Path(source).name]


def test_pickles_are_not_read(saved: list[str], tiny: TinyVLM):
    folder = Path(saved[2])
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="Adapters are read from safetensors files only"):
        load_adapters(tiny.build(), saved[2:])


@pytest.mark.skipif(
    not (transformers.__version__.startswith("5.24") and Version(peft.__version__) < Version("0.22")),
    reason="other versions of transformers take the PEFT that is released with them",
)
def test_transformers_refuses_every_peft():
    """What the documentation says of transformers 5.24: LoRA is refused as our adapters are."""
    code = (
        "import peft, transformers; from transformers import LlamaConfig, LlamaForCausalLM; "
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, "
        "num_attention_heads=1, vocab_size=8)); model.add_adapter(peft.LoraConfig(target_modules=['q_proj']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0" in run.stderr
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.broken])
def test_a_family_that_is_skipped_is_broken_itself(name: str):
    family = FAMILIES[name]
    if not family.is_broken:
        pytest.skip("it works in this version")
    model = family.build_anyway()
    with pytest.raises(AttributeError, match="image_outputs"):
        model(**family.inputs(model, "t4 i t3"))

"""A method is one class, and an adapter like any other: attached, saved, loaded, switched and taken off."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from forwards import difference, logits
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_layer_status, get_model_status, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_vlms import FAMILIES, TinyVLM

from peft_pvm import DIPEConfig, HGAIConfig, LogBiasConfig, PAIConfig, SPARCConfig, TDRSConfig, VAFConfig, VISTAConfig
from peft_pvm.attention.stages import Bias, KeyScale, Stage, Values
from peft_pvm.tokens.context import VisualContext
from peft_pvm.tokens.families import find_vlm
from peft_pvm.tokens.memory import memory_of
from peft_pvm.tuners.attention_method import AttentionMethod, SteeredLayer, attention_tuner
from peft_pvm.tuners.registry import register
from peft_pvm.utils.packages import CACHE


ROWS = ("t4 i t3 i t6", "t7 i t5")
SHIPPED = Path(__file__).parents[2] / "adapters"
FRESH = {
    "dipe": partial(DIPEConfig, max_distance=0),
    "dipe-limited": DIPEConfig,
    "t-drs": TDRSConfig,
    "log-bias": LogBiasConfig,
    "vaf": VAFConfig,
    "pai": PAIConfig,
    "hgai": HGAIConfig,
}
SHIPPED_CONFIGS = {**FRESH, "sparc": SPARCConfig, "vista": VISTAConfig}  # these do not act in forwards
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "dipe": lambda: DIPEConfig(max_distance=0, layers_to_transform=[1]),
    "tdrs": lambda: TDRSConfig(sd_strength=2.0, dc_floor=0.2, layers_to_transform=[1]),
    "vaf": lambda: VAFConfig(visual=2.0, layers_to_transform=[1]),
    "log_bias": lambda: LogBiasConfig(t0=1.0, layers_to_transform=[1]),
    "pai": lambda: PAIConfig(alpha=1.0, layers_to_transform=[1]),
    "hgai": lambda: HGAIConfig(alpha=1.5, layers_to_transform=[1]),
}


@pytest.fixture
def llava() -> TinyVLM:
    return FAMILIES["llava"]


@pytest.fixture(params=CONFIGS)
def config(request) -> PeftConfig:
    return CONFIGS[request.param]()


@pytest.mark.every_family
@pytest.mark.parametrize("name", FRESH)
def test_shipped_adapters_fit_every_family(family: TinyVLM, name: str):
    is_what_it_says(family, name, lambda model: PeftModel.from_pretrained(model, SHIPPED / name))


@pytest.mark.parametrize("name", FRESH)
def test_transformers_loads_them_too(tiny: TinyVLM, name: str):
    def load(model: torch.nn.Module) -> torch.nn.Module:
        model.load_adapter(SHIPPED / name)
        return model

    is_what_it_says(tiny, name, load)


def is_what_it_says(family: TinyVLM, name: str, load: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """A shipped adapter, loaded onto a model, is a fresh one of its settings."""
    model = family.build()
    inputs = family.inputs(model, *ROWS)
    base = logits(model, inputs)
    loaded = load(model)
    fresh = get_peft_model(family.build(), FRESH[name]())
    assert torch.equal(logits(loaded, inputs), logits(fresh, inputs))
    if name == "dipe-limited":  # at these lengths it is the base
        assert difference(logits(loaded, inputs), base) < 1e-5
    else:
        assert difference(logits(loaded, inputs), base) > 1e-3


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_shipped_files_are_what_saving_writes(name: str, tmp_path: Path):
    SHIPPED_CONFIGS[name](inference_mode=True).save_pretrained(tmp_path)
    headers = []
    for folder in (SHIPPED / name, tmp_path):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            headers.append((list(file.keys()), file.metadata()))
    assert headers[0] == headers[1]
    shipped, saved = (json.loads((each / "adapter_config.json").read_text()) for each in (SHIPPED / name, tmp_path))
    assert {**shipped, "peft_version": ""} == {**saved, "peft_version": ""}
    card = ModelCard.load(SHIPPED / name / "README.md")
    assert card.data.library_name == "peft"
    assert "import peft_pvm" in card.text


@pytest.mark.parametrize("writer", ["PeftModel", "transformers"])
def test_round_trip(llava: TinyVLM, config: PeftConfig, writer: str, tmp_path: Path):
    model = llava.build()
    inputs = llava.inputs(model, *ROWS)
    if writer == "PeftModel":
        attached = get_peft_model(model, config)
    else:
        model.add_adapter(config)
        attached = model
    expected = logits(attached, inputs)
    attached.save_pretrained(tmp_path)

    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {f.name for f in tmp_path.iterdir()}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert list(file.keys()) == []
        assert file.metadata() == {"format": "pt", "method": config.method, "version": "1"}
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["peft-pvm", config.method]
    assert "`layers_to_transform` | `[1]`" in card.text

    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(llava.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again, inputs), expected)
    again = llava.build()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again, inputs), expected)


def test_a_card_is_written_again(llava: TinyVLM, tmp_path: Path):
    """With what is saved now, after another adapter and after PEFT has been at it."""
    get_peft_model(llava.build(), DIPEConfig(max_distance=0)).save_pretrained(tmp_path)
    for strength in (1.0, 3.0, 3.0):
        get_peft_model(llava.build(), TDRSConfig(sd_strength=strength)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "`sd_strength` | `3.0`" in card.text
    assert card.text.count("# T-DRS") == 1
    assert card.data.tags == ["peft-pvm", "tdrs"]
    assert not card.data.base_model


def test_a_card_of_ones_own_is_kept(llava: TinyVLM, config: PeftConfig, tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    get_peft_model(llava.build(), config).save_pretrained(tmp_path)
    assert "# Mine" in (tmp_path / "README.md").read_text()


def test_peft_sees_it_as_any_adapter(llava: TinyVLM, config: PeftConfig, capsys):
    model = get_peft_model(llava.build(), config, adapter_name="mine")
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 0 || all params: 176,064 || trainable%: 0.0000")
    status = get_model_status(model)
    assert status.peft_types == {"mine": config.peft_type.value}
    assert (status.available_adapters, status.active_adapters, status.enabled) == (["mine"], ["mine"], True)
    assert (status.trainable_params, status.total_params, status.num_adapter_layers) == (0, 176_064, 1)
    (layer,) = get_layer_status(model)
    assert layer.module_type == type(model.base_model).tuner_layer_cls.__name__


def test_switching_and_deleting(llava: TinyVLM, config: PeftConfig):
    model = llava.build()
    inputs = llava.inputs(model, *ROWS)
    base = logits(model, inputs)
    model = get_peft_model(model, config, adapter_name="one")
    other = replace(config, layers_to_transform=[0, 2])
    model.add_adapter("two", other)
    one = logits(model, inputs)
    model.set_adapter("two")
    two = logits(model, inputs)
    assert difference(one, two) > 1e-3
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, inputs)
    assert difference(both, one) > 1e-3
    assert difference(both, two) > 1e-3
    if isinstance(config, DIPEConfig):
        on_all = get_peft_model(llava.build(), DIPEConfig(max_distance=0, layers_to_transform=[0, 1, 2]))
        assert torch.equal(both, logits(on_all, inputs))
    model.delete_adapter("one")
    assert torch.equal(logits(model, inputs), two)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model.unload(), inputs), base)


def test_a_deepcopied_model_is_its_own(llava: TinyVLM, config: PeftConfig):
    model = llava.build()
    inputs = llava.inputs(model, *ROWS)
    base = logits(model, inputs)
    model = get_peft_model(model, config)
    on = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), on)
    assert torch.equal(logits(twin.unload(), inputs), base)
    assert torch.equal(logits(model, inputs), on)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model.unload(), inputs), base)
    assert torch.equal(logits(twin, inputs), on)


def test_what_needs_weights_is_refused(llava: TinyVLM, config: PeftConfig):
    model = get_peft_model(llava.build(), config).eval()
    inputs = llava.inputs(model.get_base_model(), "t4 i t3", "t5")
    before = logits(model, inputs)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="no weight of the base model can express"):
            merge()
    with pytest.raises(NotImplementedError, match="no weights to combine"):
        model.base_model.add_weighted_adapter(["default"], [0.5], "half")
    assert torch.equal(logits(model, inputs), before)


def test_lora_stays_trainable_beside_it(llava: TinyVLM, config: PeftConfig):
    lora = get_peft_model(llava.build(), LoraConfig(target_modules=["q_proj"]), "lora")
    trainable = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    get_peft_model(lora.get_base_model(), config, "mine")
    assert trainable
    assert [name for name, parameter in lora.named_parameters() if parameter.requires_grad] == trainable


def _with_tensors(folder: Path) -> None:
    save_file({"base_model.model.x": torch.ones(1)}, folder / "adapter_model.safetensors")


def _as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def _damaged(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")


def _set_layers(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "layers_to_transform": [99]}))


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (_with_tensors, ValueError, "base_model.model.x belongs to nothing in this model"),
        (_as_pickle, FileNotFoundError, "read from safetensors files only"),
        (_damaged, ValueError, "damaged or not a safetensors file"),
        (_set_layers, ValueError, r"names layers \[99\], but on LlavaForConditionalGeneration the method can act on"),
    ],
    ids=["tensors", "pickle", "damaged", "layers"],
)
def test_a_wrong_file_leaves_the_model_as_it_was(
    llava: TinyVLM, config: PeftConfig, tmp_path: Path, spoil, error, complaint: str
):
    config.save_pretrained(tmp_path)
    spoil(tmp_path)
    model = llava.build()
    inputs = llava.inputs(model, *ROWS)
    base, names = logits(model, inputs), [name for name, _ in model.named_modules()]
    for load in (lambda: PeftModel.from_pretrained(model, tmp_path), lambda: model.load_adapter(tmp_path)):
        with pytest.raises(error, match=complaint):
            load()
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(logits(model, inputs), base)
        assert type(model.model.language_model.layers[0].self_attn.config).__name__ == "LlamaConfig"
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (DIPEConfig, {"layers_to_transform": []}),
        (DIPEConfig, {"layers_to_transform": [0, 0]}),
        (TDRSConfig, {"layers_to_transform": -1}),
        (TDRSConfig, {"form": "both"}),
        (TDRSConfig, {"pairs": "none"}),
        (TDRSConfig, {"kernel": "cuda"}),
        (TDRSConfig, {"sd_strength": -1.0}),
        (TDRSConfig, {"dc_strength": float("nan")}),
        (TDRSConfig, {"dc_floor": 0.0}),
        (TDRSConfig, {"dc_floor": 1.0}),
        (TDRSConfig, {"re_floor": "min"}),
        (TDRSConfig, {"re_floor": "0*min"}),
        (TDRSConfig, {"re_floor": None}),
    ],
)
def test_wrong_fields_are_refused(cls: type[PeftConfig], fields: dict):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.{name} is .*, but must be"):
        cls(**fields)


def test_changing_the_kernel_is_followed(llava: TinyVLM, config: PeftConfig):
    """`set_attn_implementation` on a model that is already steered."""
    model = llava.build(attn_implementation="sdpa")
    inputs = llava.inputs(model, *ROWS)
    attached = get_peft_model(model, config)
    real = inputs["attention_mask"].bool()
    on = logits(attached, inputs)[real]
    model.set_attn_implementation("eager")
    with attached.disable_adapter():
        eager = logits(attached, inputs)
    assert difference(logits(attached, inputs)[real], on) < 1e-5
    assert torch.equal(logits(attached.unload(), inputs), eager)
    assert model.config.get_text_config()._attn_implementation == "eager"


# ---- a class is a whole method


STAGES: dict[str, Callable[[], Stage | Sequence[Stage]]] = {
    "none": lambda: (),
    "an empty list": lambda: [],
    "one": lambda: KeyScale(lambda call: torch.where(call.visual_keys, 1.5, 1.0)),
    "several": lambda: [
        Bias(lambda call: torch.where(call.visual_keys, 0.7, 0.0)),
        Values(lambda call: torch.where(call.visual_keys, 0.5, 1.0)),
    ],
}
asked_for: list[int] = []  # the layers that `FromTestsConfig` was asked for


@dataclass
class FromTestsConfig(AttentionMethod):
    """Does what the tests ask
    for (Somebody et al., arXiv:2401.01234).

    And this is a second paragraph, with another number (arXiv 2402.56789).
    """

    method: ClassVar[str] = "fromtests"

    kind: str = "one"

    def stages(self, layer: SteeredLayer) -> Stage | Sequence[Stage]:
        asked_for.append(layer.layer_idx)
        return STAGES[self.kind]()

    def default_layers(self, layers: list[int]) -> list[int]:
        return layers[1:]

    @classmethod
    def start_forward(cls, context: VisualContext) -> None:
        context.keeps["from tests"] = lambda context: context.position_ids


register(FromTestsConfig)


def test_cards_say_what_the_docstring_says():
    """Its first paragraph, without the number of the paper."""

    class PlainConfig(AttentionMethod):
        """Has no paper."""

        method = "plain"

    class SilentConfig(AttentionMethod):
        method = "silent"

    class LoudConfig(AttentionMethod):
        """Says otherwise (arXiv 2401.01234)."""

        method = "loud"
        title, summary, paper = "LOUD", "Its own words.", "2409.99999"

    class LouderConfig(LoudConfig):
        """What it inherits is said already."""

    said = {cls: (cls.title, cls.summary, cls.paper) for cls in (FromTestsConfig, PlainConfig, LoudConfig)}
    assert list(said.values()) == [
        ("FromTests", "Does what the tests ask for (Somebody et al., arXiv:2401.01234).", "2401.01234"),
        ("Plain", "Has no paper.", ""),
        ("LOUD", "Its own words.", "2409.99999"),
    ]
    assert (SilentConfig.title, SilentConfig.paper) == ("Silent", "")
    assert LouderConfig.summary == LoudConfig.summary


def test_the_number_of_the_paper_is_no_part_of_the_summary():
    class NumberedConfig(AttentionMethod):
        """Moves keys (arXiv 2401.01234) to where they were."""

        method = "numbered"

    assert NumberedConfig.summary == "Moves keys to where they were."
    assert NumberedConfig.paper == "2401.01234"


def test_the_tuner_is_made_of_the_class():
    tuner = attention_tuner(FromTestsConfig)
    assert attention_tuner(FromTestsConfig) is tuner
    assert tuner.__name__ == "FromTestsModel"
    assert tuner.tuner_layer_cls.__name__ == "FromTestsLayer"
    assert tuner.tuner_layer_cls.method_cls is tuner.method_cls is FromTestsConfig
    assert (tuner.child_name, tuner.prefix) == ("fromtests", "fromtests_")
    assert tuner.__module__ == __name__
    assert "FromTestsConfig()" in tuner.__doc__
    assert attention_tuner(DIPEConfig) is not tuner


def test_to_register_again_changes_nothing():
    members, tuner = list(PeftType), PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FROMTESTS]
    register(FromTestsConfig)
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.FROMTESTS] is FromTestsConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FROMTESTS] is tuner is attention_tuner(FromTestsConfig)

    @dataclass
    class OtherConfig(AttentionMethod):
        """Another of the same name."""

        method: ClassVar[str] = "fromtests"

    with pytest.raises(RuntimeError, match="PEFT already has a method 'FROMTESTS'"):
        register(OtherConfig)
    assert list(PeftType) == members


@pytest.mark.parametrize("kind", ["none", "an empty list"])
def test_a_method_without_a_stage_leaves_the_base_as_it_is(llava: TinyVLM, kind: str):
    model = llava.build()
    inputs = llava.inputs(model, *ROWS)
    expected = logits(model, inputs)
    assert torch.equal(logits(get_peft_model(model, FromTestsConfig(kind=kind)), inputs), expected)


def test_several_stages_are_several_adapters_with_one_each(llava: TinyVLM, monkeypatch: pytest.MonkeyPatch):
    bias, values = STAGES["several"]()
    monkeypatch.setitem(STAGES, "bias", lambda: bias)
    monkeypatch.setitem(STAGES, "values", lambda: [values])
    inputs = llava.inputs(llava.build(), *ROWS)
    together = logits(get_peft_model(llava.build(), FromTestsConfig(kind="several")), inputs)
    model = get_peft_model(llava.build(), FromTestsConfig(kind="bias"), "a")
    model.add_adapter("b", FromTestsConfig(kind="values"))
    for name in ("a", "b"):
        model.set_adapter(name)
        assert difference(logits(model, inputs), together) > 1e-3
    model.base_model.set_adapter(["b", "a"])
    assert torch.equal(logits(model, inputs), together)


@pytest.mark.parametrize(
    ("layers_to_transform", "expected"), [(None, [1, 2]), (0, [0]), ([2, 0], [0, 2]), ([0, 1, 2], [0, 1, 2])]
)
def test_stages_are_asked_for_by_layer_in_every_forward(llava: TinyVLM, layers_to_transform, expected: list[int]):
    """`None` is the method's own choice of layers."""
    config = FromTestsConfig(layers_to_transform=layers_to_transform)
    model = get_peft_model(llava.build(), config)
    inputs = llava.inputs(model.get_base_model(), *ROWS)
    asked_for.clear()
    for forward in (1, 2):
        logits(model, inputs)
        assert asked_for == expected * forward
    with model.disable_adapter():
        logits(model, inputs)
    assert asked_for == expected * 2


def test_layers_without_a_stage_are_not_awaited(llava: TinyVLM):
    """A method that does nothing in a layer does not mind that the layer is left out."""
    for kind in ("none", "one"):
        model = get_peft_model(llava.build(), FromTestsConfig(kind=kind, layers_to_transform=[1]))
        base = model.get_base_model()
        del base.model.language_model.layers[1]
        with pytest.raises(NotImplementedError, match="do not pass") if kind == "one" else contextlib.nullcontext():
            logits(model, llava.inputs(base, "t4 i t3"), use_cache=False)


def test_a_forward_keeps_what_the_method_needs_also_while_it_is_off(llava: TinyVLM):
    model = get_peft_model(llava.build(), FromTestsConfig())
    inputs = llava.inputs(model.get_base_model(), "t4 i t3")
    with model.disable_adapter(), torch.no_grad():
        memory = memory_of(model(**inputs, use_cache=True)[CACHE])
    assert memory.kept["from tests"][..., 0].tolist() == inputs["position_ids"].tolist()


def test_a_layer_knows_its_rotary_embedding():
    """Where it rotates by one."""
    for name in ("llava", "gemma3", "llama4"):
        vlm = find_vlm(FAMILIES[name].build_anyway())
        layers = attention_tuner(FromTestsConfig).tuner_layer_cls(vlm).layers
        assert sorted(layers) == [layer.layer_idx for layer in layers.values()] == sorted(vlm.self_attentions)
        for layer_idx, layer in layers.items():
            rotates = vlm.rotates(vlm.self_attentions[layer_idx])
            assert layer.rotary is (vlm.rotary if rotates else None)
            assert layer.layer_type == vlm.layer_type(layer_idx)
    assert any(layer.rotary is None for layer in layers.values()), "of Llama 4, some layers do not rotate"

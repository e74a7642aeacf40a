"""peft-pvm export-vllm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from methods_under_test import give_weight
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_vlms import FAMILIES

from peft_pvm import DIPEConfig, PVMConfig
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.folders.replacing import AREA
from peft_pvm.integrations.vllm import export_vllm, serve_arguments, serve_environment
from peft_pvm.integrations.vllm.choices import FOLDER, IN_CHECKPOINT
from peft_pvm.integrations.vllm.export import FIELD, MAKES_POSITIONS, STEERING, adapters_of, choices_of, switch_of
from peft_pvm.integrations.vllm.families import FAMILIES as SERVED
from peft_pvm.methods import METHODS


pytest.importorskip("matplotlib", reason="the command line needs the extra `lab`")

from transformers import AutoConfig
from typer.testing import CliRunner

from peft_pvm.cli.app import app


@pytest.fixture
def base(tmp_path: Path) -> Path:
    load_tiny_vlm().save_pretrained(tmp_path / "base", max_shard_size="3MB")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "base"


@pytest.mark.parametrize("names", [["pvm"], ["dipe"], ["branches", "dipe-some-layers"]])
def test_a_folder_has_the_base_the_branch_and_what_was_asked_for(
    base: Path, adapters: dict[str, Path], tmp_path: Path, names: list[str]
):
    together = "+".join(str(adapters[name]) for name in names)
    result = CliRunner().invoke(app, ["export-vllm", str(base), together, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for shard in set(index["weight_map"].values()):
        tensors = load_file(out / shard)
        assert all(index["weight_map"][key] == shard for key in tensors)
        found.update(tensors)
    for key, tensor in load_tiny_vlm().state_dict().items():
        assert found.pop(key).equal(tensor)
    if names[0] == "dipe":
        assert not found
    else:
        written = load_file(adapters[names[0]] / "adapter_model.safetensors")
        names_in_model = {key: key.removeprefix("base_model.model.").replace(".pvm.", ".pvm.0.") for key in written}
        assert found.keys() == set(names_in_model.values())
        assert all(found[names_in_model[key]].equal(tensor) for key, tensor in written.items())
    assert (out / "chat_template.jinja").is_file()
    assert "base_model_name_or_path" not in (out / "config.json").read_text()
    config = AutoConfig.from_pretrained(out)
    assert config.architectures == ["PeftPVMQwen3VLForConditionalGeneration"]
    assert not hasattr(config, MAKES_POSITIONS)
    assert not choices_of(config.text_config)
    assert not (out / FOLDER).exists()
    assert serve_arguments(out) == [str(out)]
    found_adapters = adapters_of(config.text_config)
    assert [type(found) for found in found_adapters] == [DIPEConfig if "dipe" in name else PVMConfig for name in names]
    if names[-1] == "dipe-some-layers":
        branches, dipe = found_adapters
        assert dipe.layers_to_transform == [0, 2, 3]
        assert [part.memory_source for part in branches.parts()] == ["embeddings", "hidden_states"]


def switch_in(folder: Path) -> str:
    return switch_of(AutoConfig.from_pretrained(folder).text_config)


def switched_on(choice: Path) -> list[float]:
    """What a choice's LoRA adds for each adapter, as vLLM computes it."""
    config = LoraConfig.from_pretrained(str(choice))
    tensors = load_file(choice / "adapter_model.safetensors")
    layer = f"base_model.model.{IN_CHECKPOINT}.{switch_in(choice.parents[1])}"
    down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
    return [round(number, 6) for number in (up @ down * config.lora_alpha / config.r).flatten().tolist()]


def test_choices_are_loras_that_say_which_adapters_are_on(base: Path, adapters: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    combinations = ["pvm", "dipe", "pvm+dipe", "branches+lora"]
    paths = ["+".join(str(adapters[name]) for name in combination.split("+")) for combination in combinations]
    result = CliRunner().invoke(app, ["export-vllm", str(base), *paths, str(out)])
    assert result.exit_code == 0, result.output
    names = ["pvm-tiny-vlm", "dipe", "pvm-tiny-vlm+dipe", "both+lora"]
    config = AutoConfig.from_pretrained(out)
    assert choices_of(config.text_config) == {name: "lora" in name for name in names}
    assert [type(found) for found in adapters_of(config.text_config)] == [PVMConfig, DIPEConfig, PVMConfig]
    assert {path.name for path in (out / FOLDER).iterdir()} == set(names)
    assert [switched_on(out / FOLDER / name) for name in names] == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]
    lora = load_file(adapters["lora"] / "adapter_model.safetensors")
    with_lora = load_file(out / FOLDER / "both+lora" / "adapter_model.safetensors")
    assert all(with_lora[key].equal(tensor) for key, tensor in lora.items())
    weights = {}
    for shard in out.glob("*.safetensors"):
        weights |= load_file(shard)
    assert not weights[f"{IN_CHECKPOINT}.{switch_in(out)}.weight"].any()
    gates = [key for key in weights if key.endswith(".pvm_gate.weight")]
    assert {int(key.split(".pvm.")[1].split(".")[0]) for key in gates} == {0, 2}
    arguments = serve_arguments(out)
    assert arguments[:6] == [str(out), "--enable-lora", "--max-loras", "5", "--max-lora-rank", "8"]
    assert set(arguments[7:]) == {f"{name}={out / FOLDER / name}" for name in names}
    printed = result.output.replace("\n", " ")
    assert f"VLLM_USE_V2_MODEL_RUNNER=0 vllm serve {' '.join(arguments[:6])}" in printed


def test_a_single_adapter_by_request(base: Path, adapters: dict[str, Path], tmp_path: Path):
    out = export_vllm(base, [adapters["dipe"]], tmp_path / "out", by_request=True)
    assert switched_on(out / FOLDER / "dipe") == [1]
    *arguments, _, choice = serve_arguments(out)
    assert arguments[-4:] == ["--max-lora-rank", "1", "--lora-target-modules", switch_in(out)]
    assert choice == f"dipe={out / FOLDER / 'dipe'}"
    with pytest.raises(ValueError, match="holds dipe, of another export"):
        export_vllm(base, [adapters["vaf"]], out, by_request=True)


def test_choices_of_one_export_do_not_fit_another(base: Path, adapters: dict[str, Path], tmp_path: Path):
    """Whether adapters come in another order, with other settings, other weights or another LoRA."""
    out = tmp_path / "out"

    def switch(*exported: str | Path) -> str:
        shutil.rmtree(out, ignore_errors=True)
        return switch_in(export_vllm(base, exported, out, by_request=True))

    pvm, dipe, with_lora = adapters["pvm"], adapters["dipe"], f"{adapters['pvm']}+{adapters['lora']}"
    first = [switch(pvm, dipe), switch(dipe, pvm), switch(pvm), switch(with_lora)]
    assert [switch(pvm, dipe), switch(dipe, pvm), switch(pvm), switch(with_lora)] == first
    for path, part in ((pvm, "pvm_gate"), (adapters["lora"], "lora_B")):
        tensors = load_file(path / "adapter_model.safetensors")
        other = tmp_path / path.name
        shutil.copytree(path, other)
        tensors |= {key: tensor + 1 for key, tensor in tensors.items() if part in key}
        save_file(tensors, other / "adapter_model.safetensors")
    first += [switch(tmp_path / pvm.name), switch(f"{pvm}+{tmp_path / adapters['lora'].name}")]
    assert len(set(first)) == len(first)


def test_what_a_dead_writer_left_is_no_choice(base: Path, adapters: dict[str, Path], tmp_path: Path):
    out = export_vllm(base, [adapters["dipe"]], tmp_path / "out", by_request=True)
    arguments = serve_arguments(out)
    (out / FOLDER / AREA / "0123").mkdir(parents=True)
    assert serve_arguments(out) == arguments
    export_vllm(base, [adapters["dipe"]], out, by_request=True)
    assert [path.name for path in (out / FOLDER).iterdir()] == ["dipe"]


@pytest.mark.parametrize(("name", "needs"), [("pvm", False), ("vaf", False), ("dipe", True), ("log-bias", True)])
def test_the_environment_of_a_server(base: Path, adapters: dict[str, Path], tmp_path: Path, name: str, needs: bool):
    folder = export_vllm(base, [adapters[name]], tmp_path / "out")
    assert serve_environment(folder) == ({"VLLM_USE_V2_MODEL_RUNNER": "0"} if needs else {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "a LoRA with use_dora, which vLLM does not take"),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}}, "with rank_pattern, alpha_pattern, which"),
        ({"bias": "lora_only"}, "with bias, which"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save, which"),
        ({"init_lora_weights": "pissa_niter_4"}, "trained on a base that pissa_niter_4 had changed"),
        ({"target_modules": r".*visual.*\.qkv"}, "a LoRA outside the text model too .* Merge it into the base"),
    ],
)
def test_a_lora_that_vllm_would_compute_otherwise_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path, fields: dict, message: str
):
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields})
    get_peft_model(load_tiny_vlm(), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(NotImplementedError, match=message):
        export_vllm(base, [f"{adapters['pvm']}+{tmp_path / 'lora'}"], tmp_path / "out", by_request=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_exported_before_there_was_a_limit_has_none(
    base: Path, adapters: dict[str, Path], tmp_path: Path
):
    export_vllm(base, [adapters["dipe-some-layers"]], tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    (dipe,) = adapters_of(config.text_config)
    assert dipe.max_distance == 3
    del getattr(config.text_config, FIELD)["adapters"][0]["max_distance"]
    (dipe,) = adapters_of(config.text_config)
    assert dipe.max_distance == 0
    setattr(config.text_config, FIELD, {"dipe": {}})
    with pytest.raises(ValueError, match="An earlier version of peft_pvm made this folder"):
        adapters_of(config.text_config)


@pytest.mark.parametrize("family", SERVED)
def test_each_family_gets_its_class_and_labels_for_its_positions(
    family: str, adapters: dict[str, Path], tmp_path: Path
):
    FAMILIES[family].build().save_pretrained(tmp_path / "base")
    export_vllm(tmp_path / "base", [adapters["dipe"]], tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == [SERVED[family].architecture] == [f"PeftPVM{FAMILIES[family].model_class}"]
    has_three_rows = "mrope_section" in str(config.get_text_config().rope_parameters)
    assert SERVED[family].makes_positions == has_three_rows
    assert hasattr(config, MAKES_POSITIONS) != has_three_rows  # vLLM asks for positions where one of both is there
    assert len(adapters_of(config.get_text_config())) == 1


def test_a_config_with_the_text_model_s_fields_beside_its_own(adapters: dict[str, Path], tmp_path: Path):
    FAMILIES["qwen2_5_vl"].build().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content.pop("text_config"), **content}))
    export_vllm(tmp_path / "base", [adapters["dipe"]], tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.text_config.hidden_size == FAMILIES["qwen2_5_vl"].config().text_config.hidden_size
    assert len(adapters_of(config.text_config)) == 1


def refused(adapter: Path | str, base: Path, tmp_path: Path, **options) -> str:
    """What is said; nothing is written."""
    with pytest.raises((ValueError, NotImplementedError)) as error:
        export_vllm(base, [adapter], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PVMConfig(r=32, layers_to_transform=[1], modules_to_save=["lm_head"]), "brings modules of the base"),
        (PVMConfig(r=32, layers_to_transform=[1], memory_visibility="sample"), "--accept-causal"),
        (LoraConfig(target_modules=["q_proj"]), "give it to vLLM with --lora-modules"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "not of peft_pvm"),
    ],
)
def test_adapters_that_vllm_would_compute_otherwise_are_refused(base: Path, tmp_path: Path, config, message: str):
    get_peft_model(load_tiny_vlm(), config).save_pretrained(tmp_path / "adapter")
    assert message in refused(tmp_path / "adapter", base, tmp_path)


def test_an_adapter_that_sees_its_sample_is_served_causally_on_request(base: Path, tmp_path: Path):
    config = PVMConfig(r=32, layers_to_transform=[1], memory_visibility="sample")
    get_peft_model(load_tiny_vlm(), config).save_pretrained(tmp_path / "adapter")
    export_vllm(base, [tmp_path / "adapter"], tmp_path / "out", accept_causal=True)
    assert (tmp_path / "out" / "model-pvm.safetensors").is_file()


def test_other_methods_bases_and_sizes_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path):
    for method in METHODS:
        if method.config in (PVMConfig, *STEERING):
            continue
        method.config(**method.of_the_model).save_pretrained(tmp_path / method.name)
        said = refused(tmp_path / method.name, base, tmp_path)
        assert f"of {method.config.method}, which needs more than vLLM's kernels show or do" in said
        assert "there are pvm, dipe, vaf, log_bias" in said
    FAMILIES["llava"].build().save_pretrained(tmp_path / "other")
    assert "is of type 'llava'" in refused(adapters["dipe"], tmp_path / "other", tmp_path)
    other_text = FAMILIES["internvl"].build()
    other_text.config.text_config = FAMILIES["llava"].config().text_config
    other_text.save_pretrained(tmp_path / "other-text")
    assert "is of type 'llama'" in refused(adapters["dipe"], tmp_path / "other-text", tmp_path)
    tiny = FAMILIES["qwen3_vl"].build()
    tiny.save_pretrained(tmp_path / "smaller")
    assert "must be of shape" in refused(adapters["pvm"], tmp_path / "smaller", tmp_path)
    DIPEConfig(layers_to_transform=[6]).save_pretrained(tmp_path / "dipe")
    assert "acts on layers [6], but" in refused(tmp_path / "dipe", base, tmp_path)
    FAMILIES["qwen3_5"].build().save_pretrained(tmp_path / "linear")
    DIPEConfig(layers_to_transform=[0]).save_pretrained(tmp_path / "first")
    assert "has attention in [1, 2, 3] only" in refused(tmp_path / "first", tmp_path / "linear", tmp_path)
    DIPEConfig(anchor="image", max_distance=3).save_pretrained(tmp_path / "by-image")
    assert "has anchor='image'" in refused(tmp_path / "by-image", base, tmp_path)
    DIPEConfig(axes="time", max_distance=3).save_pretrained(tmp_path / "by-axis")
    assert "has axes='time'" in refused(tmp_path / "by-axis", base, tmp_path)
    together = f"{adapters['dipe']}+{adapters['dipe-some-layers']}"
    assert "are both adapters of dipe, of which one can be on at once" in refused(together, base, tmp_path)
    with_lora = f"{adapters['dipe']}+{adapters['lora']}"
    assert "give it to vLLM with --lora-modules" in refused(with_lora, base, tmp_path)
    assert "give it to vLLM with --lora-modules" in refused(adapters["lora"], base, tmp_path, by_request=True)
    with pytest.raises(ValueError, match="No adapter is given"):
        export_vllm(base, [], tmp_path / "out")
    shutil.rmtree(tmp_path / "base")
    result = CliRunner().invoke(app, ["export-vllm", str(base), str(adapters["dipe"]), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Error" in result.output


def test_the_base_is_not_written_over(base: Path, adapters: dict[str, Path]):
    before = {path: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ValueError, match="is left as it is"):
        export_vllm(base, [adapters["dipe"]], base)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_a_damaged_adapter_is_refused(base: Path, tmp_path: Path):
    model = get_peft_model(load_tiny_vlm(), PVMConfig(r=32, layers_to_transform=[1]))
    give_weight(model)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refused(tmp_path / "adapter", base, tmp_path)

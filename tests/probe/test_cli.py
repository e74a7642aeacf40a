"""`peft-pvm probe` on tiny models of three families with their real processors."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from methods_under_test import METHODS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processors import PROCESSORS
from safetensors.torch import save_file
from tiny_vlms import FAMILIES, TEXT


pytest.importorskip("typer", reason="the command needs typer, of the extra lab")
pytest.importorskip("matplotlib", reason="the command needs matplotlib, of the extra lab")

from PIL import Image
from typer.testing import CliRunner

from peft_pvm.cli.app import app
from peft_pvm.probe import ProbeResult, verdict
from peft_pvm_cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, png: bytes) -> Path:
    """Models with their processors, adapters of each, an image, and a model without eyes."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "image.png").write_bytes(png)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    for name, processor in PROCESSORS.items():
        FAMILIES[name].build().save_pretrained(folder / name)
        processor().save_pretrained(folder / name)
        for method in ("pvm", "dipe"):
            METHODS[method].attach(FAMILIES[name].build()).save_pretrained(folder / f"{name}-{method}")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(FAMILIES["llava"].build(), lora).save_pretrained(folder / "llava-lora")
    shutil.copytree(folder / "llava-lora", folder / "elsewhere" / "llava-lora")
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=4, num_layers=1)
    tuning.save_pretrained(folder / "prompt-tuning")
    save_file({"prompt_embeddings": torch.zeros(2, 4)}, folder / "prompt-tuning" / "adapter_model.safetensors")
    for name, layers in (("deeper", 5), ("shallower", 2)):
        other = FAMILIES["llava"].config()
        other.text_config = T.LlamaConfig(**{**TEXT, "num_hidden_layers": layers})
        other = T.LlavaForConditionalGeneration(other)
        get_peft_model(other, lora).save_pretrained(folder / f"{name}-lora")
    deepest = METHODS["pvm"].attach(FAMILIES["qwen3_5"].build(), layers_to_transform=[3])
    deepest.save_pretrained(folder / "deeper-pvm")
    T.LlamaForCausalLM(T.LlamaConfig(**TEXT)).save_pretrained(folder / "blind")
    return folder


def run(folder: Path, model: str, *options: str, image: str = "image.png", out: str = "report"):
    arguments = ["probe", "--model", str(folder / model), "--image", str(folder / image), "--out", str(folder / out)]
    arguments += ["--prompt", "what is it?", "--max-new-tokens", "4", *options]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_report_of_a_model_with_adapters(family: str, folder: Path):
    out = f"report-{family}"
    loras = {"llava-lora": "llava-lora", "llava-lora-2": "elsewhere/llava-lora"} if family == "llava" else {}
    adapters = {f"{family}-pvm": f"{family}-pvm", f"{family}-dipe": f"{family}-dipe", **loras}
    options = [option for source in adapters.values() for option in ("--adapter", str(folder / source))]
    done = run(folder, family, *options, out=out)
    assert done.exit_code == 0, done.output
    result = ProbeResult.load(folder / out)
    assert all(sentence in done.stdout.replace("\n", " ") for sentence in verdict(result))
    assert [adapter.name for adapter in result.adapters] == list(adapters)
    assert all(adapter.active for adapter in result.adapters)
    assert min(max(adapter.kl_alone) for adapter in result.adapters) > 1e-6
    assert {branch.adapter for branch in result.branches} == {f"{family}-pvm"}
    assert result.prompt == "what is it?"
    assert result.num_visual_tokens == {"llava": 4, "gemma3": 4, "idefics3": 1}[family]
    (width, height), cropped = struct.unpack(">II", result.images[0][16:24]), family == "llava"
    assert (width, height) == ((40, 40) if cropped else (60, 40))  # what lies under the map is what the model saw
    assert (folder / out / "report.html").is_file()


def test_a_model_alone(folder: Path):
    done = run(folder, "llava", "--dtype", "float32", "--attn-implementation", "eager", out="alone")
    assert done.exit_code == 0, done.output
    result = ProbeResult.load(folder / "alone")
    assert result.settings["attn_implementation"] == "eager"
    assert [forward.name for forward in result.forwards] == ["base"]


def test_the_tokens_to_retrieve_for_are_chosen(folder: Path):
    options = ("--adapter", str(folder / "llava-pvm"))
    assert run(folder, "llava", *options, out="default").exit_code == 0
    shown = ProbeResult.load(folder / "default").retrieval_tokens  # all: the answer is short
    options += ("--retrieval-token", str(shown[-1]))
    assert run(folder, "llava", *options, out="chosen").exit_code == 0
    assert ProbeResult.load(folder / "chosen").retrieval_tokens == shown[-1:]
    assert "retrieval_tokens names [9]" in run(folder, "llava", *options, "--retrieval-token", "9").output


def test_errors_say_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def error(*args, **kwargs) -> str:
        done = run(folder, *args, **kwargs)
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code in (1, 2)
        return done.stderr

    assert "nothing takes its" in error("llava", "--adapter", str(folder / "deeper-lora"))
    assert "it lacks model." in error("llava", "--adapter", str(folder / "shallower-lora"))

    # The rest is said before the weights are loaded.
    def load(*args, **kwargs):
        raise AssertionError("The weights are loaded.")

    monkeypatch.setattr(T.AutoModelForImageTextToText, "from_pretrained", load)
    assert "nothing.png' does not exist" in error("llava", image="nothing.png")
    assert "cannot be read as an image" in error("llava", image="llava/config.json")
    assert "cannot be read as an image: Image size (400000000 pixels)" in error("llava", image="huge.png")
    assert "blind is a 'llama', but must be a model that reads images" in error("blind")
    assert "nowhere. Check the path." in error("nowhere")
    assert "does not fit" in error("llava", "--adapter", str(folder / "deeper-pvm"))
    assert "nowhere. Check the path." in error("llava", "--adapter", str(folder / "nowhere"))
    assert "prompt" in error("llava", "--adapter", str(folder / "prompt-tuning"))
    assert "'float12' is not one of 'auto'" in error("llava", "--dtype", "float12")
    assert "'nowhere' cannot be used" in error("llava", "--device", "nowhere")
    assert "--attn-implementation" in error("llava", "--attn-implementation", "nope")
    assert "is not a folder" in error("llava", out="image.png")
    assert "No --adapter is of PVM" in error("llava", "--retrieval-token", "0")
    options = ("--adapter", str(folder / "llava-pvm"), "--retrieval-token", "9")
    assert "retrieval_tokens names [9]" in error("llava", *options)


def test_what_cannot_be_probed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    attention = T.models.llama.modeling_llama.LlamaAttention
    monkeypatch.setattr(attention, "sinks", 4, raising=False)
    done = run(folder, "llava")
    assert done.exit_code == 1
    assert re.search(r"Error: .*attention sinks", done.stderr)


def test_no_foreign_code_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither loader is asked to trust what comes with a model."""
    asked: list[dict] = []
    for cls in (T.AutoModelForImageTextToText, T.AutoProcessor):
        load = cls.from_pretrained
        monkeypatch.setattr(
            cls, "from_pretrained", lambda *args, load=load, **kwargs: (asked.append(kwargs), load(*args, **kwargs))[1]
        )
    assert run(folder, "llava").exit_code == 0
    assert len(asked) == 2
    assert not any(kwargs.get("trust_remote_code") for kwargs in asked)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peft_pvm.utils.extras.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == (
        "Error: This needs typer and rich, which the extra 'lab' brings: "
        "pip install '.[lab]' in a checkout of peft-pvm."
    )


def test_what_a_command_lacks_is_said_before_its_work(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peft_pvm.utils.extras.find_spec", lambda name: None)
    monkeypatch.setattr("peft_pvm.folders.base_checkpoint.without_weights", lambda *args: pytest.fail("it is read"))
    done = run(folder, "llava")
    assert done.exit_code == 1
    assert "This needs jinja2 and matplotlib and pillow, which the extra 'lab' brings" in done.stderr


def test_the_library_needs_none_of_it():
    """In a process in which they cannot be imported."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["typer", "rich", "matplotlib", "PIL"]))
import peft_pvm, peft_pvm.probe, peft_pvm_cli
print(peft_pvm.probe.probe, peft_pvm_cli.main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reports_in_half_precision(folder: Path):
    done = run(folder, "llava", "--dtype", "bfloat16", "--adapter", str(folder / "llava-dipe"), out="half")
    assert done.exit_code == 0, done.output
    result = ProbeResult.load(folder / "half")
    assert result.settings["dtype"] == str(torch.bfloat16).removeprefix("torch.")
    assert all(0 < mass < 1 for mass in result.base.mean_mass)

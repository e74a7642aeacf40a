"""The experiment: every method trains and is tested, what is done is not done again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from experiments.base import fingerprint
from experiments.export import export_adapter
from experiments.methods import METHODS, PVM_PARAMETERS, STRIDED, Method, attach, trained_parameters
from experiments.runs import MAIN_RECIPE, RECIPES, evaluate_method, load_method, plan, run_folder, train_method
from experiments.summary import Results
from peft_pvm.demo import train as demo_train
from peft_pvm.demo.mosaic import make_questions
from peft_pvm.demo.recall import recall
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.demo.train import target_logits
from peft_pvm.methods.pvm.model import strided_layers


REPOSITORY = Path(__file__).parents[2]
TRAINED = [name for name, method in METHODS.items() if method.is_trained]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return target_logits(model.eval(), make_questions("test", 2, 20, 2, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_method_is_the_base_if_it_learns_and_another_model_if_not(name):
    model = load_tiny_vlm()
    attach(model, METHODS[name])
    same = torch.equal(logits(model), logits(load_tiny_vlm()))
    assert same == (name == "base" or METHODS[name].is_trained)


def test_the_controls_have_the_size_of_pvm():
    sizes = {}
    for name in ("pvm", "lora", "mlp"):
        model = load_tiny_vlm()
        attach(model, METHODS[name])
        sizes[name] = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert sizes["pvm"] == PVM_PARAMETERS
    assert sizes["lora"] == pytest.approx(PVM_PARAMETERS, rel=0.02)
    assert sizes["mlp"] == pytest.approx(PVM_PARAMETERS, rel=0.002)
    assert strided_layers(load_tiny_vlm().config.text_config) == STRIDED


def test_the_mlp_control_computes_a_gated_branch_beside_the_ffn():
    model = load_tiny_vlm()
    attach(model, METHODS["mlp"])
    branch = model.model.language_model.layers[3].mlp.branch
    x = torch.randn(2, 5, 128)
    assert torch.equal(branch(x), torch.zeros_like(x))
    branch.gate.weight.data.fill_(2.0)
    latent = branch.norm(branch.reducer(x))
    inner = torch.nn.functional.silu(branch.gate_proj(latent)) * branch.up_proj(latent)
    expanded = branch.expander(branch.down_proj(inner))
    expected = 2 * expanded / (expanded.pow(2).mean(-1, keepdim=True) + branch.eps).sqrt()
    torch.testing.assert_close(branch(x), expected)

    seen = []
    layer = model.model.language_model.layers[3]
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    logits(model)
    ffn = type(layer.mlp).forward(layer.mlp, layer.post_attention_layernorm(seen[0]))
    torch.testing.assert_close(seen[1], seen[0] + ffn + branch(seen[0]))


@pytest.mark.parametrize("name", ["pvm", "mlp"])
def test_seeds_start_from_weights_of_their_own(name):
    weights = []
    for seed in (0, 0, 1):
        model = load_tiny_vlm()
        attach(model, METHODS[name], seed)
        weights.append(torch.cat([parameter.flatten() for parameter in trained_parameters(model).values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_and_loads_back(name, tmp_path):
    folder = train_method(name, MAIN_RECIPE, 1, tmp_path, steps=2, hidden_steps=0)
    model = load_tiny_vlm()
    attach(model, METHODS[name], seed=1)
    fresh = {key: parameter.detach().clone() for key, parameter in trained_parameters(model).items()}
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == fresh.keys()
    assert all(not torch.equal(weights[key], fresh[key]) for key in weights)
    loaded = load_method(name, MAIN_RECIPE, 1, tmp_path)
    assert all(torch.equal(dict(loaded.named_parameters())[key], weights[key]) for key in weights)
    assert not torch.equal(logits(loaded), logits(load_tiny_vlm()))


def quick(monkeypatch):
    monkeypatch.setattr("experiments.runs.LENGTHS", (0, 64))
    monkeypatch.setattr("experiments.runs.SEVERAL_IMAGES_LENGTHS", (0,))
    monkeypatch.setattr("experiments.runs.WRITTEN_CELLS", 18)


def test_the_control_is_tested_like_the_rest(tmp_path, monkeypatch):
    quick(monkeypatch)
    train_method("mlp", "plain-1024", 0, tmp_path, steps=1, hidden_steps=0)
    result = json.loads(evaluate_method("mlp", "plain-1024", 0, tmp_path, tmp_path / "results", rows=1).read_text())
    assert result["parameters"] == pytest.approx(PVM_PARAMETERS, rel=0.002)
    assert all(len(by_layer) == 6 for by_layer in result["visual mass"].values())


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    quick(monkeypatch)
    folder = train_method("pvm", MAIN_RECIPE, 0, tmp_path / "runs", steps=1, hidden_steps=0)
    file = evaluate_method("pvm", MAIN_RECIPE, 0, tmp_path / "runs", tmp_path / "results", rows=1)
    before = [(path, os.stat(path).st_mtime_ns) for path in (*folder.iterdir(), file)]
    assert train_method("pvm", MAIN_RECIPE, 0, tmp_path / "runs", steps=1, hidden_steps=0) == folder
    assert evaluate_method("pvm", MAIN_RECIPE, 0, tmp_path / "runs", tmp_path / "results", rows=1) == file
    assert [(path, os.stat(path).st_mtime_ns) for path in (*folder.iterdir(), file)] == before


def test_what_was_done_by_another_recipe_or_base_is_refused(tmp_path, monkeypatch):
    folder = train_method("pvm", MAIN_RECIPE, 0, tmp_path, steps=1, hidden_steps=0)
    refused = f"Remove {re.escape(str(folder))}"
    with pytest.raises(ValueError, match=refused):
        train_method("pvm", MAIN_RECIPE, 0, tmp_path, steps=2, hidden_steps=0)
    monkeypatch.setattr("experiments.runs.fingerprint", lambda: "another")
    with pytest.raises(ValueError, match=refused):
        train_method("pvm", MAIN_RECIPE, 0, tmp_path, steps=1, hidden_steps=0)


def test_a_checkpoint_is_removed_only_once_the_weights_are_saved(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(demo_train, "CHECKPOINT_EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.runs.save_run", full)
        with pytest.raises(OSError, match="No space left"):
            train_method("pvm", MAIN_RECIPE, 0, tmp_path, steps=2, hidden_steps=0)
    (checkpoint,) = tmp_path.rglob("checkpoint.safetensors")
    steps, draw = [], demo_train.draw_step
    monkeypatch.setattr(
        demo_train, "draw_step", lambda step, *rest, **named: steps.append(step) or draw(step, *rest, **named)
    )
    train_method("pvm", MAIN_RECIPE, 0, tmp_path, steps=2, hidden_steps=0)
    assert steps == [1], "it goes on after the first step"
    assert not checkpoint.exists()


def test_a_result_says_where_it_comes_from(tmp_path, monkeypatch):
    quick(monkeypatch)
    train_method("pvm", MAIN_RECIPE, 2, tmp_path, steps=1, hidden_steps=0)
    result = json.loads(evaluate_method("pvm+dipe", MAIN_RECIPE, 2, tmp_path, tmp_path, rows=2).read_text())
    assert result["parameters"] == PVM_PARAMETERS
    assert result["training"]["recipe"]["seed"] == result["seed"] == 2
    assert result["training"]["recipe"]["steps"] == 1
    assert {"torch", "transformers", "peft", "Platform", "CPU threads"} <= result["environment"].keys()
    assert [len(right) for right in result["right of nine"]["one mosaic"].values()] == [2] * 2


def test_an_adapter_is_exported_with_its_results(tmp_path, monkeypatch):
    quick(monkeypatch)
    runs, results, out = tmp_path / "runs", tmp_path / "results", tmp_path / "adapter"
    train_method("pvm", MAIN_RECIPE, 3, runs, steps=1, hidden_steps=0)
    with pytest.raises(FileNotFoundError, match="python -m experiments eval"):
        export_adapter(MAIN_RECIPE, 3, runs, results, out)
    tested = evaluate_method("pvm", MAIN_RECIPE, 3, runs, results, rows=2)
    for file in (tested, evaluate_method("base", None, 0, runs, results, rows=2)):
        content = json.loads(file.read_text())
        right = content["right of nine"]
        if file == tested:
            right["one mosaic"]["64"] = "99"  # which the base does not reach
        right["transcription"] |= dict.fromkeys(("4", "8", "16", "28"), "09")  # in place of two times nine cells
        file.write_text(json.dumps(content))
    export_adapter(MAIN_RECIPE, 3, runs, results, out)
    exported = PeftModel.from_pretrained(load_tiny_vlm(), out)
    assert torch.equal(logits(exported), logits(load_method("pvm", MAIN_RECIPE, 3, runs)))
    card = (out / "README.md").read_text()
    base = Results(results).only("base", None, 0).cell("one mosaic", 64)
    assert f"| 64 | {base} | 1.000 ± 0.000 |" in card
    assert ModelCard(card).data.library_name == "peft"


def test_the_plan():
    runs = plan()
    assert len(set(runs)) == len(runs)
    assert {run.method for run in runs} == set(METHODS)
    for run in runs:
        method = METHODS[run.method]
        assert (run.recipe is None) == (not method.is_trained and method.weights_of is None)
        source = method.weights_of
        assert source is None or runs.index(run._replace(method=source)) < runs.index(run)
    assert {run.recipe for run in runs} == {None, *RECIPES}
    assert {run.seed for run in runs if run.method == "pvm"} == {0, 1, 2}
    assert plan(["pvm"], [MAIN_RECIPE], [7]) == [("pvm", MAIN_RECIPE, 7)]


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no method 'nothing'; there are base"):
        plan(["nothing"])
    with pytest.raises(ValueError, match="no recipe 'nothing'"):
        plan(["pvm"], ["nothing"])
    with pytest.raises(ValueError, match="dipe has no training"):
        train_method("dipe", MAIN_RECIPE, 0, tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m experiments train --method pvm"):
        load_method("pvm+dipe", MAIN_RECIPE, 0, tmp_path)
    folder = run_folder(tmp_path, "pvm", MAIN_RECIPE, 0)
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    (folder / "run.json").write_text(json.dumps({"base": "another"}))
    with pytest.raises(ValueError, match="trained on base another"):
        load_method("pvm", MAIN_RECIPE, 0, tmp_path)
    (folder / "run.json").write_text(json.dumps({"base": fingerprint()}))
    with pytest.raises(ValueError, match="does not hold the weights of this method"):
        load_method("pvm", MAIN_RECIPE, 0, tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m experiments eval"):
        Results(tmp_path)


def test_a_method_may_be_new():
    assert not Method("nothing").is_trained
    assert Method("branch", add_branches=METHODS["mlp"].add_branches).is_trained


def test_the_shipped_adapter_is_the_one_that_its_card_tells_of():
    shipped = REPOSITORY / "adapters" / "pvm-tiny-vlm"
    model = PeftModel.from_pretrained(load_tiny_vlm(), shipped)
    result = Results(REPOSITORY / "experiments" / "results").only("pvm", "hidden-1024-long", 0)
    for length in (0, 512):
        accuracy = recall(model, length)
        assert accuracy.value == pytest.approx(result.cell("one mosaic", length).mean, abs=0.01)
        assert f"| {result.cell('one mosaic', length)} |" in (shipped / "README.md").read_text()

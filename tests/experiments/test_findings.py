"""Findings about the real base, on a tiny random language model in its place, each against something independent."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from language_models import tiny_language_model
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from experiments.commands import app
from experiments.real import commands
from experiments.real.arithmetic import BF16
from experiments.real.chats import make_real_chats
from experiments.real.evaluation import EvalPlan, Place, Run, evaluate
from experiments.real.findings import costs, heads, knowing, looking, plan
from experiments.real.findings import study as findings_study
from experiments.real.findings.heads import DIPEInHeads, dipe_heads, worst_first
from experiments.real.findings.knowing import streams, text, text_losses
from experiments.real.findings.looking import look
from experiments.real.findings.looking_page import distance, fading, heads_of, on_cell, on_image, rank_correlation
from experiments.real.findings.page import SECTIONS, render_findings
from experiments.real.findings.plan import FINDINGS, FindingPlan, find
from experiments.real.findings.study import Study
from experiments.real.findings.words import paired, ranges
from experiments.real.methods import METHODS
from experiments.real.vlm import new_vlm, save_vlm
from peft_pvm import DIPEConfig, PVMConfig, attached
from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.demo.questions import PLACES, Questions
from peft_pvm.env import environment
from peft_pvm.probe.calibrate import calibrate
from peft_pvm.probe.rows import read_chats


RECORDED = Path(__file__).parents[2] / commands.RECORDED / "findings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the base. It was not trained: where it looks is as good as any other place."""
    path = tmp_path_factory.mktemp("base")
    language_model = tiny_language_model()
    save_vlm(new_vlm(language_model), language_model, path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    """A PVM adapter that changes what it touches."""
    path = tmp_path_factory.mktemp("adapters") / "pvm"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, PVMConfig(r=16, layers_to_transform=[1], init_gate=1.0)).save_pretrained(path)
    return path


@pytest.fixture
def study(folder, tmp_path) -> Study:
    return Study("any", folder, tmp_path / "any.json", rows=2)


@pytest.fixture
def short(monkeypatch) -> None:
    """Everything measured, with as little text as shows something."""
    monkeypatch.setattr(looking, "LENGTHS", (0, 64, 70, 80))
    monkeypatch.setattr(looking, "GROUP", 2)
    monkeypatch.setattr(looking, "GROUP_LENGTHS", (0, 150))
    monkeypatch.setattr(looking, "LIMITS", (0, 16))
    monkeypatch.setattr(looking, "LIMIT_LENGTHS", (20, 30))
    monkeypatch.setattr(looking, "CALIBRATED", (0, 8))
    monkeypatch.setattr(heads, "LENGTHS", (0, 15))
    monkeypatch.setattr(heads, "SHARES", (0.1, 0.5))
    monkeypatch.setattr(costs, "LENGTHS", (0, 5))
    monkeypatch.setattr(costs, "TIMED", ("base", "t-drs", "lora"))  # the others need layers that are not there
    monkeypatch.setattr(knowing, "PROBED", (("in sight", 0), ("hidden", 0), ("in sight", 5)))
    monkeypatch.setattr(knowing, "WINDOW", 20)


@pytest.mark.parametrize("configs", [[], [DIPEConfig(max_distance=0)]], ids=["base", "dipe"])
def test_attention_is_that_of_eager_attention(study, configs):
    model = study.model
    with attached(model, *configs):
        found = look(study, 30)
        model.set_attn_implementation("eager")
        layers, asked_cells, right, losses = [], [], "", []
        for row in range(2):
            batch = study.draw(row, 30)
            ids, asked = batch.inputs["input_ids"][0], batch.inputs["logits_to_keep"]
            with torch.no_grad():
                seen = model(**{**batch.inputs, "logits_to_keep": 0}, use_cache=False, output_attentions=True)
            weights = torch.stack(seen.attentions)[:, 0][:, :, asked]  # layers, heads, nine, keys
            image = (ids == study.questions.visual).nonzero()[:, 0]
            layers.append(weights[..., image].sum(-1).mean(2))
            words = [study.questions.tokenizer.decode(ids[place - 2 : place]).strip() for place in asked]
            cells = torch.tensor([PLACES.index(word) for word in words])
            asked_cells.append(weights[:, :, torch.arange(9), image[cells]].mean((1, 2)))
            log_p = seen.logits[0, asked].log_softmax(-1)
            right += str(int((log_p.argmax(-1) == batch.targets[0]).sum()))
            losses.append(-float(log_p[torch.arange(9), batch.targets[0]].mean()))
    expected = torch.stack(layers).mean(0)
    torch.testing.assert_close(torch.tensor(heads_of(found)), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.tensor(on_image(found)), expected.mean(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.tensor(on_cell(found)), torch.stack(asked_cells).mean(0), rtol=1e-3, atol=1e-6)
    assert found["right of nine"] == right
    assert found["loss by row"] == pytest.approx(losses, rel=1e-3)
    in_sight = [float(study.draw(row, 30).inputs["logits_to_keep"].double().mean()) + 1 - 9 for row in range(2)]
    assert found["text tokens in sight"] == pytest.approx(sum(in_sight) / 2)


def test_rows_are_those_of_the_evaluation(folder, study, tmp_path):
    tested = evaluate(Place(folder), [Run("base", None)], [], EvalPlan(lengths=(20,), rows=2), tmp_path)
    assert look(study, 20)["right of nine"] == "".join(map(str, tested["base"].right[20]))


def test_dipe_acts_in_the_layers_that_a_case_names(folder, tmp_path, short):
    rows = FindingPlan(("dipe-layers",), rows=1)
    (path,) = find(folder, rows, tmp_path)
    cells = json.loads(path.read_text())["measured"]
    layers = {
        "base": None,
        "all layers": {"layers_to_transform": [0, 1, 2]},
        "all layers, limit 128": {"max_distance": 128},
        "layers 0 to 1 alone": {"layers_to_transform": [0, 1]},
        "all but layers 0 to 1": {"layers_to_transform": [2]},
        "layers 2 to 2 alone": {"layers_to_transform": [2]},
        "all but layers 2 to 2": {"layers_to_transform": [0, 1]},
    }
    assert list(cells) == list(layers)
    study = Study("any", folder, tmp_path / "any.json", rows=1)
    for case, fields in layers.items():
        with attached(study.model, *([] if fields is None else [DIPEConfig(**{"max_distance": 0, **fields})])):
            measured = {name: value for name, value in cells[case]["150"].items() if name != "CPU seconds"}
            assert measured == look(study, 150), case
    losses = {case: by_length["150"]["loss by row"][0] for case, by_length in cells.items()}
    assert len(set(losses.values())) == 5, "two pairs are the same layers"


def test_dipe_acts_in_the_heads_that_it_is_told(study):
    """In the first layer, before anything else differs: these heads attend as with DIPE, the others as without."""
    study.model.set_attn_implementation("eager")
    inputs = {**study.draw(0, 30).inputs, "logits_to_keep": 0}

    def weights(*configs) -> torch.Tensor:
        with attached(study.model, *configs), torch.no_grad():
            return study.model(**inputs, use_cache=False, output_attentions=True).attentions[0][0]

    base, dipe = weights(), weights(DIPEConfig(max_distance=0))
    some = weights(DIPEInHeads(heads={0: [1, 2]}))
    assert len(base) == 4
    assert all(not torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(base, dipe))
    for head, found in enumerate(some):
        torch.testing.assert_close(found, (dipe if head in (1, 2) else base)[head])


def test_heads_are_ranked_by_validation_and_tested_on_the_test_split(folder, tmp_path, short):
    study = Study("dipe-heads", folder, tmp_path / "dipe-heads.json", rows=2)
    dipe_heads(study)
    cells = study.cells
    assert list(cells["one head alone"]) == [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    worst = worst_first(cells["one head alone"])
    for head in worst:
        with attached(study.model, DIPEInHeads(heads={head[0]: [head[1]]})):
            losses = torch.tensor(cells["one head alone"]["{}.{}".format(*head)]["loss by row"])
            torch.testing.assert_close(losses, losses_of(study, 0, "validation"), rtol=1e-4, atol=1e-6)
    means = [sum(cells["one head alone"][f"{layer}.{head}"]["loss by row"]) for layer, head in worst]
    assert means == sorted(means, reverse=True)
    drawn = [(number // 4, number % 4) for number in torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    for case, count, acting in (
        ("only the worst", 6, worst[:6]),
        ("all but the worst", 1, worst[1:]),
        ("only random ones", 6, [(int(layer), int(head)) for layer, head in drawn[:6]]),
    ):
        by_layer = {layer: [head for other, head in acting if other == layer] for layer, _ in acting}
        with attached(study.model, DIPEInHeads(heads=by_layer)):
            losses = torch.tensor(cells[f"{case}, 15"][str(count)]["loss by row"])
            torch.testing.assert_close(losses, losses_of(study, 15, "test"), rtol=1e-4, atol=1e-6)
    with attached(study.model, DIPEConfig(max_distance=0)):
        losses = torch.tensor(cells["all heads"]["15"]["loss by row"])
        torch.testing.assert_close(losses, losses_of(study, 15, "test"), rtol=1e-4, atol=1e-6)
    assert set(cells) == {
        "base",
        "one head alone",
        "all heads",
        *(f"{case}, {n}" for case in ("only the worst", "only random ones", "all but the worst") for n in (0, 15)),
    }


@torch.no_grad()
def losses_of(study: Study, text_tokens: int, split: str) -> torch.Tensor:
    """By row, as transformers computes logits."""
    losses = []
    for row in range(study.rows):
        batch = study.draw(row, text_tokens, split)
        logits = study.model(**{**batch.inputs, "logits_to_keep": 0}, use_cache=False).logits
        log_p = logits[0, batch.inputs["logits_to_keep"]].log_softmax(-1)
        losses.append(-log_p[torch.arange(9), batch.targets[0]].mean())
    return torch.stack(losses)


@pytest.mark.parametrize("hurts", [True, False])
def test_claims_about_heads_turn_with_the_numbers(tmp_path, hurts):
    """Ten heads, of which one is a tenth: alone it does what all do, or nothing."""
    bad, good = planted(0.1, 2.0, right="11"), planted(0.1, 0.1)
    layers = (4, 3, 2, 1, 0) if hurts else range(5)
    alone = {f"{layer}.{head}": planted(0.1, loss) for loss, layer in enumerate(layers, 1) for head in (0, 1)}
    alone["4.0" if hurts else "0.0"] = planted(0.1, 9.0)
    half = bad if hurts else good
    tested = {"only the worst": bad if hurts else good, "all but the worst": good if hurts else bad}
    cells = {
        "base": dict.fromkeys(("validation", "0", "1024"), good),
        "one head alone": alone,
        "all heads": {"0": bad, "1024": bad},
        **{f"{case}, {n}": {"1": cell, "5": half} for case, cell in tested.items() for n in (0, 1024)},
        **{f"only random ones, {n}": {"1": good, "5": bad} for n in (0, 1024)},
    }
    worst, others = ("holds", "does not hold") if hurts else ("does not hold", "holds")
    assert verdicts(tmp_path, "dipe-heads", cells) == [worst, others, worst] * 2
    worst = f"most in these, by layer and number: {'4.0' if hurts else '0.0'} (+8.9000 ± 0.0000), "
    assert worst in render_findings(tmp_path)


def test_costs_are_those_of_each_method(folder, tmp_path, short, monkeypatch):
    """The clock stands still but where the model runs: twice as long with an adapter, and for long at first."""
    now, warm = 0.0, set()

    def forward(model, batch):
        nonlocal now
        case = model, batch.inputs["input_ids"].shape[1]
        now += 100.0 if case not in warm else 0.2 if getattr(model, "peft_config", None) else 0.1
        warm.add(case)

    monkeypatch.setattr(costs, "target_logits", forward)
    monkeypatch.setattr(costs.time, "process_time", lambda: now)
    find(folder, FindingPlan(("costs",), rows=2), tmp_path)
    cells = json.loads((tmp_path / "costs.json").read_text())["measured"]
    assert list(cells) == ["base", "t-drs", "lora"]
    page = render_findings(tmp_path)
    of_base, of_tdrs = ("0.10 (0.10 to 0.10)", "1.00 x"), ("0.20 (0.20 to 0.20)", "2.00 x")
    assert f"| base | {' | '.join(of_base * 2)} |" in page
    assert f"| T-DRS | {' | '.join(of_tdrs * 2)} |" in page
    cells.pop("lora")
    content = {**json.loads((tmp_path / "costs.json").read_text()), "measured": cells}
    (tmp_path / "costs.json").write_text(json.dumps(content))
    monkeypatch.setattr(costs.time, "process_time", lambda: 3 * now)
    find(folder, FindingPlan(("costs",), rows=2), tmp_path)
    assert "| base | 0.30 (0.30 to 0.30) | 1.00 x |" in render_findings(tmp_path), "times of one go"


def test_methods_and_limits_act_in_the_cases_that_name_them(folder, tmp_path, short):
    names = {"base": None, "dipe": 0, "dipe-128": 128}, {"base": None, "0": 0, "16": 16}
    study = Study("any", folder, tmp_path / "any.json", rows=1)
    for path, distances in zip(find(folder, FindingPlan(("attention", "limit"), rows=1), tmp_path), names):
        cells = json.loads(path.read_text())["measured"]
        assert list(cells) == list(distances)
        for case, limit in distances.items():
            with attached(study.model, *([] if limit is None else [DIPEConfig(max_distance=limit)])):
                for length, cell in cells[case].items():
                    assert cell == {**look(study, int(length)), "CPU seconds": cell["CPU seconds"]}, (case, length)


def test_calibrating_is_what_the_command_does(folder, tmp_path, short):
    pytest.importorskip("datasets", reason="chats need the extra `train`")
    (path,) = find(folder, FindingPlan(("calibrate",), rows=2), tmp_path)
    (cell,) = json.loads(path.read_text())["measured"]["calibrate"].values()
    chats = read_chats(make_real_chats(Questions.of(folder), 2, 64, "validation"), 2)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = calibrate(model, AutoProcessor.from_pretrained(folder), chats, (0, 8))
    assert (cell["max_distance"], cell["reason"]) == (found.max_distance, found.reason)
    expected = {
        distance: {n: seen.loss for n, seen in by_length.items()} for distance, by_length in found.answers.items()
    }
    for case, by_length in cell["loss"].items():
        for length, loss in by_length.items():
            assert loss == pytest.approx(expected[None if case == "base" else int(case)][int(length)], rel=1e-5)


def planted(mass: float, loss: float, asked: float = 0.1, right: str = "99") -> dict:
    """A cell of two layers with two heads."""
    return {
        "visual mass by layer": [f"{mass} {mass}"] * 2,
        "mass on the asked cell by layer": f"{asked} {asked}",
        "text tokens in sight": 100 / mass,
        "right of nine": right,
        "loss by row": [loss, loss + 0.001],
    }


def verdicts(folder: Path, finding: str, cells: dict) -> list[str]:
    about = {"finding": finding, "base": "x", "split": "test", "seed": 0, "rows": 2}
    written = json.dumps({**about, "measured": cells, "environment": environment()})
    (folder / f"{finding}.json").write_text(written)
    return re.findall(r"\| (holds|does not hold) \|", render_findings(folder))


@pytest.mark.parametrize(("loss", "verdict"), [(0.5, "holds"), (0.505, "holds"), (0.6, "does not hold")])
def test_the_rule_of_the_limit_is_judged_by_the_answers(tmp_path, loss, verdict):
    """It picks 32, which looks like the base, and which is right if 128 is not better by more than counts."""
    cells = {
        "base": {"0": planted(0.3, 0.0), "1024": planted(0.05, 2.0)},
        "0": {"1024": planted(0.9, 1.0)},
        "32": {"1024": planted(0.29, loss)},
        "128": {"1024": planted(0.2, 0.5)},
    }
    assert verdicts(tmp_path, "limit", cells) == [verdict] * 2
    assert f"so as good are {'32, ' if verdict == 'holds' else ''}128 |" in render_findings(tmp_path)


def test_claims_about_attention_turn_with_the_numbers(tmp_path):
    """Attention falls like 1/t where it does, and answers follow what they are made to follow."""
    masses = {"0": 0.8, "64": 0.4, "256": 0.2, "1024": 0.1}  # times tokens in sight: 100
    base = {length: planted(mass, 1 / mass, asked=mass) for length, mass in masses.items()}
    base["0"]["text tokens in sight"] = 249  # as many as with 64 between: it is not on the curve, and need not be
    dipe = {
        length: planted(0.9 + mass / 10, 30 / mass, asked=mass / 50, right="11") for length, mass in masses.items()
    }
    assert verdicts(tmp_path, "attention", {"base": base, "dipe": dipe}) == ["holds", "holds", "does not hold"]
    assert "from each length to the next: 1.00, 1.00 |" in render_findings(tmp_path)
    base["256"]["text tokens in sight"] = 300
    assert verdicts(tmp_path, "attention", {"base": base, "dipe": dipe})[0] == "does not hold", "it is bent"
    flat = {
        length: {**cell, "right of nine": "55", "text tokens in sight": 100.0 / mass**3}
        for (length, cell), mass in zip(base.items(), masses.values())
    }
    swapped = {
        length: planted(2 * mass, 0.5 / mass, asked=0.5 - mass / 2) for length, mass in {"0": 0.45, "64": 0.2}.items()
    }
    assert verdicts(tmp_path, "attention", {"base": flat, "dipe": swapped}) == [
        "does not hold",
        "does not hold",
        "holds",
    ]


@pytest.mark.parametrize("hurts", [True, False])
def test_claims_about_dipe_turn_with_the_numbers(tmp_path, hurts):
    near, far = planted(0.2, 0.1, asked=0.1), planted(0.1, 0.5, asked=0.05)
    base = {"0": near, "1024": far}
    dipe = {"0": planted(0.5, 2, asked=0.01, right="11")} if hurts else {"0": planted(0.1, 0.1, asked=0.2)}
    limited = {"0": near, "1024": planted(0.1, 0.2, asked=0.09)} if hurts else {"0": planted(0.2, 0.3), "1024": far}
    cells = {
        "base": base,
        "all layers": {**dipe, "1024": far},
        "all layers, limit 128": limited,
        "layers 0 to 0 alone": {"0": planted(0.5, 2, right="44" if hurts else "99"), "1024": far},
        "layers 1 to 1 alone": base,
        "all but layers 0 to 0": base,
        "all but layers 1 to 1": base,
    }
    assert verdicts(tmp_path, "dipe-layers", cells) == (
        ["holds"] * 5 if hurts else ["does not hold"] * 2 + ["holds"] + ["does not hold"] * 2
    )
    cells["layers 0 to 0 alone"]["0"] = planted(0.5, 2, right="77")
    assert verdicts(tmp_path, "dipe-layers", cells)[2] == ("does not hold" if hurts else "holds")


@pytest.mark.parametrize(
    ("hidden", "sight", "expected"),
    [
        (([0.95, 0.9], [0.1, 0.2]), ([0.9, 0.9], [0.2, 0.9]), ["holds", "holds", "does not hold"]),
        (([0.95, 0.8], [0.1, 0.2]), ([0.9, 0.9], [0.5, 0.9]), ["holds", "does not hold", "holds"]),
        (([0.95, 0.9], [0.1, 0.6]), ([0.8, 0.9], [0.2, 0.9]), ["does not hold", "does not hold", "holds"]),
    ],
)
def test_claims_about_probes_turn_with_the_numbers(tmp_path, hidden, sight, expected):
    cells = {
        f"image {image}": {"0": dict(zip(("cell by layer", "digit by layer"), accuracies))}
        for image, accuracies in {"in sight": sight, "hidden": hidden}.items()
    }
    assert verdicts(tmp_path, "readable", cells) == expected


def test_claims_about_text_turn_with_the_numbers(tmp_path):
    """Half a percent of perplexity after an image is a loss of 0.005 nats; without one, nothing may change."""

    def case(alone: float, behind: float) -> dict:
        return {when: {"loss": [loss, loss + 1]} for when, loss in zip(knowing.CONDITIONS, (alone, behind))}

    cells = {"base": case(2, 2), "dipe": case(2, 2.004), "pvm (0123)": case(2.001, 2.006)}
    verdict = verdicts(tmp_path, "text", {**cells, knowing.LANGUAGE_MODEL: {"alone": {"loss": [1.9, 2.9]}}})
    assert verdict == ["does not hold"] * 3
    assert "all but the adapter `pvm` |" in render_findings(tmp_path)
    assert "all but the adapter `pvm` (+0.6 %)" in render_findings(tmp_path)
    del cells["pvm (0123)"]
    assert verdicts(tmp_path, "text", cells) == ["holds"] * 2
    cells["pvm (0123)"] = case(2.001, 2.006)
    verdicts(tmp_path, "text", cells)
    page = render_findings(tmp_path)
    row = "| DIPE as published | 12.18 | none, bit for bit | 12.23 | +0.40 ± 0.00 % |"
    assert row in page
    assert "| the adapter `pvm` | 12.19 | +0.10 ± 0.00 % |" in page


def test_exponents_are_those_of_each_layer_and_head(tmp_path):
    """In one layer, heads fall as t^-1 and t^-2; in the other, all as t^-0.5."""
    cells = {
        str(tokens): {
            **planted(0.1, 0.1, asked=0.1),
            "visual mass by layer": [f"{1 / tokens} {1 / tokens**2}", f"{tokens**-0.5} {tokens**-0.5}"],
            "text tokens in sight": tokens,
        }
        for tokens in (64, 256, 1024)
    }
    verdicts(tmp_path, "attention", {"base": cells, "dipe": cells})
    page = render_findings(tmp_path)
    assert re.search(r"\| 0 \| 1\.0\d ± 0\.00 \| 1\.0 \| 2\.0 \|\n\| 1 \| 0\.50 ± 0\.00 \| 0\.5 \| 0\.5 \|", page)
    assert re.search(r"\| base \| .* \| 1 \| 1 \| 0 \| 2 \| 1 \| 1 \|", page)


def test_the_split_that_ranks_heads_does_not_test_them(folder, tmp_path):
    with pytest.raises(ValueError, match="ranks heads by the validation split"):
        find(folder, FindingPlan(("dipe-heads",), split="validation"), tmp_path)


def test_a_power_law_is_found_again():
    cells = [{"text tokens in sight": float(tokens)} for tokens in (100, 300, 1000, 5000)]
    fit = fading(cells, [0.7 * cell["text tokens in sight"] ** -1.3 for cell in cells])
    assert (fit.exponent, fit.standard_error) == (pytest.approx(1.3), pytest.approx(0, abs=1e-6))


def test_distance_of_attention():
    """Half as much in one layer of two makes log(2) / 2. By head, what rises counts like what falls."""
    one = {"visual mass by layer": ["0.2 0.4", "0.1 0.1"]}
    other = {"visual mass by layer": ["0.4 0.8", "0.1 0.1"]}
    moved = {"visual mass by layer": ["0.4 0.2", "0.1 0.1"]}
    assert distance(one, other) == pytest.approx(math.log(2) / 2)
    assert distance(one, moved) == pytest.approx(0, abs=1e-9)
    assert distance(one, moved, by_head=True) == pytest.approx(math.log(2) / 2)


def test_small_maths():
    assert rank_correlation([1.0, 5.0, 7.0], [0.1, 0.2, 30.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert paired([3.0, 4.0, 8.0], [1.0, 2.0, 3.0]) == (pytest.approx(3), pytest.approx(1))
    assert [ranges(numbers) for numbers in ([], [4], [0, 1, 2, 5, 7, 8])] == ["none", "4", "0 to 2, 5, 7 to 8"]


def test_streams_are_hidden_states_at_the_asked_tokens(study):
    found = streams(study, "train", 2, 5, hidden=False)
    for row in range(2):
        batch = study.draw(row, 5, "train")
        with torch.no_grad():
            outputs = study.model(**batch.inputs, output_hidden_states=True, use_cache=False)
        asked = batch.inputs["logits_to_keep"]
        here = slice(9 * row, 9 * row + 9)
        assert torch.equal(found.layers[0, here], outputs.hidden_states[1][0, asked])
        assert torch.equal(found.layers[1, here], outputs.hidden_states[2][0, asked])
        assert torch.equal(found.digits[here], batch.targets[0])
        assert sorted(found.cells[here].tolist()) == list(range(NUM_CELLS))


def test_a_hidden_image_is_hidden(study, monkeypatch):
    """What the picture shows changes the stream in sight, and not while the image is hidden."""
    before = {hidden: streams(study, "test", 1, 0, hidden).layers for hidden in (False, True)}
    draw = Study.draw

    def draw_another_picture(*args, **kwargs):
        batch = draw(*args, **kwargs)
        batch.inputs["pixel_values"] = -batch.inputs["pixel_values"]
        return batch

    monkeypatch.setattr(Study, "draw", draw_another_picture)
    after = {hidden: streams(study, "test", 1, 0, hidden).layers for hidden in (False, True)}
    assert torch.equal(before[True], after[True])
    assert not torch.allclose(before[False], after[False])
    assert not study.model.training


def test_probes_find_what_is_planted(folder, tmp_path, monkeypatch, short):
    """The cell in the first layer, the digit in the last, but the digit not while the image is hidden."""
    seen = knowing.streams
    drawn = []

    def plant(study, split, rows, text_tokens, hidden):
        found = seen(study, split, rows, text_tokens, hidden)
        drawn.append((split, len(found.digits), text_tokens, hidden))
        found.layers[:] = torch.randn(found.layers.shape, generator=torch.Generator().manual_seed(rows))
        found.layers[0, :, :9] = 10 * torch.nn.functional.one_hot(found.cells, 9).float()
        if not hidden:
            found.layers[2, :, 20:30] = 10 * (found.digits[:, None] == study.questions.digits).float()
        return found

    monkeypatch.setattr(knowing, "streams", plant)
    (path,) = find(folder, FindingPlan(("readable",), rows=5), tmp_path)
    cells = json.loads(path.read_text())["measured"]
    assert drawn == [
        (split, number, text_tokens, hidden)
        for text_tokens, hidden in ((0, False), (0, True), (5, False))
        for split, number in (("train", 180), ("test", 45))
    ]
    for image, by_length in cells.items():
        for cell in by_length.values():
            assert [accuracy > 0.95 for accuracy in cell["cell by layer"]] == [True, False, False]
            assert [accuracy > 0.95 for accuracy in cell["digit by layer"]] == [
                False,
                False,
                image == "image in sight",
            ]


def test_loss_is_that_of_the_model(study, monkeypatch):
    """Alone as transformers computes it; after an image, of the same tokens, with another result."""
    monkeypatch.setattr(knowing, "WINDOW", 20)
    alone, behind = (text_losses(study.model, study, behind_image) for behind_image in (False, True))
    asked = []
    forward = LlavaForConditionalGeneration.forward

    def keep(self, *args, **kwargs):
        asked.append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", keep)
    assert text_losses(study.model, study, True) == behind
    for inputs, with_image, without in zip(list(asked), behind, alone):
        ids = inputs["input_ids"]
        window = ids[:, -20:]
        labels = torch.full_like(ids, -100)
        labels[:, -19:] = ids[:, -19:]
        assert (ids == study.questions.visual).sum() == NUM_CELLS
        with torch.no_grad():
            direct = study.model(input_ids=ids, pixel_values=inputs["pixel_values"], labels=labels).loss
            assert with_image == pytest.approx(float(direct), rel=1e-5)
            assert without == pytest.approx(float(study.model(input_ids=window, labels=window).loss), rel=1e-5)
    assert not set(alone) & set(behind)
    written = "".join(study.questions.tokenizer.decode(inputs["input_ids"][0, -20:]) for inputs in asked[:2])
    whole = study.questions.tokenizer.decode(study.questions._text("test"))
    assert written in whole, "windows follow one another"


def test_text_alone_is_the_same_to_the_bit(folder, adapter, tmp_path, short, monkeypatch):
    monkeypatch.setattr(knowing, "load_language_model", lambda gguf: tiny_language_model())
    study = Study("text", folder, tmp_path / "text.json", rows=2, adapters=(str(adapter),), gguf=Path("not read"))
    text(study)
    *methods, language_model = study.cells
    assert methods[:-1] == list(knowing.READERS)
    assert methods[-1].startswith("pvm (")
    alone, behind = ({case: study.cells[case][when]["loss"] for case in methods} for when in knowing.CONDITIONS)
    changed = [case for case, losses in alone.items() if losses != alone["base"]]
    assert changed == ["t-drs"], "the only one that acts on pairs of text tokens"
    assert behind["dipe-128"] == behind["base"], "all of the window is nearer than that"
    unchanged = [case for case, losses in behind.items() if losses == behind["base"]]
    assert unchanged == ["base", "dipe-128"], "the others change what stands after an image"
    assert study.cells[language_model]["alone"]["loss"] == pytest.approx(alone["base"])

    tensors = load_file(adapter / "adapter_model.safetensors")
    other = tmp_path / "pvm"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    study.adapters = (str(other),)
    text(study)
    assert len(study.cells) == len(knowing.READERS) + 3, "another adapter of that name is not taken for the first"


def test_adapters_that_differ_in_their_configuration_alone_are_told_apart(folder, tmp_path, short):
    folders = [tmp_path / name / "dipe" for name in ("one", "other")]
    for path, max_distance in zip(folders, (0, 128)):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        get_peft_model(model, DIPEConfig(max_distance=max_distance)).save_pretrained(path)
    one, other = (path / "adapter_model.safetensors" for path in folders)
    other.write_bytes(one.read_bytes())  # neither has parameters, but metadata come in any order
    find(folder, FindingPlan(("text",), rows=2), tmp_path, list(map(str, folders)))
    cells = json.loads((tmp_path / "text.json").read_text())["measured"]
    first, second = (case for case in cells if case.startswith("dipe ("))
    for condition in knowing.CONDITIONS:
        for case, alike in ((first, "dipe"), (second, "dipe-128")):
            assert cells[case][condition]["loss"] == cells[alike][condition]["loss"]
    page = render_findings(tmp_path)
    assert all(page.count(f"| the adapter `{case}` |") == 1 for case in (first, second))


def test_adapters_that_act_together_are_tested_together(folder, adapter, tmp_path, short):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, DIPEConfig(max_distance=0)).save_pretrained(tmp_path / "dipe")
    both = f"{tmp_path / 'dipe'}+{adapter}"
    find(folder, FindingPlan(("text",), rows=2), tmp_path, [both, str(adapter)])
    cells = json.loads((tmp_path / "text.json").read_text())["measured"]
    (together,) = (cell for case, cell in cells.items() if case.startswith("dipe+pvm ("))
    (pvm,) = (cell for case, cell in cells.items() if case.startswith("pvm ("))
    assert together["alone"]["loss"] == cells["base"]["alone"]["loss"]
    behind = [cell["behind an image"]["loss"] for cell in (together, pvm, cells["dipe"], cells["base"])]
    assert len(set(map(tuple, behind))) == 4
    assert "| the adapter `dipe+pvm` |" in render_findings(tmp_path)


def test_every_finding_is_measured_once_and_put_into_words(folder, adapter, tmp_path, short, monkeypatch):
    pytest.importorskip("datasets", reason="chats need the extra `train`")
    few = FindingPlan(rows=2)
    paths = find(folder, few, tmp_path, [str(adapter)])
    assert [path.stem for path in paths] == list(FINDINGS) == list(SECTIONS)
    before = [path.read_bytes() for path in paths]
    page = render_findings(tmp_path)
    assert page.count("\n### ") == len(FINDINGS)
    counted = {"calibrate": "chats of the validation", "text": "windows of the test"}
    assert all(f"--only {name}`: 2 {counted.get(name, 'rows of the test')} split." in page for name in FINDINGS)

    def forward(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    find(folder, few, tmp_path, [str(adapter)])
    assert [path.read_bytes() for path in paths] == before


def test_the_command_measures_what_it_is_told_and_prints_it(folder, adapter, tmp_path, short):
    options = ["--only", "text", "--only", "limit", "--rows", "2", "--split", "validation", "--seed", "3"]
    called = ["real-findings", "--base", folder, "--adapter", adapter, "--results", tmp_path, *options]
    done = CliRunner().invoke(app, list(map(str, called)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout == render_findings(tmp_path) + "\n"
    files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(files) == {"text", "limit"}
    assert all((file["rows"], file["split"], file["seed"]) == (2, "validation", 3) for file in files.values())
    assert len(files["text"]["measured"]) == len(knowing.READERS) + 1


def test_cells_of_two_processes_are_kept(folder, study):
    other = Study("any", folder, study.path, rows=2)
    for one, case in ((study, "first"), (other, "second"), (study, "third")):
        one.measured(case, 0, dict)
    assert set(json.loads(study.path.read_text())["measured"]) == {"first", "second", "third"}
    study.measured("second", 0, lambda: pytest.fail("measured again"))


def test_a_finding_goes_on_where_it_ended(folder, tmp_path, short, monkeypatch):
    done = []
    whole = look

    def interrupted(study, length):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(length)
        return whole(study, length)

    monkeypatch.setattr(looking, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find(folder, FindingPlan(("limit",), rows=1), tmp_path)
    kept = json.loads((tmp_path / "limit.json").read_text())["measured"]
    assert list(kept) == ["base"]
    assert list(kept["base"]) == ["0", "20"]
    monkeypatch.setattr(looking, "look", lambda study, length: {**whole(study, length), "second": True})
    find(folder, FindingPlan(("limit",), rows=1), tmp_path)
    cells = json.loads((tmp_path / "limit.json").read_text())["measured"]
    assert {case: list(by_length) for case, by_length in cells.items()} == {
        "base": ["0", "20", "30"],
        "0": ["20", "30"],
        "16": ["20", "30"],
    }
    assert [length for length, cell in cells["base"].items() if "second" in cell] == ["30"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"split": "validation"}, "split 'test', but this would be with 'validation'"),
        ({"seed": 1}, "seed 0, but this would be with 1"),
        ({"rows": 3}, "rows 2, but this would be with 3"),
        ({"finding": "other"}, "finding 'any', but this would be with 'other'"),
    ],
)
def test_what_is_about_something_else_is_refused(folder, study, changed, named):
    study.measured("base", 0, dict)
    fields = {"finding": "any", "rows": 2, **changed}
    with pytest.raises(ValueError, match=f"was measured with {named}. Write to another folder with --results"):
        Study(fields.pop("finding"), folder, study.path, **fields)


@pytest.mark.parametrize("recorded", [None, "amx_bf16", "fp32"])
@pytest.mark.parametrize("here", ["amx_bf16", "fp32"])
def test_cells_of_another_arithmetic_are_not_added(folder, tmp_path, monkeypatch, recorded, here):
    """What is in the file is still given. Older files do not say of which they are."""

    def study_on(arithmetic: str) -> Study:
        monkeypatch.setattr(findings_study, "bf16", lambda: {BF16: arithmetic})
        return Study("any", folder, tmp_path / "any.json", rows=2)

    study_on(recorded or "unknown").measured("base", 0, lambda: {"kept": 1})
    content = json.loads((tmp_path / "any.json").read_text())
    if recorded is None:
        del content["environment"][BF16]
        (tmp_path / "any.json").write_text(json.dumps(content))
    else:
        assert content["environment"][BF16] == recorded
    study = study_on(here)
    assert study.measured("base", 0, dict)["kept"] == 1
    if here == recorded:
        study.measured("base", 1, dict)
    else:
        with pytest.raises(ValueError, match=f"{BF16} '{recorded or 'unknown'}', but this would be with '{here}'"):
            study.measured("base", 1, lambda: pytest.fail("measured"))


def test_what_is_of_another_base_is_refused(folder, study, tmp_path):
    study.measured("base", 0, dict)
    language_model = tiny_language_model(seed=1)
    save_vlm(new_vlm(language_model), language_model, tmp_path / "other")
    with pytest.raises(ValueError, match="was measured with base '"):
        Study("any", tmp_path / "other", study.path, 2)


@pytest.mark.parametrize("content", ["[]", "{", '{"finding": "limit", "measured": {}}', '{"measured": 3}'])
def test_a_damaged_file_is_refused(folder, tmp_path, content):
    (tmp_path / "limit.json").write_text(content)
    for read in (lambda: find(folder, FindingPlan(("limit",)), tmp_path), lambda: render_findings(tmp_path)):
        with pytest.raises(ValueError, match=r"limit\.json"):
            read()


def test_a_finding_without_a_cell_is_refused_in_words(folder, study, tmp_path):
    study.measured("base", 0, dict)
    study.path.rename(tmp_path / "attention.json")
    with pytest.raises(ValueError, match=r"attention\.json does not hold a finding that .* measured to its end"):
        render_findings(tmp_path)


def test_more_text_than_there_is_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="the text of 'test' has only"):
        find(folder, FindingPlan(("text",), rows=10**5), tmp_path)


@pytest.mark.parametrize("missing", [{"adapters": ["nowhere"]}, {"gguf": Path("nowhere.gguf")}])
def test_what_is_not_there_is_refused_at_once(folder, tmp_path, missing, monkeypatch):
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", None)
    with pytest.raises(FileNotFoundError, match=r"There is no file nowhere[./\w]*, which the finding 'text' needs"):
        find(folder, FindingPlan(), tmp_path, **missing)


def test_a_base_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Make the base first: make real-base"):
        find(tmp_path / "none", FindingPlan(), tmp_path)


def test_what_is_recorded_is_of_one_base():
    files = {path: json.loads(path.read_text()) for path in RECORDED.glob("*.json")}
    assert {path.stem for path in files} <= set(FINDINGS)
    assert len({(file["base"], file["split"], file["seed"]) for file in files.values()}) == 1
    assert all(file["rows"] == plan.FINDINGS[path.stem].rows for path, file in files.items())
    page = render_findings(RECORDED)
    assert page == render_findings(RECORDED)
    assert page.count("\n### ") == len(files)


def test_what_is_timed_are_methods_of_the_base():
    assert set(costs.TIMED) <= set(METHODS)

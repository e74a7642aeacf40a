"""The report: the same bytes from the same results, and numbers that are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.claims import FAILS, HOLDS, UNCLEAR, claims, verdict_on
from experiments.methods import METHODS
from experiments.real.report import read_bases
from experiments.report import draw_recall, render, write_report
from experiments.runs import LENGTHS, SEVERAL_IMAGES_LENGTHS, Run, plan
from experiments.summary import Results
from peft_pvm.env import environment


REPOSITORY = Path(__file__).parents[2]


def write_result(folder: Path, run: Run, right: dict[int, str], base: str = "0123456789abcdef") -> None:
    """A result in which each length has these numbers of right answers."""
    several = {str(length): "5555" for length in SEVERAL_IMAGES_LENGTHS}
    training = {"recipe": {"steps": 5, "learning_rate": 0.1, "seed": run.seed}}
    result = {
        "method": run.method,
        "recipe": run.recipe,
        "seed": run.seed,
        "base": base,
        "parameters": 1234,
        "training": None if run.recipe is None else training,
        "right of nine": {
            "one mosaic": {str(length): right[length] for length in LENGTHS},
            "two mosaics": several,
            "three mosaics": several,
            "transcription": {str(number): "9990" for number in range(1, 29)},
        },
        "retrieved mass": {str(length): {"3": 0.25 + 0.25 * run.seed} for length in LENGTHS},
        "visual mass": {str(length): [1 / max(length, 1)] * 6 for length in LENGTHS},
        "environment": environment(),
    }
    (folder / f"{run.method}.{run.recipe}.{run.seed}.json").write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of everything: PVM is the better the later its seed, the others are at chance beyond 0 bytes."""
    for run in plan():
        number = str(6 + run.seed) if run.method == "pvm" else "1"
        write_result(tmp_path, run, {length: "8888" if length == 0 else number * 4 for length in LENGTHS})
    return tmp_path


def test_the_same_bytes_from_the_same_results(folder, tmp_path):
    written = []
    for name in ("first", "second"):
        page = write_report(folder, tmp_path / name)
        written.append((page.read_bytes(), (page.parent / "figures" / "recall.png").read_bytes()))
    assert written[0] == written[1]
    assert written[0][1].startswith(b"\x89PNG")


def test_tables_hold_mean_and_spread_over_seeds(folder):
    page = render(Results(folder), {})
    row = next(line for line in page.splitlines() if line.startswith("| PVM |"))
    assert "| 1,234 | 3 | 0.889 ± 0.000 | 0.778 ± 0.111 |" in row
    row = next(line for line in page.splitlines() if line.startswith("| DIPE |"))
    assert "| 1 | 0.889 ± 0.000 | 0.111 ± 0.000 |" in row
    assert all(f"| {method.title} |" in page for method in METHODS.values())


def test_the_retrieval_is_averaged_over_seeds(folder):
    row = next(line for line in render(Results(folder), {}).splitlines() if line.startswith("| PVM | 3 | 0."))
    assert row == "| PVM | 3 |" + " 0.500 |" * len(LENGTHS)


def test_other_numbers_make_another_picture(folder):
    before = draw_recall(Results(folder))
    write_result(folder, Run("dipe", None, 0), dict.fromkeys(LENGTHS, "9999"))
    assert draw_recall(Results(folder)) != before


def test_claims_follow_the_numbers(folder):
    found = {claim.text: claim for claim in claims(Results(folder))}
    against_lora = found["PVM beats LoRA of its size (PVM)"]
    assert against_lora.verdict == HOLDS
    assert "0.778 ± 0.111 against 0.111 ± 0.000" in against_lora.numbers
    assert found["DIPE keeps accuracy flat to within five points (DIPE)"].verdict == FAILS
    assert found["DIPE costs no more than one point without text in between (DIPE)"].verdict == HOLDS
    assert found["T-DRS helps (T-DRS)"].verdict == UNCLEAR
    fading = found["Attention to the image falls at least as fast as 1/t (PVM, theorem 3.1)"]
    assert fading.verdict == HOLDS
    assert "a = 1.00" in fading.numbers
    gains = [claim for claim in claims(Results(folder)) if claim.text == "The gain grows with length (PVM)"]
    assert {claim.setting: claim.verdict for claim in gains}["trained with text of up to 1,024 bytes"] == UNCLEAR


@pytest.mark.parametrize(
    ("masses", "verdict"),
    [
        ([n**-0.5 for n in (64, 128, 256, 512, 1024, 2048, 4096)], FAILS),
        ([n**-1.2 for n in (64, 128, 256, 512, 1024, 2048, 4096)], HOLDS),
        ([0.9, 0.001, 0.8, 0.002, 0.1, 0.0001, 0.01], UNCLEAR),
    ],
)
def test_a_decay_is_told_from_others(folder, masses, verdict):
    file = folder / "base.None.0.json"
    content = json.loads(file.read_text())
    content["visual mass"] = {str(n): [mass] * 6 for n, mass in zip(LENGTHS, [1.0, *masses])}
    file.write_text(json.dumps(content))
    assert claims(Results(folder))[0].verdict == verdict


def test_verdicts():
    assert verdict_on(0.3, 0.1) == HOLDS
    assert verdict_on(-0.3, 0.1) == FAILS
    assert verdict_on(0.15, 0.1) == verdict_on(-0.15, 0.1) == UNCLEAR
    assert verdict_on(-0.02, 0.001, margin=-0.05) == HOLDS


def test_a_part_of_the_results_makes_a_page(tmp_path):
    write_result(tmp_path, Run("base", None, 0), dict.fromkeys(LENGTHS, "5678"))
    page = render(Results(tmp_path), {})
    assert "| base | 1,234 | 1 | 0.722 ± 0.072 |" in page


def test_results_of_different_bases_are_not_mixed(folder):
    write_result(folder, Run("base", None, 0), dict.fromkeys(LENGTHS, "9999"), base="another")
    with pytest.raises(ValueError, match="different bases"):
        Results(folder)


def test_the_page_in_the_repository_is_that_of_its_results():
    folder = REPOSITORY / "experiments" / "results"
    assert render(Results(folder), read_bases(folder)) == (REPOSITORY / "docs" / "results.md").read_text()

"""The report of the real bases: numbers, errors and verdicts are the results', and wrong results are refused."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments import claims as toy_claims
from experiments.claims import FAILS, HOLDS, NOT_TESTED, UNCLEAR, Claim
from experiments.real import report as real_report
from experiments.real.claims import HARDER, REMEDIES, claims
from experiments.real.methods import METHODS
from experiments.real.report import BASES, VALIDATION, draw_real, read_bases, render_base
from experiments.real.summary import FINDINGS, Entry, Estimate, Results, Term, contrast
from experiments.report import _verdicts, render, write_report
from experiments.summary import Results as ToyResults
from peft_pvm.env import environment


RECORDED = Path(__file__).parents[2] / "experiments" / "results"
UNDER_LORA = [METHODS[name].title for name in ("dipe+lora", "dipe-image+lora")]
SPREAD = "0549" * 3  # rows that differ much, 12 of them as beyond 2,048 tokens
RAISED = "1659" * 3  # one more right in most rows
ONE_PICTURE = "`look-up` after 4,096 tokens trained with one picture"
FULL, NONE = "9" * 34, "0" * 34


def write_result(
    folder: Path, task: str, method: str, right: dict[int, str], trained: int | None = None, **changes: Any
) -> Path:
    """A file of results, with these numbers of right answers by tokens of text, and of a training of this seed."""
    name = method if trained is None else f"{method}.seed{trained}"
    training = {
        "recipe": {"steps": 400},
        "seed": trained,
        "parameters": 2_000_000,
        "tokens": 100_000 + 1000 * (trained or 0),
        "seconds": 60.0,
        "environment": {**environment(), "GPU": "none"},
        "base": "real-base",
    }
    content = {
        "method": method,
        "adapters": [],
        "task": task,
        "base": "real-base",
        "split": "test",
        "seed": 0,
        "training": None if trained is None else training,
        "by tokens of text": {str(n): {"right of nine": rows} for n, rows in right.items()},
        "environment": {**environment(), "GPU": "none"},
        **changes,
    }
    file = folder / task / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def copy_finding(folder: Path, name: str, base: str = "real-base") -> Path:
    """One of the recorded findings, as if it were of this base."""
    content = {**json.loads((RECORDED / "real" / FINDINGS / f"{name}.json").read_text()), "base": base}
    file = folder / FINDINGS / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def verdicts(folder: Path, text: str) -> dict[str, str]:
    """The verdicts on a claim, by setting."""
    found = [claim for claim in claims(Results(folder)) if claim.text.startswith(text)]
    assert found, text
    return {claim.setting: claim.verdict for claim in found}


def numbers(folder: Path, text: str, setting: str) -> str:
    (claim,) = (c for c in claims(Results(folder)) if c.text.startswith(text) and c.setting == setting)
    return claim.numbers


def difference(folder: Path, method: str, other: str, length: int = 0) -> Estimate | None:
    results = Results(folder)
    return contrast(
        *(Term(weight, results.find("look-up", name), length) for weight, name in ((1, method), (-1, other)))
    )


# Differences


def test_a_difference_is_paired_by_row(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: SPREAD})
    write_result(tmp_path, "look-up", "t-drs", {0: RAISED})
    found = difference(tmp_path, "t-drs", "base")
    by_row = [(int(ours) - int(theirs)) / 9 for ours, theirs in zip(RAISED, SPREAD)]
    assert found.mean == pytest.approx(0.75 / 9)
    assert found.standard_error == pytest.approx(statistics.stdev(by_row) / 12**0.5)
    assert found.standard_error < 0.02  # unpaired, it were 0.15


def test_the_error_has_that_over_rows_and_that_over_seeds(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: "1234"})
    for seed, right in enumerate(("3456", "4567", "8889")):
        write_result(tmp_path, "look-up", "pvm", {0: right}, seed)
    found = difference(tmp_path, "pvm", "base")
    by_row = [
        statistics.fmean(column) - base
        for column, base in zip(((3, 4, 8), (4, 5, 8), (5, 6, 8), (6, 7, 9)), (1, 2, 3, 4))
    ]
    seeds = statistics.variance([4.5, 5.5, 8.25]) / 3
    assert found.mean == pytest.approx(statistics.fmean(by_row) / 9)
    assert found.standard_error == pytest.approx((statistics.variance(by_row) / 4 + seeds) ** 0.5 / 9)


def test_the_seeds_of_both_sides_count(tmp_path):
    for seed, right in enumerate(("2222", "4444")):
        write_result(tmp_path, "look-up", "pvm", {0: right}, seed)
        write_result(tmp_path, "look-up", "lora", {0: right}, seed)
    assert difference(tmp_path, "pvm", "lora").standard_error == pytest.approx(2**0.5 / 9)
    pvm = Results(tmp_path).find("look-up", "pvm")
    assert contrast(Term(1, pvm, 0), Term(-1, pvm, 0)).standard_error == pytest.approx(1.5 / 36)  # the same weights


def test_the_rows_that_both_have_are_compared(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: "1111" + "9" * 30})
    write_result(tmp_path, "look-up", "t-drs", {0: "3232"})
    assert difference(tmp_path, "t-drs", "base").mean == pytest.approx(1.5 / 9)


def test_what_was_not_tested_has_no_difference(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: "99", 4096: "9"})
    write_result(tmp_path, "look-up", "t-drs", {0: "99", 4096: "9"})
    assert difference(tmp_path, "t-drs", "base") is not None
    assert difference(tmp_path, "t-drs", "base", 4096) is None  # a single row has no error
    assert difference(tmp_path, "t-drs", "base", 1024) is None
    assert difference(tmp_path, "pvm", "base") is None


@pytest.mark.parametrize(("rows", "verdict"), [(16, UNCLEAR), (34, HOLDS)])
def test_rows_that_all_agree_prove_no_more_than_they_can(tmp_path, rows, verdict):
    """With 144 answers, up to 2 % may still differ (rule of three), with 306 less than 1 %."""
    write_result(tmp_path, "look-up", "base", {0: "9" * rows})
    write_result(tmp_path, "look-up", "dipe", {0: "9" * rows})
    assert verdicts(tmp_path, toy_claims.COSTS_NOTHING)["DIPE as published"] == verdict


# Verdicts


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(RAISED, SPREAD, HOLDS), (SPREAD, RAISED, FAILS), ("5656" * 3, "6565" * 3, UNCLEAR), (None, SPREAD, NOT_TESTED)],
)
def test_a_difference_counts_beyond_twice_its_error(tmp_path, ours, theirs, verdict):
    write_result(tmp_path, "look-up", "lora", {4096: theirs}, 0)
    if ours is not None:
        write_result(tmp_path, "look-up", "pvm", {4096: ours}, 0)
    found = verdicts(tmp_path, toy_claims.BEATS_LORA)
    assert found.pop(ONE_PICTURE) == verdict
    assert len(found) == 17
    assert set(found.values()) == {NOT_TESTED}


def test_seeds_that_disagree_leave_a_claim_open(tmp_path):
    write_result(tmp_path, "look-up", "lora", {4096: "4" * 12}, 0)
    write_result(tmp_path, "look-up", "pvm", {4096: "9" * 12}, 0)
    assert verdicts(tmp_path, toy_claims.BEATS_LORA)[ONE_PICTURE] == HOLDS
    write_result(tmp_path, "look-up", "pvm", {4096: "3" * 12}, 1)
    assert verdicts(tmp_path, toy_claims.BEATS_LORA)[ONE_PICTURE] == UNCLEAR


def test_pvm_is_compared_with_the_control_that_is_best_there(tmp_path):
    write_result(tmp_path, "look-up", "lora-short", {4096: "1" * 12, 7500: "7" * 12}, 0)
    write_result(tmp_path, "look-up", "lora-several", {4096: "8" * 12, 7500: "1" * 12}, 0)
    write_result(tmp_path, "look-up", "pvm-several", {4096: "5" * 12, 7500: "5" * 12}, 0)
    found = verdicts(tmp_path, toy_claims.BEATS_LORA)
    for length, best in ((4096, "0.889"), (7500, "0.778")):
        place = f"`look-up` after {length:,} tokens trained with several pictures and turns"
        assert found[place] == FAILS
        assert best in numbers(tmp_path, toy_claims.BEATS_LORA, place)


@pytest.mark.parametrize(("near", "verdict"), [("2" * 12, HOLDS), ("8" * 12, FAILS), ("5" * 12, UNCLEAR)])
def test_a_gain_that_grows(tmp_path, near, verdict):
    """Four answers of nine after 4,096 tokens, over the better control at each length."""
    write_result(tmp_path, "look-up", "pvm", {1024: near, 4096: "9" * 12}, 0)
    write_result(tmp_path, "look-up", "lora", {1024: "1" * 12, 4096: "5" * 12}, 0)
    write_result(tmp_path, "look-up", "mlp", {1024: "1" * 12, 4096: "0" * 12}, 0)
    assert verdicts(tmp_path, toy_claims.GAIN_GROWS)["`look-up` after 4,096 tokens"] == verdict


def test_flat_is_within_five_points_up_to_the_longest_text(tmp_path):
    write_result(tmp_path, "look-up", "dipe", {0: FULL, 4096: "9" * 12, 7500: "8" * 12})
    write_result(tmp_path, "look-up", "dipe-128", {0: FULL, 4096: "0" * 12, 7500: "9" * 12})
    assert verdicts(tmp_path, toy_claims.KEEPS_FLAT) == {
        "DIPE as published": FAILS,
        "DIPE, limit 128": HOLDS,
        **dict.fromkeys(UNDER_LORA, NOT_TESTED),
    }
    assert "after 7,500 tokens: -0.111" in numbers(tmp_path, toy_claims.KEEPS_FLAT, "DIPE as published")


def test_high_accuracy(tmp_path):
    for length, right in ((4096, "9" * 12), (7500, "8" * 12)):
        write_result(tmp_path / str(length), "look-up", "pvm", {length: right}, 0)
        found = verdicts(tmp_path / str(length), "PVM has an accuracy of at least 0.95")
        assert found[f"`look-up` after {length:,} tokens"] == (HOLDS if length == 4096 else FAILS)
        assert NOT_TESTED in found.values()
    assert "0.889 ± 0.000, standard error 0.014; base -" in numbers(
        tmp_path / "7500", "PVM has", f"`look-up` after {length:,} tokens"
    )


def test_each_method_is_asked_what_it_costs_without_text(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: FULL})
    write_result(tmp_path, "look-up", "mine", {0: FULL})
    write_result(tmp_path, "look-up", "t-drs", {0: NONE})
    assert verdicts(tmp_path, "No method costs") == {"mine": HOLDS, "T-DRS": FAILS}


def test_what_remedies_cost_on_several_pictures_is_a_claim_of_its_own(tmp_path):
    write_result(tmp_path, "three-turns", "base", {0: FULL})
    write_result(tmp_path, "three-turns", "pvm", {0: NONE})
    write_result(tmp_path, "three-turns", "log-bias", {0: NONE})
    assert verdicts(tmp_path, "No remedy costs") == {"PVM on `three-turns`": FAILS}


@pytest.mark.parametrize(
    ("base", "ours", "verdict"),
    [("1", "7", HOLDS), ("1", "3", FAILS), ("1", "46", UNCLEAR), ("9", "9", UNCLEAR), ("1", None, NOT_TESTED)],
)
def test_half_of_what_the_base_loses(tmp_path, base, ours, verdict):
    """From nine to one of nine; half way is five. Where the base loses nothing, nothing can be won."""
    write_result(tmp_path, "interfering", "base", {0: "9" * 12, 4096: base * 12, 7500: "0" * 12})
    if ours is not None:
        write_result(tmp_path, "interfering", "pvm", {0: "9" * 12, 4096: (ours * 12)[:12]}, 0)
    found = verdicts(tmp_path, "PVM wins back at least half")
    assert found.pop("`interfering`") == verdict
    assert set(found.values()) == {NOT_TESTED}
    if verdict in (HOLDS, FAILS):
        assert f"{(int(ours) - 1) / 8 * 100:.0f} % won back" in numbers(tmp_path, "PVM wins", "`interfering`")


def test_long_generation_is_judged_at_its_end(tmp_path):
    write_result(tmp_path, "transcription", "base", {18: "9" * 12, 504: "2" * 12})
    write_result(tmp_path, "transcription", "pvm", {18: "9" * 12, 504: "7" * 12}, 0)
    assert verdicts(tmp_path, toy_claims.KEEPS_GENERATING) == {"`transcription` after 504 tokens": HOLDS}


def test_without_results_all_is_open(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: FULL})
    assert {claim.verdict for claim in claims(Results(tmp_path))} == {NOT_TESTED}


def test_every_method_on_the_harder_tasks_is_judged():
    """Only the null model, and what was trained as another method was, have no claim of their own there."""
    results = Results(RECORDED / "real")
    tested = {entry.method for task in HARDER for entry in results.on(task)}
    assert tested - set(REMEDIES) == {"base", "log-bias", "pvm, as saved"}


@pytest.mark.parametrize("method", ["t-drs", "t-drs-sd", "t-drs-dc", "t-drs-re"])
def test_parts_of_tdrs_have_the_claims_of_the_toy(tmp_path, method):
    write_result(tmp_path, "look-up", "base", {4096: "4" * 12})
    write_result(tmp_path, "look-up", method, {4096: "7" * 12})
    of_toy = {claim.text for claim in toy_claims.claims(ToyResults(RECORDED))}
    (claim,) = (claim for claim in claims(Results(tmp_path)) if claim.text == toy_claims.helps(METHODS[method].title))
    assert claim.verdict == HOLDS
    assert claim.text in of_toy


def test_a_finding_that_is_not_whole_is_refused(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: FULL})
    path = copy_finding(tmp_path, "attention")
    finding = json.loads(path.read_text())
    finding["measured"] = {"dipe": finding["measured"]["dipe"]}
    path.write_text(json.dumps(finding))
    with pytest.raises(ValueError, match=r"attention.json does not hold a finding that .* measured to its end"):
        claims(Results(tmp_path))


def test_a_finding_of_another_base_is_refused(tmp_path):
    write_result(tmp_path, "look-up", "base", {0: FULL})
    copy_finding(tmp_path, "attention", base="another-base")
    with pytest.raises(ValueError, match=r"attention.json is of the base another-base, but .* of real-base"):
        Results(tmp_path)


# Pages


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of the toy's base and of all real bases."""
    folder = tmp_path / "all"
    folder.mkdir()
    shutil.copy(RECORDED / "base.json", folder)
    for name in ("real", "real-digits"):
        for task in ("look-up", "interfering"):
            write_result(folder / name, task, "base", {0: FULL, 4096: "1" * 12, 7500: "0" * 12})
            write_result(folder / name, task, "dipe-128", {0: FULL, 4096: "98" * 6})
        for seed in (0, 1, 2):
            write_result(folder / name, "look-up", "pvm", {0: FULL, 4096: str(6 + seed) * 12}, seed)
    for method in ("base", "dipe-128"):
        write_result(folder / "real-again", "look-up", method, {0: FULL, 4096: "9" * 12})
        write_result(folder / VALIDATION, "look-up", method, {0: FULL, 4096: "9" * 12}, split="validation")
    return folder


def rows_of(page: str, start: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {start} |")]


def test_tables_hold_means_and_differences(folder):
    page = "\n".join(render_base(Results(folder / "real")))
    assert "Rows in a cell, by tokens of text: 34 at 0; 12 at 4,096 to 7,500." in page
    pvm, *_ = rows_of(page, "PVM")
    assert pvm[:5] == ["PVM", "3", "1.000 ± 0.000", "0.778 ± 0.111", "-"]
    dipe, *_ = rows_of(page, "DIPE, limit 128")
    assert dipe == ["DIPE, limit 128", "1", "1.000 ± 0.000", "0.944 ± 0.017", "-", "+0.000 ± 0.005", "-"]
    base, *_ = rows_of(page, "base")
    assert base[-2:] == ["-", "-"]
    assert rows_of(page, "PVM")[-1] == ["PVM", "2,000,000", "101,000", "steps 400"]


def test_of_many_rounds_some_are_shown(tmp_path):
    write_result(tmp_path, "transcription", "base", {round_ * 80: "98" for round_ in range(27)})
    page = "\n".join(render_base(Results(tmp_path)))
    header = next(line for line in page.splitlines() if line.startswith("| Method |"))
    assert header.split(" | ")[2:9] == ["0", "80", "240", "560", "1,200", "2,080", "minus the base, 0"]


def test_weights_of_another_method_are_trained_once(tmp_path):
    for method in ("pvm", "pvm+dipe-128"):
        write_result(tmp_path, "look-up", method, {0: "98"}, 0)
    page = "\n".join(render_base(Results(tmp_path)))
    assert len(rows_of(page, "PVM")) == 2
    assert len(rows_of(page, METHODS["pvm+dipe-128"].title)) == 1


def test_what_is_not_in_the_tables_of_names_is_there_under_its_key(folder):
    write_result(folder / "real", "a-new-task", "my-adapter", {0: "99"}, adapters=["0123"])
    page = "\n".join(render_base(Results(folder / "real")))
    assert "### `a-new-task`" in page
    assert rows_of(page, "my-adapter, as saved")[0][:3] == ["my-adapter, as saved", "1", "1.000 ± 0.000"]


def test_a_saved_adapter_stands_beside_the_trainings_of_its_method(folder):
    for seed in (0, 1):
        write_result(folder / "real", "a-new-task", "pvm", {0: "88"}, seed)
    write_result(folder / "real", "a-new-task", "pvm", {0: "99"}, adapters=["0123"])
    page = "\n".join(render_base(Results(folder / "real")))
    assert ["PVM", "2", "0.889 ± 0.000"] in [row[:3] for row in rows_of(page, "PVM")]
    assert rows_of(page, "PVM, as saved")[0][:3] == ["PVM, as saved", "1", "1.000 ± 0.000"]


def test_the_same_bytes_from_the_same_results(folder, tmp_path):
    written = []
    for name in ("first", "second"):
        page = write_report(folder, tmp_path / name)
        written.append({path.name: path.read_bytes() for path in page.parent.rglob("*.*")})
    assert written[0] == written[1]
    assert set(written[0]) == {"results.md", "real.png", "recall.png"}
    text = written[0]["results.md"].decode()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## The papers' claims and ours",
        *(f"## {title}" for title in BASES.values()),
        "## The toy",
    ]
    assert text.index("figures/real.png") < text.index("figures/recall.png")


def test_without_results_of_a_real_base_there_is_the_toy_alone(folder, tmp_path):
    whole = write_report(folder, tmp_path / "whole").read_text()
    for name in BASES:
        shutil.rmtree(folder / name)
    (folder / "real" / "look-up").mkdir(parents=True)
    page = write_report(folder, tmp_path / "toy").read_text()
    assert not (tmp_path / "toy" / "figures" / "real.png").exists()
    assert "real.png" not in page
    assert next(line for line in page.splitlines() if line.startswith("| Claim")) == "| Claim | The toy |"
    start = "\n## The toy\n"
    assert page.partition(start)[2] == whole.partition(start)[2] != ""


def test_findings_stand_behind_the_tables_of_their_base(folder):
    assert "What is behind it" not in render(ToyResults(RECORDED), read_bases(folder))
    for finding in (RECORDED / "real" / FINDINGS).glob("*.json"):
        copy_finding(folder / "real", finding.stem)
    page = render(ToyResults(RECORDED), read_bases(folder))
    places = [page.index(text) for text in ("## The real language model", "### What is behind it", "## The toy")]
    assert places == sorted(places)
    (fit,) = (row for row in rows_of(page, toy_claims.DECAYS) if "The real language model" in row)
    exponent = re.search(r"a = ([\d.]+) ± [\d.]+ for the mean over layers", fit[-1])[1]
    assert f"| base | {exponent} ±" in page, "of the findings' own table"


def test_claims_that_were_tested_on_both_stand_side_by_side(folder):
    toy = ToyResults(RECORDED)
    write_result(folder / "real", "look-up", "dipe", {0: FULL, 4096: "0" * 12})
    on_both = {claim.text for claim in claims(Results(folder / "real"))} & {c.text for c in toy_claims.claims(toy)}
    assert len(on_both) == 15
    page = render(toy, read_bases(folder))
    row, *numbers_of_tested = rows_of(page, toy_claims.KEEPS_FLAT)
    assert len(numbers_of_tested) == 4  # the toy's, two of the first base, one of the second
    assert row[1:] == [
        FAILS,
        f"does not hold: DIPE as published<br>inconclusive: DIPE, limit 128<br>not tested: {'; '.join(UNDER_LORA)}",
        f"not tested: {'; '.join(['DIPE as published', *UNDER_LORA])}<br>inconclusive: DIPE, limit 128",
    ]


def test_the_validation_split_has_tables_but_decides_no_claim(folder):
    page = render(ToyResults(RECORDED), read_bases(folder))
    assert f"## {BASES[VALIDATION]}\n\n- Base real-base. Each row has 9 questions (split validation" in page
    header = next(line for line in page.splitlines() if line.startswith("| Claim | The toy"))
    assert header == f"| Claim | The toy | {BASES['real']} | {BASES['real-digits']} |"
    shutil.rmtree(folder / "real-digits")
    (folder / VALIDATION).rename(folder / "real-digits")
    with pytest.raises(ValueError, match="real-digits has results of split validation, not test"):
        read_bases(folder)


def test_verdicts_that_agree_are_said_once():
    agreeing = [Claim("x", HOLDS, "", setting) for setting in ("a", "b")]
    assert _verdicts(agreeing) == HOLDS
    assert _verdicts([*agreeing, Claim("x", FAILS, "", "c")]) == "holds: a; b<br>does not hold: c"
    assert _verdicts([]) == NOT_TESTED


# The picture


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(real_report, "as_png", lambda figure: figure)
    figure = draw_real(Results(folder))
    figure.canvas.draw()
    return figure


def test_curves_that_coincide_stand_side_by_side_and_the_legend_beside_all(tmp_path, monkeypatch):
    for method in real_report.IN_PICTURE:
        for task in ("look-up", "interfering"):
            write_result(tmp_path, task, method, {0: FULL, 256: FULL, 4096: "9" * 12})
    figure = drawn(tmp_path, monkeypatch)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        Entry(method, ()).title for method in real_report.IN_PICTURE
    ]
    for panel in figure.axes:
        assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "256", "4,096"]
        curves = [container.lines[0] for container in panel.containers]
        assert len({tuple(curve.get_xdata()) for curve in curves}) == len(real_report.IN_PICTURE)
        assert len({(curve.get_color(), curve.get_marker()) for curve in curves}) == len(real_report.IN_PICTURE)
        assert not legend.get_window_extent().overlaps(panel.get_tightbbox())


def test_the_right_half_is_what_there_is(folder, tmp_path, monkeypatch):
    assert "others" in drawn(folder / "real", monkeypatch).axes[1].get_title()
    shutil.rmtree(folder / "real" / "interfering")
    write_result(folder / "real", "transcription", "base", {18: "99", 504: "11"})
    assert "generation" in drawn(folder / "real", monkeypatch).axes[1].get_title()


# What is refused


def change(**fields: Any) -> Any:
    def write(folder: Path) -> None:
        write_result(folder, "look-up", "base", {0: FULL}, **fields)

    return write


def cell(**fields: Any) -> Any:
    return change(**{"by tokens of text": {"0": {"right of nine": "99", **fields}}})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "look-up" / "base.json").write_text("{"), "look-up/base.json is damaged"),
        (
            lambda folder: (folder / "look-up" / "base.json").write_text("[]"),
            "base.json does not hold what python -m ",
        ),
        (change(environment={}), "base.json does not hold"),
        (change(training={"seed": 0}), "base.json does not hold"),
        (cell(**{"right of nine": ""}), "'' is not one digit a row"),
        (cell(**{"right of nine": "9x"}), "'9x' is not one digit a row"),
        (cell(**{"right of nine": [99]}), "base.json does not hold"),
        (change(base="another"), r"different bases, \['another', 'real-base'\]"),
        (
            change(split="validation"),
            "split test, seed 0 and split validation, seed 0, which cannot be compared",
        ),
        (change(seed=1), "split test, seed 0 and split test, seed 1, which cannot be compared"),
        (
            lambda folder: write_result(folder, "look-up", "pvm", {0: FULL}),
            r"several results of pvm on look-up, with seeds of training \[None, 0\]. Keep",
        ),
        (
            lambda folder: shutil.copy(folder / "look-up" / "pvm.seed0.json", folder / "look-up" / "copy.json"),
            r"seeds of training \[0, 0\]",
        ),
    ],
)
def test_results_that_cannot_be_used(tmp_path, damage, said):
    write_result(tmp_path, "look-up", "base", {0: FULL})
    write_result(tmp_path, "look-up", "t-drs", {0: FULL})
    write_result(tmp_path, "look-up", "pvm", {0: FULL}, 0)
    Results(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=said):
        Results(tmp_path)


def test_a_folder_without_results(tmp_path):
    write_result(tmp_path, "findings", "attention", {})
    with pytest.raises(FileNotFoundError, match="python -m experiments real-eval"):
        Results(tmp_path)
    assert read_bases(tmp_path.parent) == {}

"""What a comparison tells from answers, and how it writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")

from peft_pvm.compare.comparison import Comparison
from peft_pvm.compare.contenders import BASE, Contender, contenders
from peft_pvm.compare.journal import Answer
from peft_pvm.compare.plots import front
from peft_pvm.compare.report import PICTURE, as_markdown, overview, save
from peft_pvm.compare.statistics import HELPS, HURTS, UNCLEAR
from peft_pvm.compare.tasks import Asked, Question
from peft_pvm.env import environment


ABOUT = {"model": "m_1", "task": "t", "asked": 1, "scored": "By *hand*.", "max_new_tokens": 4}
BASE_RIGHT = [number % 2 for number in range(24)]  # half of them


def made(
    right: dict[str, list[int]], seeds: int = 1, shared: bool = False, refused: dict[str, str] | None = None
) -> Comparison:
    """A comparison at 0 and 64 tokens. With `shared`, questions have one name under all seeds."""
    entered = [Contender(name, "control" if name == BASE else "method") for name in [*right, *(refused or {})]]
    asked, answers = [], {}
    for length in (0, 64):
        for number in range(len(right[BASE])):
            seed = number % seeds
            question = Question(str(number // seeds if shared else number), [], [], ("x",))
            asked.append(Asked(length, seed, question, []))
            for place, name in enumerate(right):
                key = (name, *asked[-1].key)
                answers[key] = Answer(*key, "x", "x", right[name][number], 2, 0.1 * (1 + place))
    return Comparison.of({**ABOUT, "environment": environment()}, entered, asked, answers, refused or {})


def test_a_method_that_is_always_right_helps_and_one_that_is_always_wrong_hurts():
    found = made({BASE: BASE_RIGHT, "oracle": [1] * 24, "blind": [0] * 24}).findings
    assert {found["oracle", length].verdict for length in (0, 64)} == {HELPS}
    assert {found["blind", length].verdict for length in (0, 64)} == {HURTS}
    assert found["oracle", 0].difference.mean == 0.5
    assert found["oracle", 0].slowdown == pytest.approx(2)


def test_equal_methods_cannot_be_told_apart():
    found = made({BASE: BASE_RIGHT, "same": BASE_RIGHT, "others": BASE_RIGHT[::-1]}).findings
    assert {found[name, 0].verdict for name in ("same", "others")} == {UNCLEAR}
    assert found["same", 0].p == found["others", 0].p == 1


def test_many_methods_ask_for_more():
    """Six more right answers are enough for one test, and not for sixteen: Holm corrects for them all."""
    better = [1] * 6 + [0] * 18
    assert made({BASE: [0] * 24, "a": better}).findings["a", 0].p == 2**-5
    many = {f"m{number}": better if number == 0 else [0] * 24 for number in range(8)}
    found = made({BASE: [0] * 24, **many}).findings["m0", 0]
    assert found.p == 2**-5
    assert found.corrected == pytest.approx(min(1, 16 * 2**-5))
    assert found.verdict == UNCLEAR


def test_one_question_under_several_seeds_is_one():
    """Seeds of the same question are not independent: they are added up before anything is tested."""
    better = {BASE: [0] * 24, "better": [1] * 24}
    as_many, as_few = made(better, seeds=4), made(better, seeds=4, shared=True)
    assert (as_many.num_questions, as_few.num_questions) == (24, 6)
    assert as_many.findings["better", 0].p == pytest.approx(2**-23)
    assert as_few.findings["better", 0].p == pytest.approx(2**-5)
    assert as_few.findings["better", 0].accuracy.mean == 1


def test_the_same_bytes_from_the_same_numbers(tmp_path: Path):
    comparison = made({BASE: BASE_RIGHT, "other": [1] * 24}, refused={"odd": "It <cannot>."})
    save(comparison, tmp_path / "first")
    save(Comparison.load(tmp_path / "first" / "compare.json"), tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["compare.html", "compare.json", "compare.md", "pareto.png"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_pages_say_it_all(tmp_path: Path):
    comparison = made({BASE: BASE_RIGHT, "worse": [0] * 24}, refused={"odd": "It <cannot>."})
    page = save(comparison, tmp_path).read_text()
    text = (tmp_path / "compare.md").read_text()
    assert text == "\n".join(as_markdown(comparison, PICTURE)) + "\n"
    for written in (page, text):
        assert "Hurts: worse at every length." in written
        assert "odd refused the model: It &lt;cannot&gt;." in written
        assert "0.000 ± 0.000, hurts" in written
    assert "# m\\_1 on t" in text
    assert "By \\*hand\\*." in text
    assert "src=" in page
    assert page.count("src=") == page.count('src="data:'), "the page loads nothing"
    assert overview(comparison).rows[-1] == ["odd", "-", "-", "-"]


def test_what_is_read_is_what_was_written(tmp_path: Path):
    comparison = made({BASE: BASE_RIGHT, "other": [1] * 24})
    save(comparison, tmp_path)
    assert Comparison.load(tmp_path / "compare.json") == comparison


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("answers"),
        lambda content: content["answers"]["base"]["0"]["right"].pop(),
        lambda content: content["answers"].pop("base"),
        lambda content: content.update(questions=3),
    ],
)
def test_another_file_is_refused_by_name(change, tmp_path: Path):
    save(made({BASE: BASE_RIGHT, "other": [1] * 24}), tmp_path)
    content = json.loads((tmp_path / "compare.json").read_text())
    change(content)
    (tmp_path / "compare.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"compare\.json does not hold what peft-pvm compare writes"):
        Comparison.load(tmp_path / "compare.json")


def test_who_is_beaten_is_not_on_the_front():
    points = {"slow and bad": (2.0, 0.1), "base": (1.0, 0.5), "good": (1.5, 0.9), "as good": (1.6, 0.9)}
    assert front(points) == ["base", "good"]


def test_controls_are_in_every_comparison():
    names = [contender.name for contender in contenders(["vaf"])]
    assert names == ["base", "temperature", "Log-bias", "VAF"]


def test_no_two_contenders_have_one_name():
    names = [contender.name for contender in contenders([], ["a/pvm", "b/pvm+c/lora", "b/pvm", "base"])]
    assert names[3:] == ["pvm", "pvm+lora", "pvm-2", "base-2"]


def test_methods_that_cannot_run_are_refused():
    with pytest.raises(ValueError, match="'pvm' is not a method that needs no training"):
        contenders(["pvm"])

"""What a comparison tells from answers, and how it writes it down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")

from peft_pvm.compare.comparison import Comparison
from peft_pvm.compare.contenders import BASE, Contender, contenders
from peft_pvm.compare.journal import Answer
from peft_pvm.compare.plots import draw_pareto, front
from peft_pvm.compare.report import PICTURE, as_markdown, outcome, overview, save
from peft_pvm.compare.statistics import HELPS, HURTS, UNCHANGED, UNCLEAR
from peft_pvm.compare.tasks import Asked, Question
from peft_pvm.env import environment


ABOUT = {"model": "m_1", "task": "t", "asked": 1, "scored": "By *hand*.", "max_new_tokens": 4}
BASE_RIGHT = [number % 2 for number in range(24)]  # half of them


def made(
    right: dict[str, list[int]],
    seeds: int = 1,
    shared: bool = False,
    refused: dict[str, str] | None = None,
    idle: dict[str, str] | None = None,
    token_ids: Callable[[str, int, int], list[int] | None] = lambda name, length, number: None,
) -> Comparison:
    """A comparison at 0 and 64 tokens. With `shared`, questions have one name under all seeds."""
    names = [*right, *(refused or {}), *(idle or {})]
    entered = [Contender(name, "control" if name == BASE else "method") for name in names]
    asked, answers, times = [], {}, {}
    for length in (0, 64):
        for number in range(len(right[BASE])):
            seed = number % seeds
            question = Question(str(number // seeds if shared else number), [], [], ("x",))
            asked.append(Asked(length, seed, question, []))
            for place, name in enumerate(right):
                key = (name, *asked[-1].key)
                ids = token_ids(name, length, number)
                answers[key] = Answer(*key, "x", "x", right[name][number], 2, ids)
                times.setdefault(asked[-1].key, {})[name] = 0.1 * (1 + place)
    about = {**ABOUT, "environment": environment()}
    return Comparison.of(about, entered, asked, answers, times, refused or {}, idle or {})


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


def tokens(name: str, length: int, number: int) -> list[int]:
    """Those of "other" are the base's but for two answers after 64 tokens of text."""
    return [7, 8 if (name, length) == ("other", 64) and number < 2 else 7]


def test_a_method_that_changes_no_answer_has_a_verdict_of_its_own(tmp_path: Path):
    """Where it changes some, at whatever length, the verdict is that of the test."""
    right = {BASE: BASE_RIGHT, "other": BASE_RIGHT, "same": BASE_RIGHT}
    comparison = made(right, token_ids=tokens)
    found = comparison.findings
    assert [found["other", length].changed for length in (0, 64)] == [0, 2]
    assert {found["other", length].verdict for length in (0, 64)} == {UNCLEAR}
    assert {found["same", length].verdict for length in (0, 64)} == {UNCHANGED}
    assert [row[-2] for row in overview(comparison).rows] == ["-", "2 of 48", "0 of 48"]
    page = save(comparison, tmp_path).read_text()
    text = (tmp_path / "compare.md").read_text()
    for written in (page, text):
        assert "Inconclusive: other at every length." in written
        assert "Changed nothing: same at every length." in written
        assert "Answers changed" in written
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["answers"]["other"]["64"]["changed"] == [True, True, *[False] * 22]
    assert Comparison.load(tmp_path / "compare.json") == comparison


def test_where_tokens_were_not_recorded_nothing_is_said_of_changes(tmp_path: Path):
    """Files of earlier versions."""
    save(made({BASE: BASE_RIGHT, "same": BASE_RIGHT}), tmp_path)
    content = json.loads((tmp_path / "compare.json").read_text())
    del content["nothing to do"]
    for by_length in content["answers"].values():
        for cell in by_length.values():
            del cell["changed"]
    (tmp_path / "compare.json").write_text(json.dumps(content))
    again = Comparison.load(tmp_path / "compare.json")
    assert again.findings["same", 0].verdict == UNCLEAR
    assert overview(again).rows[-1][-2] == "-"
    assert not any(sentence.startswith("Changed nothing") for sentence in outcome(again))


def test_who_has_nothing_to_do_did_not_refuse(tmp_path: Path, monkeypatch):
    comparison = made({BASE: BASE_RIGHT}, idle={"VAR": "No channel is large."})
    save(comparison, tmp_path)
    for written in (comparison, Comparison.load(tmp_path / "compare.json")):
        assert overview(written).rows[-1] == ["VAR", "nothing to do", "nothing to do", "-", "-"]
        assert outcome(written)[-1] == "VAR has nothing to do: No channel is large."

    drawn = []
    monkeypatch.setattr("peft_pvm.compare.plots.as_png", drawn.append)
    draw_pareto(comparison)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [BASE]


@pytest.mark.parametrize(("limit", "said"), [(1, "at most 1 token."), (4, "at most 4 tokens.")])
def test_how_long_answers_may_be(limit: int, said: str):
    comparison = made({BASE: BASE_RIGHT})
    assert said in "\n".join(as_markdown(replace(comparison, about={**comparison.about, "max_new_tokens": limit}), ""))


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
    assert overview(comparison).rows[-1] == ["odd", "-", "-", "-", "-"]


def test_what_is_read_is_what_was_written(tmp_path: Path):
    comparison = made({BASE: BASE_RIGHT, "other": [1] * 24})
    save(comparison, tmp_path)
    assert Comparison.load(tmp_path / "compare.json") == comparison


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("answers"),
        lambda content: content["answers"]["base"]["0"]["right"].pop(),
        lambda content: content["answers"]["base"]["0"].update(changed=[True]),
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

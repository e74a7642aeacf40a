"""A comparison on the lab's tiny model: what is asked, kept, gone on with and refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


pytest.importorskip("matplotlib", reason="the command line needs the extra `lab`")
pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")

from commands import run
from environment import DEVICE

from peft_pvm import attached
from peft_pvm.cli.work.comparing import lab_task
from peft_pvm.compare.comparison import Comparison
from peft_pvm.compare.contenders import BASE, METHOD, Contender, contenders
from peft_pvm.compare.report import save
from peft_pvm.compare.run import ANSWERS, TIMED, TIMES, Plan, _Asker, compare
from peft_pvm.compare.statistics import UNCHANGED
from peft_pvm.demo.for_trainers import tiny_vlm_processor
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.methods import LogBiasConfig, VAFConfig, VARConfig, VCDConfig
from peft_pvm.probe.rows import Chat
from peft_pvm.probe.sinks import propose_sinks
from peft_pvm.tuners.active import acting_adapters
from peft_pvm.utils.packages import adapter_layers


ADAPTER = Path(__file__).parents[2] / "adapters" / "pvm-tiny-vlm"
PROCESSOR = tiny_vlm_processor()
Turn = tuple[str, int, int, str]  # contender, length, seed and question
PLAN = Plan(lengths=(0, 40), seeds=(0, 3))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_tiny_vlm().to(DEVICE)


def compared(model: Any, out: Path, entered: Sequence[Contender], plan: Plan = PLAN, rows: int = 2, **options: Any):
    return compare(model, PROCESSOR, lab_task("mosaic", rows, in_tokens=True), entered, plan, out, **options)


def lines(out: Path) -> list[dict[str, Any]]:
    """What is on the disk."""
    return [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()]


def keep(out: Path, kept: list[dict[str, Any]]) -> None:
    """Have only this on the disk."""
    (out / ANSWERS).write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))


def entries(out: Path) -> list[dict[str, Any]]:
    """The answers on the disk."""
    return [entry for entry in lines(out) if "answer" in entry]


def test_all_answer_the_same_questions(model: Any, tmp_path: Path):
    entered = contenders(["vaf", "vcd"], [str(ADAPTER)])
    found = compared(model, tmp_path, entered)
    assert list(found.cells) == ["base", "temperature", "Log-bias", "VAF", "VCD", "pvm-tiny-vlm"]
    by_name: dict[str, list[Any]] = {}
    for entry in entries(tmp_path):
        asked = entry["length"], entry["seed"], entry["question"], entry["expected"]
        by_name.setdefault(entry["contender"], []).append(asked)
    assert len(set(map(tuple, by_name.values()))) == 1
    assert len(by_name[BASE]) == 2 * 2 * 2
    assert found.findings[BASE, 0].accuracy.mean == 1, "the tiny model answers right after the image"
    assert acting_adapters(model) == []
    assert model.generate.__func__ is type(model).generate


def test_methods_are_what_answers(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def noting(model: Any, *configs: Any):
        seen.extend(configs)
        return attached(model, *configs)

    monkeypatch.setattr("peft_pvm.compare.contenders.attached", noting)
    found = compared(model, tmp_path, contenders(["vcd"], [str(ADAPTER)]), Plan(lengths=(1024,)), rows=6)
    assert [type(config) for config in seen] == [LogBiasConfig, VCDConfig] * (1 + TIMED)
    right = {name: sum(cells[1024].right) for name, cells in found.cells.items()}
    assert right["pvm-tiny-vlm"] >= 5 > 3 >= right[BASE]


def test_an_interrupted_comparison_goes_on(model: Any, tmp_path: Path):
    entered = contenders(["vaf"])
    whole = compared(model, tmp_path / "whole", entered)

    def stop(name: str, done: int, total: int) -> None:
        if (name, done) == ("Log-bias", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(model, tmp_path / "parts", entered, progress=stop)
    with (tmp_path / "parts" / ANSWERS).open("a") as file:
        file.write('{"contender": "Log-b')  # the process was killed while it wrote
    done: list[tuple[str, int]] = []
    again = compared(
        model, tmp_path / "parts", entered, progress=lambda name, number, total: done.append((name, number))
    )
    log_bias, vaf = ([(name, number) for number in range(8)] for name in ("Log-bias", "VAF"))
    assert done == log_bias[3:] + vaf + [(TIMES, number) for number in range(2 * TIMED)]
    assert entries(tmp_path / "parts") == entries(tmp_path / "whole")
    assert [again.findings[key].accuracy for key in again.findings] == [
        whole.findings[key].accuracy for key in whole.findings
    ]
    more = compared(model, tmp_path / "parts", contenders(["pai"]), Plan(lengths=(0, 40, 50), seeds=(0, 3)))
    assert more.lengths == [0, 40, 50]
    assert len(entries(tmp_path / "parts")) == 4 * 8 + 3 * 4 + 12


@pytest.fixture
def turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Turn]:
    """Who generates, for which question, in order. Attaching or loading takes 100 seconds here. An answer takes the
    base as many as it is the how-manieth session, and others twice as many."""
    noted: list[Turn] = []
    now, sessions = [0.0], [0]
    generate, acting, begin = _Asker._generate, Contender.acting, _Asker.__init__

    def noting(self: Any, inputs: Any, contender: Contender, asked: Any, limit: int) -> list[int]:
        assert any(adapter_layers(self.model)) == (contender.name not in (BASE, "temperature"))
        noted.append((contender.name, *asked.key))
        now[0] += sessions[0] * (1 if contender.name == BASE else 2)
        return generate(self, inputs, contender, asked, limit)

    def beginning(self: Any, *args: Any) -> None:
        sessions[0] += 1
        begin(self, *args)

    @contextlib.contextmanager
    def slowly(self: Contender, model: Any):
        now[0] += 100
        with acting(self, model):
            yield
        now[0] += 100

    monkeypatch.setattr(_Asker, "_generate", noting)
    monkeypatch.setattr(_Asker, "__init__", beginning)
    monkeypatch.setattr(Contender, "acting", slowly)
    clock = SimpleNamespace(process_time=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("peft_pvm.compare.run.time", clock)
    return noted


def test_times_are_taken_in_turns(model: Any, tmp_path: Path, turns: list[Turn]):
    """All contenders answer one of the first questions of a length before the next. Another one begins each time.
    Adapters are on the model only while they answer. Two tokens come first, which are not timed."""
    base, temperature, *_, adapter = contenders([], [str(ADAPTER)])
    found = compared(model, tmp_path, [base, temperature, adapter])
    names = [contender.name for contender in (base, temperature, adapter)]
    expected = []
    for number, key in enumerate((0, *key) for key in ((0, "0-0"), (0, "0-1"), (3, "3-0"))):
        in_turn = names[number:] + names[:number]
        expected += [(name, *key) for name in in_turn for _ in range(2)]
    assert [turn for turn in turns[24:] if turn[1] == 0] == expected
    assert len(turns) == 24 + 2 * len(expected)
    assert {cells[0].seconds for cells in found.cells.values()} == {(1.0,) * TIMED, (2.0,) * TIMED}
    turns.clear()
    again = compared(model, tmp_path, [base, temperature, adapter])
    assert (turns, again.to_dict()) == ([], found.to_dict())


def test_who_comes_later_is_timed_beside_the_others(model: Any, tmp_path: Path, turns: list[Turn]):
    """With more questions, others may be the first, and who was timed on fewer is not paired with the wrong ones."""
    plan, few = Plan(lengths=(0,), seeds=(0, 3)), [contenders([])[0]]
    compared(model, tmp_path, few, plan)
    turns.clear()
    found = compared(model, tmp_path, [*few, contenders(["vaf"])[-1]], plan, rows=8)
    timed = [turn for turn in turns[-12:] if turn[0] == "VAF"]
    assert timed == [("VAF", 0, 0, name) for name in ("0-0", "0-1", "0-2") for _ in range(2)]
    assert len(turns) == 12 + 2 * 16 - 4
    assert found.findings["VAF", 0].slowdown == 2


def test_times_of_two_sessions_are_not_compared(model: Any, tmp_path: Path, turns: list[Turn]):
    """Neither after an interruption among the turns of a question, nor of those who entered at different times."""
    plan, (base, *_, vaf, pai) = Plan(lengths=(0,), seeds=(0, 3)), contenders(["vaf", "pai"])
    compared(model, tmp_path, [base, vaf], plan)
    compared(model, tmp_path, [base, pai], plan)
    found = compared(model, tmp_path, [base, vaf, pai], plan)
    assert [found.findings[name, 0].slowdown for name in ("VAF", "PAI")] == [2, 2]
    cai, acting = contenders(["cai"])[-1], Contender.acting

    def stopping(self: Contender, model: Any) -> Any:
        if self.name == "VAF":
            raise KeyboardInterrupt
        return acting(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Contender, "acting", stopping)
        with pytest.raises(KeyboardInterrupt):
            compared(model, tmp_path, [base, vaf, pai, cai], plan)
    found = compared(model, tmp_path, [base, vaf, pai, cai], plan)
    assert [found.findings[name, 0].slowdown for name in ("VAF", "PAI", "CAI")] == [2, 2, 2]


def test_who_refuses_while_times_are_taken_has_none(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entered = [contenders([])[0], contenders(["vaf"])[-1]]
    compared(model, tmp_path, entered)
    keep(tmp_path, [entry for entry in lines(tmp_path) if "times" not in entry])

    def refusing(*_: Any):
        raise ValueError("not now")

    monkeypatch.setattr("peft_pvm.compare.contenders.attached", refusing)
    found = compared(model, tmp_path, entered)
    assert {name: len(cells[0].seconds) for name, cells in found.cells.items()} == {"base": TIMED, "VAF": 0}
    assert found.findings["VAF", 0].slowdown is None
    save(found, tmp_path)
    assert Comparison.load(tmp_path / "compare.json").to_dict() == found.to_dict()


def test_an_earlier_version_timed_every_answer(model: Any, tmp_path: Path):
    entered = contenders([])[:2]
    found = compared(model, tmp_path, entered)
    earlier = [{**entry, "seconds": 0.5} if "answer" in entry else entry for entry in lines(tmp_path)]
    kept = [entry for entry in earlier if "times" not in entry]
    keep(tmp_path, kept)
    again = compared(model, tmp_path, entered)
    assert len(entries(tmp_path)) == len(kept) - 3
    assert {len(cell.seconds) for cells in again.cells.values() for cell in cells.values()} == {TIMED}
    assert again.accuracies("temperature", [0, 40]) == found.accuracies("temperature", [0, 40])


def test_other_answers_are_not_mixed_in(model: Any, tmp_path: Path):
    entered = contenders([])
    plan = Plan(lengths=(0,))
    compared(model, tmp_path, entered, plan)
    with pytest.raises(ValueError, match=r"answers\.jsonl has answers with max_new_tokens 1, but these would"):
        compared(model, tmp_path, entered, Plan(lengths=(0,), max_new_tokens=3))
    other = [*entered[:2], Contender("Log-bias", "control", VAFConfig())]
    with pytest.raises(ValueError, match="has answers of Log-bias with"):
        compared(model, tmp_path, other, plan)
    lines = (tmp_path / ANSWERS).read_text().replace('"expected": "[digit', '"expected": "[figure')
    (tmp_path / ANSWERS).write_text(lines)
    with pytest.raises(ValueError, match="has question 0-0 with the answer"):
        compared(model, tmp_path, entered, plan)
    (tmp_path / ANSWERS).write_text("[]\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl does not hold what peft-pvm compare writes"):
        compared(model, tmp_path, entered, plan)


def test_who_refuses_is_listed_and_the_others_go_on(model: Any, tmp_path: Path):
    layers = Contender("too deep", METHOD, VAFConfig(layers_to_transform=[99]))
    found = compared(model, tmp_path, [contenders([])[0], layers, Contender("VAF", METHOD, VAFConfig())])
    assert list(found.refused) == ["too deep"]
    assert "99" in found.refused["too deep"]
    assert (list(found.cells["too deep"]), list(found.cells["VAF"])) == ([], [0, 40])


def VAR(tau: float) -> Contender:
    return Contender("VAR", METHOD, VARConfig(tau=tau, rho=0.9, least_visual=0.0, p=0.0))


def test_var_gets_the_channels_of_the_probe(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And keeps them when more is asked."""
    task = lab_task("mosaic", 2, in_tokens=True)
    chats = [Chat(list(one.prompt), list(one.images), one.answers[0]) for one in task.draw(0)]
    expected = propose_sinks(model, PROCESSOR, chats, tau=2.0)
    assert expected.visual_share > 0
    plan = Plan(lengths=(0,))
    found = compared(model, tmp_path, [contenders([])[0], VAR(2.0)], plan)
    assert found.contenders["VAR"]["sink_channels"] == expected.channels
    assert list(found.cells["VAR"]) == [0]
    assert (found.refused, found.idle) == ({}, {})
    monkeypatch.delattr("peft_pvm.compare.contenders.outliers")  # nothing is measured again
    again = compared(model, tmp_path, [contenders([])[0], VAR(2.0)], plan, rows=4)
    assert again.contenders["VAR"] == found.contenders["VAR"]
    assert len(entries(tmp_path)) == 2 * 4


@pytest.mark.parametrize(("tau", "reason"), [(20.0, "No channel is above 20"), (3.0, "VAR then does nothing.")])
def test_where_there_are_no_sinks_var_has_nothing_to_do(model: Any, tmp_path: Path, tau: float, reason: str):
    entered = [contenders([])[0], VAR(tau), Contender("VAF", METHOD, VAFConfig())]
    found = compared(model, tmp_path, entered, Plan(lengths=(0,)))
    assert found.refused == {}
    assert reason in found.idle["VAR"]
    assert {name: list(cells) for name, cells in found.cells.items()} == {"base": [0], "VAR": [], "VAF": [0]}
    again = compared(model, tmp_path, [entered[0], VAR(2.0)], Plan(lengths=(0,)))
    assert list(again.cells["VAR"]) == [0], "what did not answer can come back with other settings"


def test_what_acts_from_the_second_token_on_changes_no_answer_of_one(model: Any, tmp_path: Path):
    found = compared(model, tmp_path, contenders(["dipe", "savaa"]), Plan(lengths=(256,)), rows=6)
    ids = {
        name: [entry["token_ids"] for entry in entries(tmp_path) if entry["contender"] == name] for name in found.cells
    }
    for name, cells in found.cells.items():
        assert cells[256].num_changed == sum(mine != base for mine, base in zip(ids[name], ids[BASE]))
    assert found.findings["DIPE", 256].changed
    assert found.findings["SAVAA", 256].verdict == UNCHANGED


def test_a_length_beyond_the_positions_is_refused_before_anything_is_asked(model: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="A text of 8,192 tokens is too long"):
        compared(model, tmp_path, contenders([]), Plan(lengths=(0, 8192)))
    assert not (tmp_path / ANSWERS).exists()


def test_sampling_follows_the_seed(model: Any, tmp_path: Path):
    """The same seeds give the same answers, and torch's own generator is left as it was."""
    entered = contenders([])[:2]
    for name in ("first", "second"):
        compared(model, tmp_path / name, entered, Plan(lengths=(40,), seeds=(0, 1)), rows=4)
    assert entries(tmp_path / "first") == entries(tmp_path / "second")


def test_the_command(tmp_path: Path):
    shutil.copytree(ADAPTER, tmp_path / "mine")
    options = ["--model", "tiny", "--out", tmp_path / "out", "--lengths", 0, "--rows", 1, "--methods", "vaf"]
    output = run("compare", *options, "--adapter", tmp_path / "mine", "--task", "transcription")
    assert "temperature (control)" in output
    assert "mine (adapter)" in output
    assert "Report: " in output
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["about"]["asked"] == 54
    assert found["answers"]["base"]["0"]["tokens"] == [107]
    assert min(found["answers"]["base"]["0"]["right"]) > 9


def test_the_table_fits_a_terminal_of_80_columns(tmp_path: Path):
    options = ["--model", "tiny", "--out", tmp_path, "--lengths", "0,8,16", "--rows", 1, "--methods", "var,savaa"]
    lines = run("compare", *options, columns=80).splitlines()
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert {len(line) for line in table} == {80}
    names = {line[1:].split("│")[0].strip() for line in table if line.startswith("│")}
    assert names - {""} == {"base", "temperature", "(control)", "Log-bias", "VAR", "SAVAA"}
    assert any(line.startswith("VAR has nothing to do: No channel is above 20") for line in lines)
    assert any(line.startswith("Changed nothing: ") and "SAVAA at every length" in line for line in lines)


def test_a_file_of_the_user(tmp_path: Path):
    from peft_pvm.demo.cells import ask_in_tokens

    with (tmp_path / "questions.jsonl").open("w") as file:
        for number, asked in enumerate(ask_in_tokens(False, 2, 0)):
            asked.image.save(tmp_path / f"{number}.png")
            row = {"image": f"{number}.png", "question": asked.question, "answers": ["no", asked.answer]}
            file.write(json.dumps(row) + "\n")
    options = [
        "--model",
        "tiny",
        "--methods",
        "vaf",
        "--lengths",
        "0",
        "--max-new-tokens",
        1,
        "--out",
        tmp_path / "out",
    ]
    run("compare", "--task", tmp_path / "questions.jsonl", *options)
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["answers"]["base"]["0"]["right"] == [1, 1]
    assert found["about"]["scored"].startswith("An answer counts if it is one of the accepted ones")


def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*args: object, **kwargs: object):
        raise AssertionError("The weights are loaded.")

    monkeypatch.setattr("peft_pvm.cli.work.loading.load_tiny_vlm", load)
    (tmp_path / "bad.jsonl").write_text('{"image": "none.png", "question": "?", "answer": "x"}\n')

    def error(*options: object) -> str:
        return run("compare", "--model", "tiny", "--out", tmp_path / "out", *options, fails=True)

    assert "(dipe, t-drs, " in error("--methods", "pvm")
    assert "a trained adapter is given with --adapter" in error("--methods", "pvm")
    assert "bad.jsonl, line 1: 'none.png' cannot be read as an image" in error("--task", tmp_path / "bad.jsonl")
    assert "nowhere" in error("--adapter", "nowhere")
    assert "'x' must be whole numbers" in error("--lengths", "x")
    assert "'nowhere' cannot be used" in error("--device", "nowhere")

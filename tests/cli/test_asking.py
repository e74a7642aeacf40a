"""What `peft-pvm app` computes, without its page."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest


pytest.importorskip("typer", reason="the command line needs the extra `lab`")
pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")
pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")

import torch
from PIL import Image
from processors import PROCESSORS
from tiny_vlms import FAMILIES

from peft_pvm.cli.options import ModelOptions
from peft_pvm.cli.work import asking
from peft_pvm.cli.work.asking import ONLY_QUESTION, Desk, Question, State
from peft_pvm.demo.cells import ask_in_turn, laid_out
from peft_pvm.demo.mosaic import NUM_CELLS
from peft_pvm.tuners.active import acting_adapters


PVM = str(Path(__file__).parents[2] / "adapters" / "pvm-tiny-vlm")
SEED = 0


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(ModelOptions("tiny", "cpu", "auto", None))


def about_mosaic(**settings) -> Question:
    return Question("tiny", ask_in_turn(SEED).image, ONLY_QUESTION, seed=SEED, **settings)


def last(desk: Desk, question: Question) -> State:
    *_, state = desk.ask(question, Event())
    return state


def test_the_base_forgets_and_what_acts_remembers(desk: Desk):
    """Methods and adapters go on and off, and the base stays the same. What is written grows."""
    states = list(desk.ask(about_mosaic(text_tokens=1024, methods=["DIPE"]), Event()))
    assert states[-1].right["base"] < 4
    assert states[-1].right["DIPE"] == NUM_CELLS
    assert states[-1].answers["DIPE"].split() == [str(digit) for digit in digits_of(SEED)]
    assert states[-1].result.model_name == "tiny"
    assert [forward.label for forward in states[-1].result.forwards] == ["base", "dipe"]
    for earlier, later in pairwise(states[1:]):
        assert all(later.answers[name].startswith(text) for name, text in earlier.answers.items())
    for name, forward in zip(("base", "DIPE"), states[-1].result.forwards):
        shares = [glance.share for glance in states[-1].looks.seen[name]]
        assert len(shares) == len(states[-1].result.token_ids) - 1
        if name == "DIPE":  # the base is probed on its answer, and wrote another
            assert shares == pytest.approx(forward.mean_mass[1:], abs=1e-4)
    assert states[-1].looks.grids == [(3, 3)]
    with_pvm = last(desk, about_mosaic(text_tokens=1024, adapters=[PVM]))
    assert with_pvm.right[PVM] > 7
    assert last(desk, about_mosaic(text_tokens=1024)).answers == {"base": states[-1].answers["base"]}
    assert with_pvm.answers["base"] == states[-1].answers["base"]
    assert last(desk, about_mosaic()).right == {"base": NUM_CELLS}


def digits_of(seed: int) -> list[int]:
    return [int(digit) for digit in laid_out(ask_in_turn(seed).answer).split()]


@pytest.mark.parametrize("is_closed", [False, True])
def test_the_model_stops_when_told_and_when_nobody_reads_on(desk: Desk, is_closed: bool, monkeypatch):
    """It is then free for the next question, and nothing acts any more."""
    stop, written = Event(), []
    put = asking._Stream.put

    def wait(self: asking._Stream, value: object) -> None:
        written.append(value)
        if len(written) == 8:  # the prompt and seven tokens: the model does not outrun who reads
            self.stop.wait(180)
        put(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(asking._Stream, "put", wait)
        reading = desk.ask(about_mosaic(text_tokens=64, methods=["DIPE"]), stop)
        while not next(reading).answers.get("DIPE"):
            pass
        if is_closed:
            reading.close()
        else:
            stop.set()
            *_, state = reading
            assert (state.doing, state.result, state.answers["base"]) == ("Stopped.", None, "")
            assert len(state.answers["DIPE"].split()) < NUM_CELLS
    assert acting_adapters(desk._model) == []
    assert last(desk, about_mosaic()).right == {"base": NUM_CELLS}


@pytest.mark.parametrize("method", ["VISTA", "M3ID"])
def test_methods_that_run_the_model_beside_can_be_asked(desk: Desk, method: str):
    state = last(desk, about_mosaic(text_tokens=32, methods=[method]))
    assert state.right[method] > 7
    assert len(state.result.token_ids) == 2 * NUM_CELLS - 1


def test_another_model_is_asked_what_is_asked(tmp_path: Path):
    """In its own dtype, with the text between, for as long as it may write. Weights are read as safetensors alone."""
    FAMILIES["llava"].build().save_pretrained(tmp_path)
    PROCESSORS["llava"]().save_pretrained(tmp_path)
    desk = Desk(ModelOptions("tiny", "cpu", "bfloat16", None))
    asked = Question(str(tmp_path), Image.new("RGB", (40, 30)), "what?", 20, ["VAF"], max_new_tokens=3)
    with pytest.warns(UserWarning, match="multiplies scores"):
        state = last(desk, asked)
    assert state.right == {}
    assert state.result.settings["dtype"] == "bfloat16"
    assert len(state.result.token_ids) <= 3
    assert state.result.prompt == "[20 tokens of text]\n\nwhat?"
    without = last(desk, Question(str(tmp_path), Image.new("RGB", (40, 30)), "what?", max_new_tokens=1))
    assert state.result.num_prompt_tokens > without.result.num_prompt_tokens + 15

    torch.save(FAMILIES["llava"].build().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        last(Desk(desk._of_model), asked)


def test_no_code_of_a_model_is_run(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor is somebody asked at the terminal whether it may be."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match="custom code"):
        last(desk, Question(str(tmp_path), Image.new("RGB", (40, 30)), "what?"))
    assert not (tmp_path / "run").exists()
    assert asked == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": " "}, "no question"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"adapters": ["nowhere"]}, "nowhere"),
        ({"methods": ["T-DRS", "PAI"]}, "tdrs.*pai|pai.*tdrs"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(desk: Desk, wrong: dict, said: str):
    """And the next question is answered."""
    asked = {**vars(about_mosaic()), **wrong}
    with pytest.raises((OSError, ValueError), match=said):
        last(desk, Question(**asked))
    assert last(desk, about_mosaic()).right == {"base": NUM_CELLS}

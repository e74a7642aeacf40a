"""Every command, given every kind of wrong value for every one of its parameters, refuses in one sentence.

The commands and their parameters are read off the app, so that a new one is tested without being named here.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch


pytest.importorskip("typer", reason="the command line needs the extra `lab`")
pytest.importorskip("matplotlib", reason="pictures need the extra `lab`")
pytest.importorskip("sklearn", reason="the lab needs the extra `lab`")
pytest.importorskip("datasets", reason="rows of data need the extra `train`")

import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from experiments.commands import app as experiments_app
from peft_pvm.bench.models import ALL, METHODS, PRESETS
from peft_pvm.bench.prediction import DEVICES, PREDICTED
from peft_pvm.bench.runners import Settings
from peft_pvm.cli import choices, refusals
from peft_pvm.cli.app import app
from peft_pvm.compare.contenders import UNTRAINED
from peft_pvm.demo.for_trainers import make_chats, save_as_folder, write_chats
from peft_pvm.demo.mosaic import Split
from peft_pvm.demo.tiny_vlm import load_tiny_vlm
from peft_pvm.folders.data_file import write_json
from peft_pvm.methods.dipe.method import FARTHEST
from peft_pvm.methods.pvm.merging import CombinationType
from peft_pvm.methods.var import VARConfig
from peft_pvm.probe.calibrate import LENGTHS, MAX_DISTANCES


ADAPTER = Path(__file__).parents[2] / "adapters" / "pvm-tiny-vlm"
CHATS = make_chats("messages", 2, 16)
HUGE = "1" + "0" * 40
ESCAPES = "no\x1b[31msuch[/x]\u202ething"
# What a parameter may not be, by its type. Whole numbers of every command have an upper bound.
WRONG_NUMBERS = {int: ["x", "", "1.5", "nan", "-1", f"-{HUGE}", HUGE], float: ["x", "", "nan", "inf", "-1", "1e400"]}
WRONG_TEXTS = ["", ",", "nowhere", "a/b/c/d", "x" * 5000, ESCAPES, "-1,nan", f"{HUGE},0"]
WRONG_PATHS = ["", "nowhere/at/all", "x" * 5000, "/dev/null/x", "/proc/x", ESCAPES]
WILD = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "deep": "[" * 100_000,
    "number": '{"peft_type": 3, "model_type": 3, "text_config": 3, "weight_map": 3, "log_history": 3}',
    "lists": '{"peft_type": "PVM", "model_type": "qwen3_vl", "text_config": {"pvm_layers": 3, "pvm_hidden_size": "x"},'
    ' "weight_map": ["x"], "log_history": [3], "r": [], "layers_to_transform": {}}',
    "binary": "\x00\xff\x1b[31m",
}
CRASHES_OTHERS = {
    ("data", "null"),
    ("task", "null"),
}  # pyarrow, which reads data sets, ends the process at a JSON file of null
FILES = (
    "adapter_config.json",
    "config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "results.json",
    "trainer_state.json",
    "adapter_model.safetensors",
    "model.safetensors",
)


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


EXPERIMENTS = "experiments"  # stands before the commands of `python -m experiments`, a command line of its own
COMMAND_LINES = {
    "peft-pvm": typer.main.get_command(app),
    f"python -m {EXPERIMENTS}": typer.main.get_command(experiments_app),
}
COMMANDS = {
    **dict(commands(COMMAND_LINES["peft-pvm"])),
    **dict(commands(COMMAND_LINES[f"python -m {EXPERIMENTS}"], EXPERIMENTS)),
}


@dataclass
class Done:
    """What a command left. `CliRunner` would build all commands anew for each call."""

    exit_code: int
    stdout: str
    stderr: str


def call(*arguments: str) -> Done:
    name = "peft-pvm"
    if arguments[:1] == (EXPERIMENTS,):
        name, arguments = f"python -m {EXPERIMENTS}", arguments[1:]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            COMMAND_LINES[name].main(list(arguments), prog_name=name)
        except SystemExit as exit:
            return Done(int(exit.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("A command exits.")


def parameters(command: Any) -> Iterator[tuple[Any, Any]]:
    """The parameters of a command with their types, those in lists and those that may be None included."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for parameter in command.params:
        if parameter.name == "help":
            continue
        kind = hints[parameter.name]
        while get_origin(kind) is not None and get_args(kind) and get_origin(kind) is not type:
            if not isinstance(get_args(kind)[0], type) and get_origin(kind) is not Annotated:
                members = [member for member in get_args(kind) if member is not type(None)]
                if not any(get_origin(member) or isinstance(member, type) for member in members):
                    break  # a Literal
                kind = members[0]
            else:
                kind = get_args(kind)[0]
        yield parameter, kind if isinstance(kind, type) else str


class Place:
    """Files and folders, good and wild, and how commands are called there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = folder / "model"
        self.adapter = folder / "adapter"
        self.wild: list[Path] = []
        self.as_left: set[tuple[Path, int, int]] = set()
        self.renew()

    def found(self) -> set[tuple[Path, int, int]]:
        """What stands there, with times and sizes."""
        return {(path, path.stat().st_mtime_ns, path.stat().st_size) for path in self.folder.rglob("*")}

    def renew(self) -> None:
        """Put all in its place again if a command has written there."""
        if self.as_left == self.found() != set():
            return
        folder = self.folder
        shutil.rmtree(folder)
        folder.mkdir()
        save_as_folder(load_tiny_vlm(), self.model)
        write_chats(CHATS, folder / "chats")
        shutil.copytree(ADAPTER, self.adapter)
        Image.new("RGB", (24, 24)).save(folder / "image.png")
        self.wild = [folder / "image.png", self.model, self.adapter]
        for name, content in WILD.items():
            (folder / "wild" / name).mkdir(parents=True)
            (folder / f"{name}.json").write_text(content, encoding="latin-1")
            self.wild += [folder / "wild" / name, folder / f"{name}.json"]
            for file in FILES:
                (folder / "wild" / name / file).write_text(content, encoding="latin-1")
        (folder / "wild" / "nothing").mkdir()
        damaged = folder / "wild" / "damaged"
        damaged.mkdir()
        (damaged / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
        (damaged / "config.json").write_bytes((self.model / "config.json").read_bytes())
        save_file({"x": torch.zeros(1)}, damaged / "model.safetensors")
        (damaged / "adapter_model.safetensors").write_bytes(b"junk")
        self.wild += [folder / "wild" / "nothing", damaged]
        self.as_left = self.found()

    def usual(self, parameter: Any, kind: type) -> str:
        """A value for a parameter that must be given while another one is wrong."""
        by_name = {"image": "image.png", "model": "model", "base": "model", "source": "model", "data": "chats"}
        if "adapter" in parameter.name or parameter.name == "folder":
            return str(self.adapter)
        if parameter.name in by_name:
            return str(self.folder / by_name[parameter.name])
        return str(self.folder / "new") if kind is Path else "usual"

    def with_value(self, path: tuple[str, ...], wrong: Any, value: str) -> Done:
        options, arguments = [], []
        for parameter, kind in parameters(COMMANDS[path]):
            if parameter.name == "rows" != wrong.name:
                options.append("--rows=1")
            if parameter.name != wrong.name and not parameter.required:
                continue
            given = value if parameter.name == wrong.name else self.usual(parameter, kind)
            if parameter.param_type_name == "argument":
                arguments.append(given)
            else:
                options.append(f"{parameter.opts[0]}={given}")
        return call(*path, *options, "--", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _ctrl_c_when_a_model_computes(
    request: pytest.FixtureRequest, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is not refused before that is not refused: so much for wrong values, and for what takes hours."""

    def interrupt(*args: object, **kwargs: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Module, "__call__", interrupt)
    if "[app]" in request.node.name and find_spec("gradio"):  # which takes seconds to import
        monkeypatch.setattr("gradio.Blocks.launch", interrupt)
    monkeypatch.chdir(tmp_path)


def check(done: Done, called: str) -> None:
    assert done.exit_code in (0, 1, 2, 130), called
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", done.stdout + done.stderr), called
    if done.exit_code == 2 or (done.exit_code == 1 and not done.stdout):  # inspect tells of a misfit in its table
        (start,) = re.finditer("^Error: .{10,}", done.stderr, re.MULTILINE)
        assert len(done.stderr) - start.start() < refusals.LONGEST + 200, called
    if done.exit_code == 130:
        assert done.stderr.endswith("Interrupted.\n"), called


def chosen(path: tuple[str, ...], name: str, values: list[str]) -> list[str]:
    """All values for the first command with such a parameter, every fifth for the others: one reader reads them."""
    with_it = [path for path in COMMANDS if any(parameter.name == name for parameter in COMMANDS[path].params)]
    return values if path == with_it[0] else values[with_it.index(path) % 5 :: 5]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_wrong_values_are_refused(path: tuple[str, ...], place: Place):
    for parameter, kind in parameters(COMMANDS[path]):
        if kind is bool:
            continue
        place.renew()
        for value in chosen(path, parameter.name, WRONG_NUMBERS.get(kind, [])):
            done = place.with_value(path, parameter, value)
            check(done, f"{path} {parameter.name}={value}")
            assert done.exit_code in (1, 2), f"{path} {parameter.name}={value}"
        if kind in WRONG_NUMBERS:
            continue
        wild = [path for path in place.wild if (parameter.name, path.name) not in CRASHES_OTHERS]
        values = [*(WRONG_PATHS if kind is Path else WRONG_TEXTS), *map(str, wild)]
        for value in chosen(path, parameter.name, values):
            check(place.with_value(path, parameter, value), f"{path} {parameter.name}={value}")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_usage_errors(path: tuple[str, ...], place: Place):
    for wrong in (["--no-such-option"], ["--", *["one too many"] * 9], ["--out"]):
        done = call(*path, *wrong)
        check(done, f"{path} {wrong}")


def test_without_arguments_there_is_help():
    for group in ((), ("lab",), (EXPERIMENTS,)):
        done = call(*group)
        assert (done.exit_code, done.stderr) == (2, "")
        assert "Usage" in done.stdout


def test_what_needs_no_library_does_not_load_it():
    """Help, errors of arguments, versions and completion, as the console script gives them."""
    code = """
import contextlib, io, os, sys
import peft_pvm_cli

def main(*arguments, **environment):
    sys.argv = ["peft-pvm", *arguments]
    os.environ.update(environment)
    with contextlib.suppress(SystemExit):
        peft_pvm_cli.main()

main("--version")
main("prob")

import typer
from peft_pvm.cli.app import app
group_of_all = typer.main.get_command(app)

def walk(group, *path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            walk(command, *path, name)
        for wrong in ("--help", "--no-such-option", "--rows=-1", "--preset=none"):
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                group_of_all.main([*path, name, wrong])

walk(group_of_all)
main(_PEFT_PVM_COMPLETE="complete_bash", COMP_WORDS="peft-pvm bench --preset ", COMP_CWORD="3")
print(*{"torch", "transformers", "peft", "numpy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    versions, *presets, loaded = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert presets == list(PRESETS)
    assert loaded == "", done.stderr
    assert "No such command 'prob'. Did you mean 'probe'? See peft-pvm --help." in done.stderr
    assert "'none' is not one of" in done.stderr


def test_what_options_accept_is_what_the_library_has():
    assert get_args(choices.Split) == get_args(Split)
    assert get_args(choices.Combination) == get_args(CombinationType)
    assert get_args(choices.Preset) == tuple(PRESETS)
    assert get_args(choices.GPU) == tuple(DEVICES)
    assert tuple(UNTRAINED) == choices.UNTRAINED
    assert tuple(METHODS) == choices.BENCHED
    assert ALL == choices.ALL
    assert PREDICTED == choices.PREDICTED
    assert (LENGTHS, MAX_DISTANCES) == (choices.LENGTHS, choices.MAX_DISTANCES)
    assert (FARTHEST, VARConfig.tau) == (choices.FARTHEST, choices.TAU)
    bench = {parameter.name: parameter.default for parameter in COMMANDS[("bench",)].params}
    settings = vars(Settings())
    assert bench["method"].split(",") == list(settings["methods"])
    assert bench["lengths"].split(",") == list(map(str, settings["contexts"]))
    shared = bench.keys() & settings
    assert {name: bench[name] for name in shared} == {name: settings[name] for name in shared}


def test_without_what_other_commands_need():
    """Where optional packages cannot be imported, all help is there, and what is missing is named."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["matplotlib", "PIL", "sklearn", "datasets", "lmms_eval", "trl", "vllm", "gradio"]))
import typer
from typer.testing import CliRunner
from experiments.commands import app as experiments_app
from peft_pvm.cli.app import app

def walk(app, group, *path):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            walk(app, command, *path, name)
        else:
            done = CliRunner().invoke(app, [*path, name, "--help"])
            assert done.exit_code == 0, done

for walked in (app, experiments_app):
    walk(walked, typer.main.get_command(walked))
lacking = {
    "lab recall": "scikit-learn", "lab chats x": "datasets and pillow", "bench --plot x.png": "matplotlib",
    "probe --model x --image pyproject.toml --prompt x --out x": "matplotlib and pillow",
    "layers --model x --data x": "datasets and pillow", "calibrate --model x --data x": "datasets and pillow",
    "eval-lengths --model x --model-args x --tasks x --out x": "lmms-eval", "app": "gradio",
}
lacking_in_experiments = {
    "eval --method base --results new": "scikit-learn", "report --docs new": "matplotlib",
    "serving-load --out new": "vllm and pillow",
}
calls = [(app, *call) for call in lacking.items()]
calls += [(experiments_app, *call) for call in lacking_in_experiments.items()]
for called, arguments, packages in calls:
    done = CliRunner().invoke(called, arguments.split())
    assert f"This needs {packages}, which the extra" in done.stderr, done.stderr
    assert "pip install '.[" in done.stderr and done.exit_code == 1, done
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ADAPTER.parents[1])
    assert done.returncode == 0, done.stderr


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fault(*args: object):
        raise KeyError("fault")

    monkeypatch.setattr("peft_pvm.cli.work.bench.show_scale", fault)
    assert isinstance(CliRunner().invoke(app, ["scale"]).exception, KeyError)


def test_refusals_show_where_they_come_from_if_asked(monkeypatch: pytest.MonkeyPatch):
    arguments = ["scale", "--bandwidth", "nan"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, SystemExit)
    monkeypatch.setenv(refusals.DEBUG, "1")
    assert isinstance(CliRunner().invoke(app, arguments).exception, ValueError)


def test_text_of_others_has_no_effect_on_the_terminal():
    folder = Path("pvm[/x]")
    shutil.copytree(ADAPTER, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ESCAPES}))
    done = call("inspect", str(folder))
    assert done.exit_code == 0, done.stderr
    assert "pvm[/x]" in done.stdout
    assert r"no\x1b[31msuch[/x]\u202ething" in done.stdout
    assert "\x1b" not in done.stdout


def test_what_is_planned_is_something():
    done = call(EXPERIMENTS, "train", "--method", "mlp", "--recipe", "hidden-256")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "trains none of mlp under hidden-256" in done.stderr


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peft_pvm.cli.work.bench.show_scale", lambda *args: torch.empty(2**55))
    done = CliRunner().invoke(app, ["scale"])
    assert done.exit_code == 1
    assert "memory" in done.stderr


def script(arguments: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m peft_pvm_cli {arguments}"
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)


def test_a_command_loads_what_it_needs(place: Place):
    """In a process of its own, where nothing else has loaded it: the library, and the tiny model's processor."""
    done = script(f"layers --model {place.model} --data {place.folder / 'chats'} --rows 1 --json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_output_that_is_full(tmp_path: Path):
    done = script("scale > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 28] No space left on device\n"
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    done = CliRunner().invoke(app, ["curves", str(tmp_path), "--out", "/dev/full"])
    assert "Error: [Errno 28] No space left on device" in done.stderr


def test_a_reader_that_has_seen_enough():
    done = script("scale | true")
    assert done.returncode in (0, 1)  # 0: all was written before the reader left
    assert done.stderr == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path):
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    write_json(tmp_path / "link.json", [2])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == [2]
